"""Pickles that must be refused: code, gadgets, lies, damage and bombs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.made.checkpoints import FLOAT, HOOKS, REBUILD, Call, Name, Persistent, ckpt_of, pickled, storage, tensor

COMMAND = "touch canary"
TEXT = b"X\x0c\0\0\0touch canary"
CODE = "which is code, not weights"
PROGRAM = "__import__('os').system('touch canary')"
NESTED = ckpt_of(pickled(Call(Name("os", "system"), COMMAND)))
TYPED = Name("torch._utils", "_rebuild_tensor_v3")
FLOAT8 = Name("torch", "float8_e4m3fn")
BYTES = storage(kind=Name("torch.storage", "UntypedStorage"), numel=24)


def raw(value: Any) -> bytes:
    """The operations of a value, without the frame of a pickle."""
    return pickled(value)[2:-1]


def live(value: Any, protocol: int = 2) -> bytes:
    """A whole pickle; from protocol 4 on, a name with dots is an attribute of an attribute."""
    return bytes((0x80, protocol)) + raw(value) + b"."


def later(first: Any, code: Callable[[bytes], bytes]) -> bytes:
    """A pickle that notes the first value, then does what `code` does with its recall."""
    return b"\x80\x04" + raw(first) + b"q\x000" + code(b"h\x00") + b"."


# Each makes a file (or directory) `canary` when Python's own pickle reads it, where the extension 7 is registered for
# os.system.
LIVE = {
    "global and reduce": b"\x80\x02cposix\nsystem\n" + TEXT + b"\x85R.",
    "os instead of posix": b"\x80\x02cos\nsystem\n" + TEXT + b"\x85R.",
    "in protocol 0": b"cos\nsystem\n(Vtouch canary\ntR.",
    "subprocess": b"\x80\x02csubprocess\ngetoutput\n" + TEXT + b"\x85R.",
    "eval": b"\x80\x02c__builtin__\neval\nX-\0\0\0__import__('os').system('touch canary') or {}\x85R.",
    "getattr chain": b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\0\0\0os\x85RX\x06\0\0\0system\x86R"
    + TEXT
    + b"\x85R.",
    "INST": b"\x80\x02(" + TEXT + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + TEXT + b"o.",
    "OBJ then POP": b"\x80\x02(cos\nsystem\n" + TEXT + b"o0}.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93" + TEXT + b"\x85R.",
    "STACK_GLOBAL via memo": b"\x80\x04\x8c\x06system\x940\x8c\x02os\x940h\x01h\x00\x93" + TEXT + b"\x85R.",
    "dotted name": b"\x80\x04\x8c\x02os\x94\x8c\x0epath.os.system\x94\x93" + TEXT + b"\x85R.",
    "as dictionary key": b"\x80\x02}(cos\nsystem\n" + TEXT + b"\x85RK\x01u.",
    "then garbage": b"\x80\x02cos\nsystem\n" + TEXT + b"\x85R\xff\xff\xff",
    "then POP and honest contents": b"\x80\x02cos\nsystem\n" + TEXT + b"\x85R0}.",
    "NEWOBJ": b"\x80\x02cbuiltins\nset\ncbuiltins\nmap\n" + raw((Name("os", "system"), [COMMAND])) + b"\x81\x85R.",
    "NEWOBJ_EX": b"\x80\x04cbuiltins\nset\ncbuiltins\nmap\n" + raw((Name("os", "system"), [COMMAND])) + b"}\x92\x85R.",
    "popen": live(Call(Name("os", "popen"), COMMAND)),
    "spawn": live(Call(Name("os", "spawnlp"), 0, "touch", "touch", "canary")),
    "posix_spawn": live(Call(Name("os", "posix_spawnp"), "touch", ["touch", "canary"], {})),
    "pty": live(Call(Name("pty", "spawn"), ["touch", "canary"])),
    "exec": live(Call(Name("builtins", "exec"), PROGRAM)),
    "timeit": live(Call(Name("timeit", "timeit"), PROGRAM, "pass", Name("time", "perf_counter"), 1)),
    "profiler": live(Call(Name("cProfile", "run"), PROGRAM)),
    "runpy": live(Call(Name("runpy", "_run_code"), Call(Name("builtins", "compile"), PROGRAM, "x", "exec"), {})),
    "another profiler": live(Call(Name("profile", "run"), PROGRAM)),
    "file by open": live(Call(Name("io", "open"), "canary", "w")),
    "file by pathlib": live(Call(Name("pathlib", "Path.touch"), Call(Name("pathlib", "Path"), "canary")), 4),
    "file by sqlite": live(Call(Name("sqlite3", "connect"), "canary")),
    "file by a logger": live(Call(Name("logging", "FileHandler"), "canary")),
    "a directory instead of a file": live(Call(Name("os", "mkdir"), "canary")),
    "gadget in torch": live(Call(Name("torch.utils.collect_env", "run"), COMMAND)),
    "nested file for torch": live(
        Call(
            Name("torch.storage", "_load_from_bytes"),
            Call(Name("_codecs", "encode"), NESTED.decode("latin-1"), "latin1"),
        )
    ),
    "gadget in numpy": live(Call(Name("numpy.testing._private.utils", "runstring"), PROGRAM, {})),
    "numpy's reader": live(Call(Name("numpy.f2py.crackfortran", "myeval"), f"exec({PROGRAM!r})")),
    "gadget in collections": later(
        Call(Name("collections", "_sys.modules.get"), "os"),
        lambda m: raw(Call(Name("operator", "methodcaller"), "system", COMMAND)) + m + b"\x85R",
    ),
    "attribute by operator": later(
        Call(Name("importlib", "import_module"), "os"),
        lambda m: raw(Call(Name("operator", "attrgetter"), "system")) + m + b"\x85R" + TEXT + b"\x85R",
    ),
    "partial": b"\x80\x02" + raw(Call(Name("functools", "partial"), Name("os", "system"), COMMAND)) + b")R.",
    "map that a set drains": live(
        Call(Name("builtins", "set"), Call(Name("builtins", "map"), Name("os", "system"), [COMMAND]))
    ),
    "extension registry": b"\x80\x02\x82\x07" + TEXT + b"\x85R.",
    "extension registry of 4 bytes": b"\x80\x02\x84\x07\0\0\0" + TEXT + b"\x85R.",
    "in a persistent id": b"\x80\x02" + raw(Call(Name("os", "system"), COMMAND)) + b"Q.",
    "in a tensor's shape": live(tensor(shape=(Call(Name("os", "system"), COMMAND), 3))),
    "in a tensor's hooks": live(tensor(hooks=Call(Name("os", "system"), COMMAND))),
    "in a storage's type": live({"w": tensor(storage(kind=Call(Name("os", "system"), COMMAND)))}),
    "state of an object": b"\x80\x02"
    + raw(Call(Name("argparse", "Namespace")))
    + raw({"a": Call(Name("os", "system"), COMMAND)})
    + b"b.",
}


FORBIDDEN = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
    ("__builtin__", "exec"), ("builtins", "getattr"), ("builtins", "__import__"), ("importlib", "import_module"),
    ("runpy", "run_path"), ("shutil", "rmtree"), ("webbrowser", "open"), ("antigravity", "x"),
    ("operator", "attrgetter"), ("functools", "partial"), ("types", "FunctionType"),
    # gadgets in packages that weights come from: no package is trusted as a whole
    ("torch", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "_utils._rebuild_tensor_v2"), ("torch.utils.cpp_extension", "load_inline"),
    ("torch.nn.modules.linear", "Linear"), ("torch.jit._serialization", "load"), ("torch", "FloatTensor"),
    ("torch", "os"), ("numpy", "load"), ("numpy.f2py.capi_maps", "getinit"), ("numpy.core.multiarray", "fromfile"),
    ("numpy", "memmap"), ("collections", "namedtuple"), ("_codecs", "decode"), ("_codecs", "lookup"),
    ("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("copyreg", "__newobj__"),
    ("copyreg", "add_extension"), ("pickle", "loads"), ("marshal", "loads"), ("ctypes", "CDLL"),
    ("socket", "create_connection"), ("urllib.request", "urlopen"), ("torch", "FloatStorage.from_file"),
    ("torch.storage", "TypedStorage"), ("torch", "ComplexFloatStorage"), ("torch", "QInt8Storage"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"), ("torch.fx._symbolic_trace", "Tracer"),
    ("torch._dynamo.guards", "GuardBuilder.get"), ("torch.distributed.rpc.internal", "_run_function"),
    ("numpy.core.multiarray", "_reconstruct.__globals__"), ("collections", "OrderedDict.fromkeys"),
    ("collections", "_sys.modules"), ("argparse", "_sys.exit"), ("datetime", "sys.modules"),
    ("omegaconf.base", "Container"), ("__main__", "Model"), ("OS", "SYSTEM"),
    ("torch", "Tensor"), ("builtins", "type"), ("builtins", "map"), ("builtins", "__build_class__"),
    ("pytorch_lightning.callbacks.model_checkpoint", "os"), ("pathlib", "os.system"),
    ("collections ", "OrderedDict"), ("", ""), ("a" * 100, "b" * 100),
]  # fmt: skip


DAMAGE = {
    "negative size": ({"w": tensor(shape=(-2, 3))}, "w has a negative size", "w"),
    "negative stride": ({"w": tensor(stride=(-3, 1))}, "w has a negative size", "w"),
    "negative offset": ({"w": tensor(offset=-1)}, "w has a negative size", "w"),
    "beyond its storage": ({"w": tensor(offset=1)}, "w reaches beyond its storage", "w"),
    "far beyond": ({"w": tensor(shape=(2**40, 2**40))}, "w reaches beyond its storage", "w"),
    "sizes that overflow 64 bits to nothing": ({"w": tensor(shape=(2**32, 2**32), stride=(0, 0))}, "w claims", "w"),
    "stride that overflows": ({"w": tensor(shape=(2, 1), stride=(2**64, 1))}, "w has an absurd", "w"),
    "stride 0 bomb": ({"w": tensor(shape=(10**6, 6), stride=(0, 1))}, "w claims 6000000 numbers and stores 6", "w"),
    "rank 17": ({"w": tensor(shape=(1,) * 17, stride=(1,) * 17)}, "w has 17 dimensions", "w"),
    "rank 100": ({"w": tensor(shape=(1,) * 100, stride=(1,) * 100)}, "absurd rank"),
    "more strides than sizes": ({"w": tensor(stride=(3, 1, 1))}, "w has 2 dimensions and 3 strides", "w"),
    "size that is a bool": ({"w": tensor(shape=(True, 3))}, "not made of whole numbers"),
    "size that is a float": ({"w": tensor(shape=(2.0, 3))}, "not made of whole numbers"),
    "shape that is a list": ({"w": tensor(shape=[2, 3])}, "without offset, shape or stride"),
    "tensor from no storage": ({"w": tensor("0")}, "without a storage"),
    "hooks": ({"w": tensor(hooks={"a": 1})}, "hooks, which are code"),
    "hooks of a parameter": (
        {"w": Call(Name("torch._utils", "_rebuild_parameter"), tensor(), True, {"a": 1})},
        "hooks, which are code",
    ),
    "conjugated": ({"w": tensor((storage()), 0, (2, 3), (3, 1), HOOKS, {"conj": True})}, "conjugated"),
    "storage of another size": ({"w": tensor(storage(numel=7))}, "24 bytes where 7 numbers"),
    "storage of negative size": ({"w": tensor(storage(numel=-6))}, "without type or size"),
    "storage without record": ({"w": tensor(storage("1"))}, "is missing"),
    "storage key that is a path": ({"w": tensor(storage("../0"))}, "not a number"),
    "storage of two types": (
        {"w": tensor(), "v": tensor(storage(kind=Name("torch", "IntStorage")))},
        "two types or sizes",
    ),
    "storage whose type is an object": ({"w": tensor(storage(kind=Name("torch", "device")))}, "without type or size"),
    "persistent id of another kind": ({"w": Persistent("module", 1)}, "other than a storage"),
    "persistent id that is code": ({"w": Persistent(Name("os", "system"), "x")}, CODE),
    "codec trick": ({"w": Call(Name("_codecs", "encode"), "abc", "rot13")}, "unusual encoding"),
    "call of a value": (b"\x80\x02K\x01)R.", "not a function"),
    "call of a dictionary": (b"\x80\x02})R.", "not a function"),
    "attributes of a tensor": (b"\x80\x02" + pickled(tensor())[2:-1] + b"}b.", "sets attributes"),
    "one key twice": (b"\x80\x02}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.", "the key a appears twice", "a"),
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
    "no tensors": ({"state_dict": {}}, "holds no tensors; save the model's state_dict() instead"),
    "offset that is text": ({"w": tensor(offset="0")}, "without offset, shape or stride"),
    "tensor of three arguments": ({"w": Call(REBUILD, storage(), 0, (2, 3))}, "wrong number of arguments"),
    "float8 without its type": ({"w": Call(TYPED, BYTES, 0, (6,), (1,), False, HOOKS)}, "without a type"),
    "float8 of a type that is text": (
        {"w": Call(TYPED, BYTES, 0, (6,), (1,), False, HOOKS, "torch.float8_e5m2")},
        "without a type",
    ),
    "float8 from a storage of float32": (
        {"w": Call(TYPED, storage(), 0, (6,), (1,), False, HOOKS, FLOAT8)},
        "without a storage of bytes",
    ),
    "float32 from a storage of bytes": ({"w": tensor(BYTES)}, "without a storage of numbers"),
    "float8 beyond its storage": (
        {"w": Call(TYPED, BYTES, 0, (25,), (1,), False, HOOKS, FLOAT8)},
        "w reaches beyond its storage of 24 numbers",
        "w",
    ),
    "int64 beyond a storage of bytes": (
        {"w": Call(TYPED, BYTES, 0, (4,), (1,), False, HOOKS, Name("torch", "int64"))},
        "w reaches beyond its storage of 3 numbers",
        "w",
    ),
    "a type of numbers as a storage's": ({"w": tensor(storage(kind=Name("torch", "float32")))}, "without type or size"),
    "storage of a size that is true": ({"w": tensor(storage(numel=True))}, "without type or size"),
    "storage of 2^62 numbers": ({"w": tensor(storage(numel=2**62))}, "24 bytes where 4611686018427387904 numbers"),
    "storage in a place that is no text": (
        {"w": tensor(Persistent("storage", FLOAT, "0", 0, 6))},
        "without type or size",
    ),
    "storage with a view": (
        {"w": tensor(Persistent("storage", FLOAT, "0", "cpu", 6, ("1", 0, 6)))},
        "other than a storage",
    ),
    "storage key in other digits": ({"w": tensor(storage("\u0660"))}, "not a number"),
    "storage key of 21 digits": ({"w": tensor(storage("0" * 21))}, "not a number"),
    "empty persistent id": ({"w": Persistent()}, "other than a storage"),
    "persistent id that is text": (b"\x80\x02X\x01\0\0\0aQ.", "other than a storage"),
    "persistent id of protocol 0": (b"\x80\x02P0\n.", "operation 0x50"),
    "empty tensor far beyond": ({"w": tensor(offset=7, shape=(0,), stride=(1,))}, "w reaches beyond its storage", "w"),
    "empty tensor of absurd sizes": ({"w": tensor(shape=(0, 2**63), stride=(1, 1))}, "w has an absurd size", "w"),
    "a parameter of a number": (
        {"w": Call(Name("torch._utils", "_rebuild_parameter"), 1, True, HOOKS)},
        "not a tensor",
    ),
    "a parameter dictionary with arguments": (
        {"w": Call(Name("torch.nn.modules.container", "ParameterDict"), 1)},
        "with arguments",
    ),
    "an ordered dictionary from a number": (
        {"w": Call(Name("collections", "OrderedDict"), 1)},
        "something else than pairs",
    ),
    "an ordered dictionary from triples": (
        {"w": Call(Name("collections", "OrderedDict"), [(1, 2, 3)])},
        "something else than pairs",
    ),
    "allowed name by INST": (b"\x80\x02(icollections\nOrderedDict\n.", "operation INST"),
    "allowed name by OBJ": (b"\x80\x02(ccollections\nOrderedDict\no.", "operation 0x6f"),
    "a name that is a number": (b"\x80\x04K\x01K\x02\x93.", "a name that is not text"),
    "a name that is not UTF-8": (b"\x80\x02cos\n\xff\n.", "not UTF-8"),
    "a name without end": (b"\x80\x02c" + b"a" * 5000, "a line that does not end"),
    "call without arguments": (b"\x80\x02ccollections\nOrderedDict\n}R.", "a call without arguments"),
    "call with keywords": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "a call with keywords"),
    "call of a tensor": (b"\x80\x02" + pickled(tensor())[2:-1] + b")R.", "not a function"),
    "adding to a number": (b"\x80\x02K\x01K\x02a.", "not a list"),
    "keys of a list": (b"\x80\x02]K\x01K\x02s.", "not a dictionary"),
    "attributes of a number": (b"\x80\x02K\x01}b.", "sets attributes"),
    "number in letters": (b"\x80\x02Iabc\n.", "a number that is none"),
    "number with underscores": (b"\x80\x02I1_0\n.", "a number that is none"),
    "number of 5000 digits": (b"\x80\x02L" + b"9" * 5000 + b"L\n.", "a line that does not end"),
    "float in letters": (b"\x80\x02Fabc\n.", "a number that is none"),
    "memo of a negative number": (b"\x80\x02g-1\n.", "never noted"),
    "noting nothing": (b"\x80\x02q\x00.", "empty stack"),
    "frame in a frame": (b"\x80\x04\x95\x0a" + bytes(7) + b"\x95\x01" + bytes(8) + b"}.", "frame"),
    "frame across the end of an operation": (b"\x80\x04\x95\x01" + bytes(7) + b"K\x01.", "frame"),
    "frame of nothing at the end": (b"\x80\x04}\x95" + bytes(8), "ends too early"),
    "protocol twice": (b"\x80\x02\x80\x02}.", "operation 0x80"),
    "unicode of protocol 0": (b"\x80\x02Va\n.", "operation 0x56"),
    "read-only buffer": (b"\x80\x05\x98.", "operation 0x98"),
    "bytes for a key of a long name": ({"k" * 5000: tensor(shape=(7,), stride=(1,))}, "kkk", "k" * 5000),
    "same key twice among others": (
        b"\x80\x02}(" + 2 * (pickled("ab")[2:-1] + b"K\x01") + b"u.",
        "the key ab appears twice",
        "ab",
    ),
    "a state dict that is a list": ({"state_dict": [1]}, "holds no tensors"),
    "a module": (Call(Name("argparse", "Namespace")), "holds argparse.Namespace"),
}


BOMBS = {
    "operations": b"\x80\x02" + b"N0" * 1_100_000 + b"}.",
    "memo": b"\x80\x04" + b"]\x94" * 600_000 + b".",
    "sets": b"\x80\x04" + b"\x8f" * 1_100_000 + b".",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "dictionary copied again and again": b"\x80\x02]("
    + b"NN\x86" * 20_000
    + b"eq\x00"
    + b"0ccollections\nOrderedDict\nq\x010"
    + b"h\x01h\x00\x85R0" * 20_000
    + b"}.",
}
