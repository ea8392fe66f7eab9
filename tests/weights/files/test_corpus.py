"""Every bad file is refused in one line that says what to do, soon, with nothing run; every odd but sound one loads bit
by bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import weights.files.foreign
import weights.files.refused  # noqa: F401 (our own readers, which are imported when they are needed)
from ldm.errors import FileError
from tests.made.corpus import REFUSALS
from tests.made.corpus_pickles import LIVE
from tests.made.corpus_sound import SOUND
from weights import open_file
from weights.files.folders import open_folder
from weights.files.opened import is_folder

REMEDY = re.compile(
    r"; (near it: \S|(download|use|save|unpack|run|rename|convert|repack|name|join|wait|link|change|check|give) [^;]*$)"
)


def read_all(path: Path) -> None:
    """Open and read everything, as a loader would: some faults only show in the numbers."""
    with open_folder(path) if is_folder(path) else open_file(path) as file:
        for key in file:
            file[key]


def test_the_corpus_is_large_enough():
    assert len(REFUSALS) >= 150
    assert len(SOUND) >= 40
    assert len({case.make for case in REFUSALS.values()}) >= 150


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_bad_file_is_refused_in_one_line_that_says_what_to_do(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = REFUSALS[kind]
    path = case.build(tmp_path)
    before = set(sys.modules)
    start = time.process_time()
    with pytest.raises(FileError) as caught:
        read_all(path)
    seconds = time.process_time() - start
    error, message = caught.value, str(caught.value)
    assert case.words in message
    assert error.key == case.key
    assert len(message) <= 200
    assert "\n" not in message
    assert message.isprintable()
    assert REMEDY.search(message), message
    assert Path(error.path).name in message or not Path(error.path).name.isprintable() or len(str(error.path)) > 80
    assert error.path == path or path in Path(error.path).parents
    assert not (tmp_path / "canary").exists()
    assert set(sys.modules) == before
    assert seconds < (3 if kind.startswith("bomb") else 1), (
        f"{seconds:.2f} s"
    )  # bombs: half a second, but more on a busy machine


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Is it the same tensor, NaNs and signs of zeros included?"""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return not one.numel() or one.reshape(-1).view(torch.uint8).equal(
        other.detach().contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("kind", SOUND)
def test_an_odd_but_sound_file_loads_bit_by_bit(kind, tmp_path):
    path, tensors = SOUND[kind](tmp_path)
    before = set(sys.modules)
    start = time.process_time()
    with open_file(path) as file:
        assert set(file) == set(tensors)
        for key, value in tensors.items():
            for read in (file[key], file.read(key, mapped=False)):
                assert same_bits(read, value), key
                assert read.is_contiguous()
    assert time.process_time() - start < 2
    assert set(sys.modules) == before


LIVENESS = """
import contextlib, copyreg, io, os, pathlib, pickle, sys, warnings
warnings.simplefilter("ignore")
copyreg.add_extension("os", "system", 7)
folder = pathlib.Path.cwd()
class Reader(pickle.Unpickler):
    def persistent_load(self, identity):
        return None
for file in sorted(folder.glob("*.pkl")):
    (folder / file.stem).mkdir()
    os.chdir(folder / file.stem)
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        Reader(file.open("rb")).load()
    os.chdir(folder)
"""


def test_the_payloads_are_live(tmp_path):
    """Python's own pickle runs every one of them: their refusal is no accident."""
    for i, data in enumerate(LIVE.values()):
        (tmp_path / f"{i:03}.pkl").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", LIVENESS], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    dead = [name for i, name in enumerate(LIVE) if not (tmp_path / f"{i:03}" / "canary").exists()]
    assert not dead, f"{dead}\n{done.stderr[-1000:]}"


NASTY = (  # each asks for far more than it has bytes
    "bomb: memo", "bomb: operations", "bomb: dictionary copied again and again", "pickle: length of 2^63",
    "pickle: number of 2 GB", "pickle: storage of 2^62 numbers", "zip: 20000 entries",
    "zip: a wide record of 2^63 entries", "zip: a pickle of more than 64 MiB", "header: millions of parts",
    "header: nested 100000 deep", "header: header beyond the limit", "folder: index of a million parts",
    "stream: 2^62 numbers",
)  # fmt: skip
MEMORY = """
import os, resource, sys
from pathlib import Path
from weights import open_file
from weights.files.folders import open_folder
from weights.files.opened import is_folder
limit = int(sys.argv[1])
folders = sorted(Path.cwd().iterdir())
here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + limit, here + limit))
for folder in folders:
    os.chdir(folder)
    name = Path("opened").read_text()
    try:
        with open_folder(name) if is_folder(name) else open_file(name) as file:
            for key in file:
                file[key]
    except ValueError:
        print(folder.name)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_no_refusal_takes_more_than_256_MB(tmp_path):
    """In a process that can have no more, whatever it is for: mapped, reserved or used."""
    for i, kind in enumerate(NASTY):
        folder = tmp_path / f"{i:03}"
        folder.mkdir()
        (folder / "opened").write_text(str(REFUSALS[kind].build(folder)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY, str(256 * 10**6)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert len(done.stdout.split()) == len(NASTY), done.stderr[-1000:]
