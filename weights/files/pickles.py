"""Reads the pickle of a checkpoint without resolving or running anything named in it.

A pickle is a program for a small stack machine. This machine knows lists, dictionaries, numbers, text and, by exact
(module, name) pairs, the few functions that describe a tensor; our own code in rebuild.py carries those out. A name of
training bookkeeping gives an `Inert`, which stands for the object and keeps nothing of it. Any other name is an error
that quotes it. No name is ever looked up.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ldm.errors import FileError
from weights.files.rebuild import (
    CONTAINER_WORK,
    FROZEN_SET,
    NAMED,
    SET,
    Builder,
    Inert,
    InertType,
    ParameterDict,
    Storage,
    StorageType,
)

MAX_BYTES = 64 * 2**20  # of one pickle
MAX_OPERATIONS = 1_000_000  # a full SDXL training checkpoint has about 300,000
MAX_MARKS = 200  # open at a time: nesting
MAX_INT_BYTES = 1024  # of one integer; the widest that torch writes has 10
REMEDY = "use a .safetensors of this model"


class Machine:
    """Runs one pickle from `data[start:]`. `error` makes the errors; storages are collected in `storages` by key."""

    def __init__(self, data: bytes, start: int, error: Callable[..., FileError], storages: dict[str, Storage]):
        self.data, self.at, self.error, self.storages = data, start, error, storages
        self.left = MAX_OPERATIONS
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack where a MARK was set
        self.memo: dict[int, Any] = {}
        self.frame_end: int | None = None

    def run(self) -> Any:
        """The object the pickle describes; `self.at` is then just after its last byte."""
        if self.take(1) != b"\x80" or not 2 <= self.take(1)[0] <= 5:
            raise self.error("its pickle is not of protocol 2 to 5; save it again with a current torch")
        data, end = self.data, len(self.data)
        while True:
            if self.left <= 0:
                self.spend(1)
            self.left -= 1
            if self.frame_end is not None and self.at >= self.frame_end:
                if self.at > self.frame_end:
                    raise self.bad("a frame of a wrong length")
                self.frame_end = None
            code = data[self.at] if self.at < end else self.take(1)[0]
            self.at += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.marks or (self.frame_end is not None and self.at != self.frame_end):
                    raise self.bad("leftovers at its end")
                return self.stack[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self.bad(f"operation 0x{code:02x}, which torch does not write")
            operation(self)

    def spend(self, work: int) -> None:
        """Count work that a few bytes can ask for again and again."""
        self.left -= work
        if self.left < 0:
            raise self.error(
                f"its pickle has more than {MAX_OPERATIONS} operations, far more than weights need; {REMEDY}"
            )

    def bad(self, what: str, key: str | None = None) -> FileError:
        """The error to raise about a pickle that is broken, or made to break readers."""
        return self.error(f"its pickle is damaged or made to mislead: {what}; {REMEDY}", key)

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise self.error("is truncated: its pickle ends too early; download it again")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise self.bad("a line that does not end")
        return self.take(end + 1 - self.at)[:-1]

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.bad("text that is not UTF-8") from None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def container(self, empty: list | dict) -> None:
        """Push a list or dictionary, which weighs more than other objects of one byte."""
        self.spend(CONTAINER_WORK)
        self.push(empty)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.bad("it takes from an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.bad("it looks at an empty stack")
        return self.stack[-1]

    def mark(self) -> None:
        if len(self.marks) >= MAX_MARKS:
            raise self.bad(f"objects nested more than {MAX_MARKS} deep")
        self.marks.append(len(self.stack))

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.bad("a missing mark")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise self.bad("it recalls what was never noted")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def decimal(self, raw: bytes) -> int:
        digits = raw.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > MAX_INT_BYTES:
            raise self.bad("a number that is none")
        return int(raw)

    def name(self, module: str, name: str) -> None:
        """Push what stands for module.name. This is where every name in a file ends: in a table, or in an error."""
        if (module, name) not in NAMED:
            full = f"{module}.{name}"
            shown = full if len(full) <= 60 else f"{full[:57]}..."
            raise self.error(f"refers to {shown}, which is code, not weights; {REMEDY}")
        self.push(NAMED[module, name])

    def reduce(self) -> None:
        """Call a function, or make an object of a type."""
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise self.bad("a call without arguments")
        if type(function) not in (Builder, InertType):
            raise self.bad("it calls what is not a function")
        self.push(function.make(self, arguments) if type(function) is Builder else function.instance)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is ParameterDict:
            parameters = state.get("_parameters") if type(state) is dict else None
            if type(parameters) is dict:
                self.fill(target, list(parameters), list(parameters.values()))
        elif type(target) not in (Inert, dict):  # a state dict has attributes too (_metadata): not weights
            raise self.bad("it sets attributes of what has none")

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Inert:
            raise self.bad("it adds to what is not a list")

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise self.bad("a key without a value")
        target = self.top()
        if type(target) in (dict, ParameterDict):
            self.fill(target, items[::2], items[1::2])
        elif type(target) is not Inert:
            raise self.bad("it sets keys of what is not a dictionary")

    def fill(self, target: dict[str, Any], keys: list[Any], values: list[Any]) -> None:
        """Put values under keys that are text. Others cannot name a tensor: they are left out and never hashed."""
        self.spend(len(keys))
        for key, value in zip(keys, values, strict=True):
            if type(key) is str:
                if key in target:
                    raise self.bad(f"the key {key} appears twice", key)
                target[key] = value

    def persistent(self, identity: Any) -> None:
        """('storage', type, key, location, numel[, view]): numbers that are stored elsewhere in the file."""
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[5:] not in ((), (None,)):
            raise self.bad("a reference to something other than a storage")
        kind, stored, key, location, numel = identity[:5]
        if type(kind) is not str or kind != "storage":
            raise self.bad("a reference to something other than a storage")
        if type(stored) is not StorageType or type(location) is not str or type(numel) is not int or numel < 0:
            raise self.bad("a storage without type or size")
        if type(key) is not str or not key.isascii() or not key.isdigit() or len(key) > 20:
            raise self.bad("a storage whose key is not a number")
        storage = Storage(key, stored.dtype, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise self.bad(f"storage {key} with two types or sizes")
        self.push(self.storages[key])


def _frame(m: Machine) -> None:
    length = m.number("<Q")
    if m.frame_end is not None or m.at + length > len(m.data):
        raise m.bad("a frame of a wrong length")
    m.frame_end = m.at + length


def _global(m: Machine) -> None:
    module, name = m.text(m.line()), m.text(m.line())
    m.name(module, name)


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if type(name) is not str or type(module) is not str:
        raise m.bad("a name that is not text")
    m.name(module, name)


def _instance(m: Machine) -> None:
    """INST, of protocol 0: a name that is called at once. torch writes its own names with other operations."""
    _global(m)
    raise m.bad("operation INST, which torch does not write")


def _new_object_with_keywords(m: Machine) -> None:
    keywords, arguments, kind = m.pop(), m.pop(), m.pop()
    if type(keywords) is not dict or type(arguments) is not tuple or type(kind) is not InertType:
        raise m.bad("a call with keywords")
    m.push(kind.instance)


def _long(m: Machine, size: int) -> None:
    if not 0 <= size <= MAX_INT_BYTES:
        raise m.bad("a number of absurd length")
    m.push(int.from_bytes(m.take(size), "little", signed=True))


def _float_line(m: Machine) -> None:
    try:
        m.push(float(m.line()))
    except ValueError:
        raise m.bad("a number that is none") from None


def _integer_line(m: Machine) -> None:
    raw = m.line()
    m.push({b"00": False, b"01": True}[raw] if raw in (b"00", b"01") else m.decimal(raw))


def _dict_from_mark(m: Machine) -> None:
    items = m.pop_mark()
    m.push({})
    m.set_items(items)


def _pop(m: Machine) -> None:
    """POP also takes back a MARK that lies on top."""
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


def _frozen_set(m: Machine) -> None:
    m.pop_mark()
    m.push(FROZEN_SET)


_OPERATIONS: dict[int, Callable[[Machine], object]] = {
    0x95: _frame,
    ord("("): Machine.mark, ord("0"): _pop, ord("1"): Machine.pop_mark, ord("2"): lambda m: m.push(m.top()),  # DUP
    ord("N"): lambda m: m.push(None), 0x88: lambda m: m.push(True), 0x89: lambda m: m.push(False),
    # numbers
    ord("I"): _integer_line, ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")), ord("M"): lambda m: m.push(m.number("<H")),
    ord("L"): lambda m: m.push(m.decimal(m.line().removesuffix(b"L"))),
    0x8A: lambda m: _long(m, m.number("<B")), 0x8B: lambda m: _long(m, m.number("<i")),  # LONG1, LONG4
    ord("F"): _float_line, ord("G"): lambda m: m.push(m.number(">d")),
    # text: first Python 2's
    ord("T"): lambda m: m.push(m.text(m.take(m.number("<I")))),
    ord("U"): lambda m: m.push(m.text(m.take(m.number("<B")))),
    ord("X"): lambda m: m.push(m.text(m.take(m.number("<I")))),
    0x8C: lambda m: m.push(m.text(m.take(m.number("<B")))),
    0x8D: lambda m: m.push(m.text(m.take(m.number("<Q")))),
    # bytes
    ord("B"): lambda m: m.push(m.take(m.number("<I"))), ord("C"): lambda m: m.push(m.take(m.number("<B"))),
    0x8E: lambda m: m.push(m.take(m.number("<Q"))), 0x96: lambda m: m.push(m.take(m.number("<Q"))),  # BYTEARRAY8
    # lists and tuples
    ord("]"): lambda m: m.container([]), ord("l"): lambda m: m.push(m.pop_mark()),
    ord("a"): lambda m: m.append([m.pop()]), ord("e"): lambda m: m.append(m.pop_mark()),
    ord(")"): lambda m: m.push(()), ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.push((m.pop(),)), 0x86: lambda m: m.push((m.pop(), m.pop())[::-1]),
    0x87: lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1]),
    # dictionaries and sets
    ord("}"): lambda m: m.container({}), ord("d"): _dict_from_mark,
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]), ord("u"): lambda m: m.set_items(m.pop_mark()),
    0x8F: lambda m: m.push(SET), 0x90: lambda m: m.append(m.pop_mark()), 0x91: _frozen_set,
    # the memo
    ord("g"): lambda m: m.get(m.decimal(m.line())), ord("p"): lambda m: m.put(m.decimal(m.line())),
    ord("h"): lambda m: m.get(m.number("<B")), ord("q"): lambda m: m.put(m.number("<B")),
    ord("j"): lambda m: m.get(m.number("<I")), ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    # names and what is made of them
    ord("c"): _global, 0x93: _stack_global, ord("i"): _instance,
    ord("R"): Machine.reduce, 0x81: Machine.reduce, 0x92: _new_object_with_keywords,
    ord("b"): Machine.build, ord("Q"): lambda m: m.persistent(m.pop()),
}  # fmt: skip
