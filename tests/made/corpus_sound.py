"""Files that are odd but sound, with the tensors that they must give bit by bit."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.made.checkpoints import (
    FLOAT,
    HOOKS,
    Call,
    Name,
    Persistent,
    ckpt_of,
    lightning,
    pickled,
    pretended,
    safetensors_of,
    save_safetensors,
    save_stream,
    save_zip,
    storage,
    tensor,
    zip_of,
)
from tests.made.corpus_files import ENTRY, stream_of, zip64_of
from tests.made.corpus_files import SOUND as PLAIN_ZIP
from tests.made.corpus_pickles import BYTES, FLOAT8, TYPED, raw
from weights.files.opened import DTYPES

Made = tuple[Path, Mapping[str, Tensor]]
Build = Callable[[Path], Made]

BASE = torch.arange(24.0).reshape(4, 6)
ZEROS = {"w": torch.zeros(2, 3)}  # what the files made by hand hold
ONE = {"w": torch.arange(6.0).reshape(2, 3)}
ODD = {
    "transposed": BASE.t(), "row of a shared storage": BASE[1], "column of a shared storage": BASE[:, 2],
    "channels last": torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "expanded": torch.ones(1, 3).expand(4, 3), "empty": torch.empty(0, 3), "scalar": torch.tensor(3.0),
    "NaN and infinity": torch.tensor([float("nan"), float("inf"), -0.0]),
    "parameter": torch.nn.Parameter(torch.ones(3)), "a name with . and \u00fc": torch.ones(2),
    "every second": torch.arange(10.0)[::2],
    "step of a dimension of one": torch.ones(8, 4)[:1].as_strided((1, 4), (9999, 1)), "float16": torch.ones(5).half(),
}  # fmt: skip
TYPES = {
    name: (torch.arange(40) * 37 % 251).to(torch.uint8).view(dtype)
    if dtype != torch.bool
    else torch.tensor([True, False])
    for name, dtype in DTYPES.items()
}


def zipped(state: Mapping[str, Any], **options: Any) -> Build:
    """What torch.save writes of it; the state is also what must be read, unless `reads` says otherwise."""
    reads = options.pop("reads", state)
    return lambda d: (save_zip(dict(state), d / "x.ckpt", **options), reads)


def streamed(state: Mapping[str, Any], **options: Any) -> Build:
    """What torch wrote before 1.6."""
    reads = options.pop("reads", state)
    return lambda d: (save_stream(dict(state), d / "x.ckpt", **options), reads)


def beside(make: Callable[[], Any], *classes: str) -> Build:
    """Weights beside something that is none; `classes` are pretended to be installed, and given to `make`."""

    def build(directory: Path) -> Made:
        with pretended(*classes) as kinds:
            other = make(*kinds)
            return save_zip({"state_dict": ONE, "other": other, "more": [other, (other,)]}, directory / "x.ckpt"), ONE

    return build


def bytes_of(data: bytes, reads: Mapping[str, Tensor] = ZEROS, name: str = "x.ckpt") -> Build:
    """These bytes."""

    def build(directory: Path) -> Made:
        (directory / name).write_bytes(data)
        return directory / name, reads

    return build


def by_lightning(numpy: str, save: Callable[..., Path], protocol: int) -> Build:
    """What Lightning wrote, with numpy's names of before or after 2.0."""

    def build(directory: Path) -> Made:
        with lightning(ONE, numpy) as contents:
            return save(contents, directory / "x.ckpt", pickle_protocol=protocol), ONE

    return build


def filled(kind: type, **attributes: Any) -> Any:
    """An object of this class with these attributes."""
    made = kind()
    made.__dict__.update(attributes)
    return made


def parameter_dict(directory: Path) -> Made:
    """What old textual inversions hold: a ParameterDict whose parameters are in its attributes."""
    with pretended("torch.nn.modules.container.ParameterDict") as (kind,):
        made = filled(kind, _parameters={"*": torch.nn.Parameter(torch.arange(3.0))})
        return save_zip({"string_to_param": made}, directory / "x.pt"), {"string_to_param.*": torch.arange(3.0)}


def linear(directory: Path) -> Made:
    state = torch.nn.Linear(2, 2).state_dict()  # carries _metadata
    return save_zip(state, directory / "x.ckpt"), state


