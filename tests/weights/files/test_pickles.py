"""No name in a pickle is resolved, and nothing here could; the bad and the odd pickles themselves are in
test_corpus.py."""

from __future__ import annotations

import ast
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import weights.files.foreign  # noqa: F401 (our own readers, which are imported when they are needed)
from ldm.errors import FileError
from tests.made.checkpoints import Call, Name, ckpt_of, lightning, pickled, save_stream, save_zip, tensor
from weights import open_file
from weights.files.rebuild import INERT, STORAGES

ROOT = Path(__file__).parents[3]


LAZY = {  # file -> (table of modules, lookup in it)
    "ldm/lazy.py": [("home = {", "import_module(home[name])")],
    "ldm/cli/arguments.py": [
        ("commands: Mapping[str, Command]", 'importlib.import_module(f"ldm.cli.{command.module}")'),
        ("import importlib", 'importlib.import_module("ldm.cli.options")'),
    ],
}


def test_no_listed_name_is_looked_up(tmp_path):
    """Modules that do not exist give placeholders: a machine that imported them would fail."""
    absent = [
        pair
        for pair in INERT
        if pair[0].partition(".")[0] in ("pytorch_lightning", "omegaconf", "lightning", "lightning_fabric")
    ]
    assert len(absent) > 10
    before = set(sys.modules)
    path = tmp_path / "x.ckpt"
    path.write_bytes(ckpt_of({"w": tensor(), **{f"x{i}": Call(Name(*pair), 1) for i, pair in enumerate(absent)}}))
    assert list(open_file(path)) == ["w"]
    assert set(sys.modules) == before


def test_the_package_has_no_way_to_run_a_pickle():
    pattern = re.compile(
        r"pickle\.(?!Pickler\b)\w|Unpickler|torch\.load\(|yaml\.load|(?<![.\w])(eval|exec)\(|import_module|__import__"
    )
    files = [path for package in ("weights", "ldm", "samplers") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 60
    for path in files:
        code = path.read_text(encoding="utf-8")
        for table, lookup in LAZY.get(path.relative_to(ROOT).as_posix(), ()):  # names of ours, imported when asked for
            assert table in code
            assert code.count(lookup) == 1
            code = code.replace(lookup, "None").replace("from importlib import import_module", "")
        assert not pattern.search(code), path
        nodes = [*ast.walk(ast.parse(code))]
        imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        allowed = {"pickle"} if path.name == "write.py" else set()  # there torch files are written, with pickle.Pickler
        assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"} - allowed, path


def test_dictionaries_that_fan_out_are_not_walked_for_ever(tmp_path):
    level: dict = {str(i): 1 for i in range(1000)}
    data = b"\x80\x02" + pickled(level)[2:-1] + b"q\x000"
    for n in range(3):
        data += (
            b"}("
            + b"".join(pickled(str(i))[2:-1] + b"h" + bytes([n]) for i in range(1000))
            + b"uq"
            + bytes([n + 1])
            + b"0"
        )
    (tmp_path / "x.ckpt").write_bytes(ckpt_of(data + b"h\x03.", {}))
    with pytest.raises(FileError, match="far more than a model needs"):
        open_file(tmp_path / "x.ckpt")


@pytest.mark.parametrize("save", [save_zip, save_stream])
def test_facts_beside_the_weights_are_kept_as_text(save, tmp_path):
    with lightning({"w": torch.ones(2)}) as contents:
        path = save(contents, tmp_path / "x.ckpt")
    with open_file(path) as file:
        assert file.metadata == {"epoch": "3", "global_step": "470000", "pytorch-lightning_version": "1.4.2"}


def test_every_storage_type_has_a_torch_type():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these types are old, as the files are
        assert all(getattr(torch, name).dtype == dtype for (_, name), dtype in STORAGES.items())


def test_an_error_says_what_to_do(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(ckpt_of({"a": Call(Name("os", "system"), "ls")}))
    with pytest.raises(
        FileError,
        match=r"model.ckpt: refers to os.system, which is code, not weights; use a .safetensors of this model$",
    ):
        open_file(tmp_path / "model.ckpt")
