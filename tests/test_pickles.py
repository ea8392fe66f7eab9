"""No name in a pickle is resolved, no lie of a pickle is believed, and what trainers leave behind is no obstacle."""

from __future__ import annotations

import ast
import contextlib
import pickle
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from ldm.errors import FileError, LdmError
from tests.checkpoints import HOOKS, Call, Name, Persistent, ckpt_of, lightning, pickled, pretended, save_stream, save_zip, storage, tensor
from weights import open_file
from weights.allowed import INERT, STORAGES

ROOT = Path(__file__).parents[1]
COMMAND = "touch canary"
TEXT = b"X\x0c\0\0\0touch canary"
CODE = "which is code, not weights"


def refused(path: Path, data: bytes, *words: str) -> str:
    """The message with which these bytes are refused: quickly, naming the file, in one short line."""
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(LdmError) as caught:
        open_file(path)
    message = str(caught.value)
    assert time.process_time() - start < 10
    assert len(message) <= 200
    assert not message.endswith("...")  # the remedy comes last
    assert "\n" not in message
    assert path.name in message
    for word in words:
        assert word in message
    return message


# Each runs `touch canary` when Python's own pickle reads it.
LIVE = {
    "global and reduce": b"\x80\x02cposix\nsystem\n" + TEXT + b"\x85R.",
    "os instead of posix": b"\x80\x02cos\nsystem\n" + TEXT + b"\x85R.",
    "in protocol 0": b"cos\nsystem\n(Vtouch canary\ntR.",
    "subprocess": b"\x80\x02csubprocess\ngetoutput\n" + TEXT + b"\x85R.",
    "eval": b"\x80\x02c__builtin__\neval\nX-\0\0\0__import__('os').system('touch canary') or {}\x85R.",
    "getattr chain": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\0\0\0os\x85RX\x06\0\0\0system\x86R" + TEXT + b"\x85R.",
    "INST": b"\x80\x02(" + TEXT + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + TEXT + b"o.",
    "OBJ then POP": b"\x80\x02(cos\nsystem\n" + TEXT + b"o0}.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93" + TEXT + b"\x85R.",
    "STACK_GLOBAL via memo": b"\x80\x04\x8c\x06system\x940\x8c\x02os\x940h\x01h\x00\x93" + TEXT + b"\x85R.",
    "dotted name": b"\x80\x04\x8c\x02os\x94\x8c\x0epath.os.system\x94\x93" + TEXT + b"\x85R.",
    "as dictionary key": b"\x80\x02}(cos\nsystem\n" + TEXT + b"\x85RK\x01u.",
    "then garbage": b"\x80\x02cos\nsystem\n" + TEXT + b"\x85R\xff\xff\xff",
    "then POP and honest contents": b"\x80\x02cos\nsystem\n" + TEXT + b"\x85R0}.",
}
@pytest.mark.parametrize("kind", LIVE)
def test_a_payload_is_refused_and_does_not_run(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path / "x.ckpt", ckpt_of(LIVE[kind]))
    honest = LIVE[kind].removesuffix(b".")
    refused(tmp_path / "y.ckpt", ckpt_of(b"\x80\x02}(" + b"X\x10\0\0\0optimizer_states" + honest[2:] + b"u."))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", LIVE)