def through_a_pipe(directory: Path) -> Made:
    """A zip written where one cannot go back: every size follows its data."""

    class Pipe(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            return file.write(data)

    with (directory / "x.ckpt").open("wb") as file, zipfile.ZipFile(Pipe(), "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled({"w": tensor()}))
        archive.writestr("archive/data/0", bytes(24))
    return directory / "x.ckpt", ZEROS


def linked(directory: Path) -> Made:
    save_safetensors(ONE, directory / "blob")
    (directory / "x.safetensors").symlink_to("blob")
    return directory / "x.safetensors", ONE


def safe(state: Mapping[str, Tensor], name: str = "x.safetensors", metadata: Mapping[str, str] | None = None) -> Build:
    """What the safetensors library writes."""
    return lambda d: (
        save_safetensors(
            {key: value.detach().contiguous().clone() for key, value in state.items()}, d / name, metadata
        ),
        state,
    )


def header(text: str | bytes, data: bytes = bytes(24), reads: Mapping[str, Tensor] = ZEROS) -> Build:
    """A safetensors file with this header, letter by letter."""
    return bytes_of(
        safetensors_of(None, data, raw=text if isinstance(text, bytes) else text.encode()), reads, "x.safetensors"
    )


def operations(code: bytes) -> Build:
    """A dictionary with the six zeros, `w`, then what `code` adds; in protocol 4."""
    return bytes_of(ckpt_of(b"\x80\x04}(" + raw("w") + raw(tensor()) + code + b"u."))


TEXT = json.dumps({"w": ENTRY})
AT = struct.pack
SOUND: dict[str, Build] = {
    # torch files, as torch writes them
    **{f"zip, protocol {n}": zipped(ODD, pickle_protocol=n) for n in (2, 3, 4, 5)},
    **{f"stream, protocol {n}": streamed(ODD, pickle_protocol=n) for n in (2, 3, 4, 5)},
    "zip, every type": zipped(TYPES),
    "stream, every type": streamed(TYPES),
    "under state_dict": zipped({"state_dict": ODD, "epoch": 1}, reads=ODD),
    "under module": streamed({"module": ODD, "loss": 0.5}, reads=ODD),
    "under model": zipped({"model": ODD}, reads=ODD),
    "under model.state_dict": zipped({"model": {"state_dict": ODD},
            "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, reads=ODD),
    "dictionaries in dictionaries": zipped({"a": {"b": {"c": torch.ones(2)}}}, reads={"a.b.c": torch.ones(2)}),
    "a state dict with attributes": linear,
    "a parameter dictionary": parameter_dict,
    "a tensor alone": lambda d: (save_zip(torch.ones(2, 3), d / "x.pt"), {"tensor": torch.ones(2, 3)}),
    "one tensor by two names": zipped({"a": BASE, "b": BASE}),
    "a named safetensors by mistake, as .bin": lambda d: (save_zip(ONE, d / "model.safetensors.bin"), ONE),
    "no extension": lambda d: (save_stream(ONE, d / "model"), ONE),
    # bookkeeping beside the weights
    **{f"Lightning, {numpy}, protocol {n}": by_lightning(numpy, save_zip, n) for numpy in ("numpy.core", "numpy._core")
        for n in (2, 4)},
    "Lightning, as a stream": by_lightning("numpy.core", save_stream, 2),
    "pathlib": beside(lambda: [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("a"), pathlib.Path("c")]),
    "datetime": beside(lambda: [datetime.datetime(2022, 8, 22, tzinfo=datetime.UTC), datetime.date(2022, 8, 22),
            datetime.timedelta(1), datetime.time(1)]),
    "collections": beside(lambda: [collections.defaultdict(list, {1: [2]}), collections.Counter("abc"),
            collections.deque([1])]),
    "numpy": beside(lambda: [np.arange(3.0), np.float64(1), np.int32(2), np.dtype("float16"),
            np.zeros((2, 2), order="F"), np.array(["a"]), np.bool_(True)]),
    "numpy arrays of protocol 5": lambda d: (save_zip({"state_dict": ONE, "a": np.arange(3.0), "b": np.float32(1)},
            d / "x.ckpt", pickle_protocol=5), ONE),
    "argparse": beside(lambda: argparse.Namespace(lr=1e-4, betas=(0.9, 0.999), path=pathlib.PurePosixPath("a"))),
    "sets, bytes and complex numbers": beside(lambda: [{1, 2}, frozenset("ab"), b"\x80", bytearray(b"abc"), 1j, set,
            dict, 2**70, -(2**70), float("nan")]),
    "torch's small objects": beside(lambda: [torch.Size([1, 2]), torch.device("cuda:0"), torch.float32, torch.bfloat16,
            torch.float8_e4m3fn]),
    "omegaconf": beside(
        lambda a, b, c: [filled(a, _content={"x": filled(c, _val=1)}), filled(b, _content=[])],
        "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode"
    ),
    "callbacks by class": beside(lambda a, b: {a: {"best": torch.tensor(0.1)}, b: None},
        "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint", "pytorch_lightning.callbacks.timer.Timer"),
    "optimiser states": zipped({"state_dict": ONE,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"params": [0]}]}]},
            reads=ONE),
    "keys that are no text": zipped({"state_dict": ONE, "other": {1: 2, (3, 4): 5, None: 6, 7.5: 8}}, reads=ONE),
    # torch files made by hand
    "storage with a long key": bytes_of(ckpt_of({"w": tensor(storage("94636927734928"))},
            {"data/94636927734928": bytes(24)})),
    "storage saved from a GPU": bytes_of(ckpt_of({"w": tensor(Persistent("storage", FLOAT, "0", "cuda:7", 6))})),
    "storage with a view of nothing": bytes_of(ckpt_of({"w": tensor(Persistent("storage", FLOAT, "0", "cpu", 6,
            None))})),
    "tensor of torch 0.3": bytes_of(ckpt_of({"w": Call(Name("torch._utils", "_rebuild_tensor"), storage(), 0, (2, 3),
            (3, 1))})),
    "tensor with no hooks at all": bytes_of(ckpt_of({"w": tensor(hooks=None)})),
    "tensor with metadata of nothing": bytes_of(ckpt_of({"w": tensor(storage(), 0, (2, 3), (3, 1), HOOKS, {})})),
    "float8 in bytes": bytes_of(ckpt_of({"w": Call(TYPED, BYTES, 8, (2, 4), (8, 1), False, HOOKS, FLOAT8)}),
        {"w": torch.zeros(2, 4).to(torch.float8_e4m3fn)}),
    "int16 in bytes": bytes_of(ckpt_of({"w": Call(TYPED, BYTES, 1, (11,), (1,), False, HOOKS, Name("torch", "int16"),
            None)}), {"w": torch.zeros(11, dtype=torch.int16)}),
    "ordered dictionary from pairs": bytes_of(ckpt_of(Call(Name("collections", "OrderedDict"),
            [["w", tensor()], ("n", 1)]))),
    "text of Python 2": bytes_of(ckpt_of(b"\x80\x02}(U\x01w" + raw(tensor()) + b"T\x01\0\0\0nI5\nu.")),
    "numbers in lines": bytes_of(ckpt_of(b"\x80\x02}(" + raw("w") + raw(tensor()) + raw("n")
        + b"(I01\nI-7\nL12345678901234567890L\nF1.5\ntu.")),
    "memo in three sizes": operations(raw("n") + b"q\x05p300\nr\xff\xff\xff\x7f" + b"h\x05" + raw("m") + b"g300\n"
        + raw("o") + b"j\xff\xff\xff\x7f"),
    "marks dropped and values doubled": operations(b"(NN1" + raw("n") + b"2" + b"0" + b"]2a"),
    "frames": bytes_of(ckpt_of(b"\x80\x04\x95" + AT("<Q", 1) + b"}" + b"\x95" + AT("<Q",
            len(raw({"w": tensor()})[1:]) + 1) + raw({"w": tensor()})[1:] + b".")),
    "doubling tuples": operations(raw("x") + b"N" + b"2\x86" * 100),
    "doubling tuples as a key": operations(raw("x") + b"}(N" + b"2\x86" * 100 + b"K\x01u"),
    "lists 100000 deep": operations(raw("x") + b"]" * 100_000 + b"a" * 99_999),
    "a list that holds itself": operations(raw("x") + b"]2a"),
    "a dictionary that holds itself": operations(raw("x") + b"}q\x00X\x01\0\0\0ah\x00s"),
    "sets and frozen sets of protocol 4": operations(raw("x") + b"\x8f(K\x01\x90" + raw("y") + b"(K\x01\x91"),
    "an object made with keywords": operations(raw("x") + b"cargparse\nNamespace\n)}" + raw("a") + b"K\x01s\x92"),
    "a name of half a pair of surrogates": bytes_of(
        ckpt_of(b"\x80\x02}(X\x03\0\0\0\xed\xa0\x80" + raw(tensor()) + b"u."), {"\ud800": torch.zeros(2, 3)}),
    "a name of control characters": bytes_of(ckpt_of({"\x1b[2J\u202e\n": tensor()}),
        {"\x1b[2J\u202e\n": torch.zeros(2, 3)}),
    "no name": bytes_of(ckpt_of({"": tensor()}), {"": torch.zeros(2, 3)}),
    "a name of 10000 letters": bytes_of(ckpt_of({"n" * 10_000: tensor()}), {"n" * 10_000: torch.zeros(2, 3)}),
    "a zip written into a pipe": through_a_pipe,
    "a zip with wide end records": bytes_of(zip64_of()),
    "a zip with another top folder": bytes_of(zip_of({"data.pkl": pickled({"w": tensor()}), "data/0": bytes(24)},
            top="my m\u00f6del v1.0/")),
    "a zip with nothing but what is needed": bytes_of(zip_of({"data/0": bytes(24),
            "data.pkl": pickled({"w": tensor()})})),
    "a zip with all that torch adds": bytes_of(ckpt_of({"w": tensor()}, byteorder=b"little",
            **{".format_version": b"1", ".storage_alignment": b"64", ".data/serialization_id": b"0123"})),
    "a zip in capitals": bytes_of(PLAIN_ZIP, name="X.CKPT"),
    "a stream by hand": bytes_of(stream_of()),
    # safetensors
    "safetensors, every type": safe(TYPES),
    "safetensors, odd shapes": safe(ODD),
    "safetensors with metadata": safe(ONE, metadata={"format": "pt", "modelspec.title": "\u00fc\n"}),
    "safetensors as .ckpt": safe(ONE, "x.ckpt"),
    "safetensors without extension": safe(ONE, "x"),
    "a link to a blob": linked,
    "rank 16": safe({"w": torch.ones([1] * 15 + [2])}),
    "empty, of 2^60 columns": header(json.dumps({"w": {"dtype": "F16", "shape": [0, 2**60], "data_offsets": [0, 0]}}),
        b"", {"w": torch.empty(0, 2**60, dtype=torch.float16)}),
    "empty at the start, between and at the end": safe({"a": torch.empty(0), "b": torch.ones(1), "c": torch.empty(3, 0),
            "d": torch.ones(2).half(), "e": torch.empty(0, dtype=torch.uint8)}),
    "escaped names": header(TEXT.replace('"w"', '"\\u0077"').replace("dtype", "\\u0064type")),
    "a name that looks like an entry": header(TEXT.replace('"w"', '"dtype"'), reads={"dtype": torch.zeros(2, 3)}),
    "an empty name": header(TEXT.replace('"w"', '""'), reads={"": torch.zeros(2, 3)}),
    "blanks and line ends": header("{\n" + TEXT[1:-1].replace(",", " ,\r\n\t") + " }   \n"),
    "metadata of nothing": header('{"__metadata__": {}, ' + TEXT[1:]),
    "metadata at the end": header(TEXT[:-1] + ', "__metadata__": {"a": "b"}}'),
    "tensors in another order than the header's": header(
        json.dumps({"b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
                "a": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}), b"\x07\x08\x09",
        {"a": torch.tensor(7, dtype=torch.uint8), "b": torch.tensor([8, 9], dtype=torch.uint8)},
    ),
    **{f"numbers {n} bytes off": header(TEXT + " " * ((n - 8 - len(TEXT)) % 8), struct.pack("<6f", *range(6)), ONE)
        for n in range(1, 8)},
}  # fmt: skip