def test_the_payloads_are_live(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(pickle.UnpicklingError) if kind == "then garbage" else contextlib.nullcontext():
        pickle.loads(LIVE[kind])
    assert (tmp_path / "canary").exists()


FORBIDDEN = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("__builtin__", "exec"),
    ("builtins", "getattr"), ("builtins", "__import__"), ("importlib", "import_module"), ("runpy", "run_path"), ("shutil", "rmtree"),
    ("webbrowser", "open"), ("antigravity", "x"), ("operator", "attrgetter"), ("functools", "partial"), ("types", "FunctionType"),
    # gadgets in packages that weights come from: no package is trusted as a whole
    ("torch", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_rebuild_meta_tensor_no_storage"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "_utils._rebuild_tensor_v2"), ("torch.utils.cpp_extension", "load_inline"), ("torch.nn.modules.linear", "Linear"),
    ("torch.jit._serialization", "load"), ("torch", "FloatTensor"), ("torch", "os"), ("numpy", "load"), ("numpy.f2py.capi_maps", "getinit"),
    ("numpy.core.multiarray", "fromfile"), ("numpy", "memmap"), ("collections", "namedtuple"), ("_codecs", "decode"), ("_codecs", "lookup"),
    ("pytorch_lightning.callbacks.model_checkpoint", "os"), ("pathlib", "os.system"), ("collections ", "OrderedDict"), ("", ""),
]  # fmt: skip


@pytest.mark.parametrize("pair", FORBIDDEN, ids=".".join)
def test_a_name_outside_the_list_is_refused_by_name(pair, tmp_path):
    before = set(sys.modules)
    message = refused(tmp_path / "x.ckpt", ckpt_of({"a": Name(*pair), "w": tensor()}), CODE)
    assert f"refers to {'.'.join(pair)}," in message
    assert set(sys.modules) == before


def test_no_listed_name_is_looked_up(tmp_path):
    """Modules that do not exist give placeholders: a machine that imported them would fail."""
    absent = [pair for pair in INERT if pair[0].partition(".")[0] in ("pytorch_lightning", "omegaconf", "lightning", "lightning_fabric")]
    assert len(absent) > 10
    before = set(sys.modules)
    path = tmp_path / "x.ckpt"
    path.write_bytes(ckpt_of({"w": tensor(), **{f"x{i}": Call(Name(*pair), 1) for i, pair in enumerate(absent)}}))
    assert list(open_file(path)) == ["w"]
    assert set(sys.modules) == before


def test_the_package_has_no_way_to_run_a_pickle():
    pattern = re.compile(r"pickle\.(load|Unpickler)|torch\.load\(|yaml\.load|\beval\(|\bexec\(|import_module|__import__")
    for package in ("weights", "ldm", "samplers"):
        for path in (ROOT / package).rglob("*.py"):
            code = path.read_text().replace(".eval()", "")
            assert not pattern.search(code), path
            if package == "weights":
                imported = {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}
                assert not imported & {"pickle", "importlib", "marshal", "shelve", "dill"} or path.name == "write.py", path


DAMAGE = {
    "negative size": ({"w": tensor(shape=(-2, 3))}, "w has a negative size"),
    "negative stride": ({"w": tensor(stride=(-3, 1))}, "w has a negative size"),
    "negative offset": ({"w": tensor(offset=-1)}, "w has a negative size"),
    "beyond its storage": ({"w": tensor(offset=1)}, "w reaches beyond its storage"),
    "far beyond": ({"w": tensor(shape=(2**40, 2**40))}, "w reaches beyond its storage"),
    "sizes that overflow 64 bits to nothing": ({"w": tensor(shape=(2**32, 2**32), stride=(0, 0))}, "w claims"),
    "stride that overflows": ({"w": tensor(shape=(2, 1), stride=(2**64, 1))}, "absurd"),
    "stride 0 bomb": ({"w": tensor(shape=(10**6, 6), stride=(0, 1))}, "w claims 6000000 numbers and stores 6"),
    "rank 17": ({"w": tensor(shape=(1,) * 17, stride=(1,) * 17)}, "w has 17 dimensions"),
    "rank 100": ({"w": tensor(shape=(1,) * 100, stride=(1,) * 100)}, "absurd rank"),
    "more strides than sizes": ({"w": tensor(stride=(3, 1, 1))}, "w has 2 dimensions and 3 strides"),
    "size that is a bool": ({"w": tensor(shape=(True, 3))}, "not made of whole numbers"),
    "size that is a float": ({"w": tensor(shape=(2.0, 3))}, "not made of whole numbers"),
    "shape that is a list": ({"w": tensor(shape=[2, 3])}, "without offset, shape or stride"),
    "tensor from no storage": ({"w": tensor("0")}, "without a storage"),
    "hooks": ({"w": tensor(hooks={"a": 1})}, "hooks, which are code"),
    "hooks of a parameter": ({"w": Call(Name("torch._utils", "_rebuild_parameter"), tensor(), True, {"a": 1})}, "hooks, which are code"),
    "conjugated": ({"w": tensor((storage()), 0, (2, 3), (3, 1), HOOKS, {"conj": True})}, "conjugated"),
    "storage of another size": ({"w": tensor(storage(numel=7))}, "24 bytes where 7 numbers"),
    "storage of negative size": ({"w": tensor(storage(numel=-6))}, "without type or size"),
    "storage without record": ({"w": tensor(storage("1"))}, "is missing"),
    "storage key that is a path": ({"w": tensor(storage("../0"))}, "not a number"),
    "storage of two types": ({"w": tensor(), "v": tensor(storage(kind=Name("torch", "IntStorage")))}, "two types or sizes"),
    "storage whose type is an object": ({"w": tensor(storage(kind=Name("torch", "device")))}, "without type or size"),
    "persistent id of another kind": ({"w": Persistent("module", 1)}, "other than a storage"),
    "persistent id that is code": ({"w": Persistent(Name("os", "system"), "x")}, CODE),
    "codec trick": ({"w": Call(Name("_codecs", "encode"), "abc", "rot13")}, "unusual encoding"),
    "call of a value": (b"\x80\x02K\x01)R.", "not a function"),
    "call of a dictionary": (b"\x80\x02})R.", "not a function"),
    "attributes of a tensor": (b"\x80\x02" + pickled(tensor())[2:-1] + b"}b.", "sets attributes"),
    "one key twice": (b"\x80\x02}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.", "appears twice"),
    "key without value": (b"\x80\x02}(X\x01\0\0\0au.", "a key without a value"),
    "empty stack": (b"\x80\x020.", "empty stack"),
    "reach below a mark": (b"\x80\x02K\x01(\x85.", "empty stack"),
    "missing mark": (b"\x80\x02t.", "missing mark"),
    "memo never noted": (b"\x80\x02h\x05.", "never noted"),
    "leftovers": (b"\x80\x02}K\x01.", "leftovers"),
    "open mark": (b"\x80\x02}(.", "leftovers"),
    "unknown operation": (b"\x80\x02\xff.", "operation 0xff"),
    "extension registry": (b"\x80\x02\x82\x01.", "operation 0x82"),
    "out-of-band buffer": (b"\x80\x05\x97.", "operation 0x97"),
    "protocol 0": (b"(dp0\n.", "protocol 2 to 5"),
    "protocol 9": (b"\x80\x09}.", "protocol 2 to 5"),
    "length beyond the end": (b"\x80\x02X\xff\xff\xff\xffabc.", "ends too early"),
    "length of 2^63": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "ends too early"),
    "frame beyond the end": (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "frame"),
    "frame too short": (b"\x80\x04\x95\x02" + bytes(7) + b"\x8c\x03abc.", "frame"),
    "number of 2 GB": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "absurd length"),
    "number of negative length": (b"\x80\x02\x8b\xff\xff\xff\xff.", "absurd length"),
    "text that is not UTF-8": (b"\x80\x02X\x02\0\0\0\xff\xfe.", "not UTF-8"),
    "no stop": (b"\x80\x02}", "ends too early"),
    "nothing": (b"", "ends too early"),
    "bytes after the end": (pickled({"w": 1}) + b"N", "bytes after the end"),
    "second pickle": (pickled({"w": 1}) + LIVE["global and reduce"], "bytes after the end"),
    "a list": ([1, 2], "holds list, not named tensors"),
    "a bare tensor": (tensor(shape=(1, 2, 3), stride=(6, 3, 1)), "without a name"),
    "no tensors": ({"state_dict": {}}, ""),
    "a module": (Call(Name("argparse", "Namespace")), "holds argparse.Namespace"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_lying_pickle_is_refused(kind, tmp_path):
    data, words = DAMAGE[kind]
    refused(tmp_path / "x.ckpt", ckpt_of(data), words)


BOMBS = {
    "operations": b"\x80\x02" + b"N0" * 2_000_000 + b"}.",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "dictionary copied again and again": b"\x80\x02](" + b"NN\x86" * 20_000 + b"eq\x00" + b"0ccollections\nOrderedDict\nq\x010" + b"h\x01h\x00\x85R0" * 20_000 + b"}.",
}
WEIGHT = pickled({"w": tensor()})[2:-1]
HARMLESS = {  # outside the weights: neither walked nor hashed, so they cost nothing
    "doubling tuples": b"N" + b"2\x86" * 100,
    "doubling tuples as a key": b"}(N" + b"2\x86" * 100 + b"K\x01u",
    "lists a million deep": b"]" * 100_000 + b"a" * 99_999,
    "list that holds itself": b"]2a",
    "dictionary that holds itself": b"}q\x00X\x01\0\0\0ah\x00s",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_quickly(kind, tmp_path):
    refused(tmp_path / "x.ckpt", ckpt_of(BOMBS[kind]))


@pytest.mark.parametrize("kind", HARMLESS)
def test_odd_structures_outside_the_weights_cost_nothing(kind, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(ckpt_of(b"\x80\x02}(X\n\0\0\0state_dict" + WEIGHT + b"X\x01\0\0\0x" + HARMLESS[kind] + b"u."))
    start = time.process_time()
    assert open_file(path)["w"].tolist() == [[0.0] * 3] * 2
    assert time.process_time() - start < 5


def test_dictionaries_that_fan_out_are_not_walked_for_ever(tmp_path):
    level: dict = {str(i): 1 for i in range(1000)}
    data = b"\x80\x02" + pickled(level)[2:-1] + b"q\x000"
    for n in range(3):
        data += b"}(" + b"".join(pickled(str(i))[2:-1] + b"h" + bytes([n]) for i in range(1000)) + b"uq" + bytes([n + 1]) + b"0"
    refused(tmp_path / "x.ckpt", ckpt_of(data + b"h\x03.", {}), "far more than a model needs")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("numpy", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("save", [save_zip, save_stream])
def test_training_bookkeeping_is_no_obstacle(save, numpy, protocol, tmp_path):
    state = {"w": torch.randn(2, 3), "p": torch.nn.Parameter(torch.randn(3).half())}
    with lightning(state, numpy) as contents:
        path = save(contents, tmp_path / "x.ckpt", pickle_protocol=protocol)
    with open_file(path) as file:
        assert set(file) == {"w", "p"}
        assert all(torch.equal(file[key], state[key]) for key in state)
        assert file.metadata["global_step"] == "470000"


def test_a_parameter_dictionary_is_read(tmp_path):
    """What old textual-inversion files hold."""
    with pretended("torch.nn.modules.container.ParameterDict") as (kind,):
        made = kind()
        made.__dict__["_parameters"] = {"*": torch.nn.Parameter(torch.arange(3.0))}
        path = save_zip({"string_to_param": made}, tmp_path / "x.pt")
    assert open_file(path)["string_to_param.*"].tolist() == [0, 1, 2]


def test_a_state_dict_keeps_its_tensors_though_it_has_attributes(tmp_path):
    state = torch.nn.Linear(2, 2).state_dict()  # carries _metadata
    with open_file(save_zip(state, tmp_path / "x.ckpt")) as file:
        assert all(torch.equal(file[key], state[key]) for key in state)


def test_every_storage_type_has_a_torch_type():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these types are old, as the files are
        assert all(getattr(torch, name).dtype == dtype for (_, name), dtype in STORAGES.items())


def test_an_error_says_what_to_do(tmp_path):
    message = refused(tmp_path / "model.ckpt", ckpt_of({"a": Call(Name("os", "system"), COMMAND)}))
    assert message.endswith("model.ckpt: refers to os.system, which is code, not weights; use a .safetensors of this model")
    assert issubclass(FileError, ValueError)
