"""A mutation fuzzer for the readers: `python -m tests.made.fuzz --mutants 1000000 --seed 0 --jobs 2`.

Small sound files are damaged at random, opened, and every tensor read. Anything but success or a FileError is a fault;
it is printed with the command that repeats it. A mutant depends on the seed and its number alone."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import random
import resource
import struct
import tempfile
import time
import traceback
import unicodedata
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import safetensors.torch
import torch

from ldm.errors import FileError
from tests.made.checkpoints import lightning
from weights import open_file
from weights.files.folders import Folder, add_component

STEM = "diffusion_pytorch_model"
BOUNDARIES = (
    0,
    1,
    2,
    3,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
NUMBERS = (
    b"-1",
    b"0",
    b"1",
    b"2",
    b"255",
    b"65536",
    b"4294967296",
    b"9223372036854775807",
    b"9223372036854775808",
    b"1e400",
    b"1.0",
    b"true",
    b"null",
    b'"1"',
    b"[]",
    b"{}",
    b"NaN",
)
OPCODES = (
    bytes.fromhex("28293031324a4b4d4e515253555658555d616263656768696a6c6f707172737475767d80818283848586878889")
    + bytes(range(0x8A, 0x99))
    + b".FGILTBCP"
)


def tensors() -> dict[str, torch.Tensor]:
    """A few tensors of several types, some of them views of one storage."""
    base = torch.arange(12.0).reshape(3, 4)
    return {
        "a": base,
        "b.c": base.t(),
        "d": base[1],
        "e": torch.ones(2, dtype=torch.float16),
        "f": torch.tensor(7),
        "g": torch.empty(0, 3),
        "h": torch.tensor([True]),
    }


@cache
def seeds() -> dict[str, list[bytes]]:
    """Sound files by kind; a pickle stands for the zip around it, with its records."""
    state = tensors()
    plain = {key: value.contiguous().clone() for key, value in state.items()}
    one = {"w": torch.ones(2, 3)}
    zips, streams = [], []
    for contents, protocol in (
        (one, 2),
        (one, 4),
        (state, 2),
        ({"state_dict": state}, 5),
        ({"w": torch.ones(3, dtype=torch.float8_e5m2)}, 2),
    ):
        zips.append(_saved(contents, protocol))
        streams.append(_saved(contents, protocol, stream=True))
    with lightning(one) as contents:
        small = {key: contents[key] for key in ("epoch", "state_dict", "callbacks", "hparams", "config")}
        zips += [_saved(small, 2), _saved(small, 4)]
    safe = [
        safetensors.torch.save(one),
        safetensors.torch.save(plain),
        safetensors.torch.save(plain, {"format": "pt", "a": "b"}),
    ]
    index = json.dumps(
        {"metadata": {"total_size": 24}, "weight_map": {"w": f"{STEM}-1.safetensors", "v": f"{STEM}-2.safetensors"}}
    ).encode()
    return {"safetensors": safe, "zip": zips, "pickle": zips, "stream": streams, "index": [index]}


def _saved(contents: object, protocol: int, *, stream: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(OrderedDict(contents), buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not stream)
    return (
        buffer.getvalue() if stream else zip_of(*records_of(buffer.getvalue()))
    )  # without torch's padding: less to miss


# -- zips, so that a changed pickle comes with the right checksum and offsets ------------------------------------------


def zip_of(names: list[bytes], contents: list[bytes]) -> bytes:
    """A zip of stored entries, all of it consistent."""
    body, directory = b"", b""
    for name, data in zip(names, contents, strict=True):
        fields = struct.pack("<IIIHH", zlib.crc32(data), len(data), len(data), len(name), 0)
        directory += b"PK\x01\x02\0\0\0\0\0\0\0\0\0\0\0\0" + fields + bytes(10) + struct.pack("<I", len(body)) + name
        body += b"PK\x03\x04\0\0\0\0\0\0\0\0\0\0" + fields + name + data
    return (
        body
        + directory
        + b"PK\x05\x06\0\0\0\0"
        + struct.pack("<HHIIH", len(names), len(names), len(directory), len(body), 0)
    )


@cache
def records_of(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """Names and contents of the entries of a sound zip; torch writes the pickle first."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [name.encode() for name in archive.namelist()], [archive.read(name) for name in archive.namelist()]


# -- mutations ---------------------------------------------------------------------------------------------------------

Mutation = Callable[[random.Random, bytearray, bytes], None]  # of the data; the other file is there to be spliced in


def flip_bits(dice: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(dice.choice((1, 1, 1, 2, 5, 20))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def set_bytes(dice: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(dice.choice((1, 1, 2, 4))):
        data[dice.randrange(len(data))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))


def truncate(dice: random.Random, data: bytearray, other: bytes) -> None:
    del data[dice.randrange(len(data)) :]


def delete(dice: random.Random, data: bytearray, other: bytes) -> None:
    at = dice.randrange(len(data))
    del data[at : at + dice.choice((1, 2, 4, 8, dice.randrange(1, 100)))]


def insert(dice: random.Random, data: bytearray, other: bytes) -> None:
    at = dice.randrange(len(data) + 1)
    data[at:at] = dice.randbytes(dice.choice((1, 1, 2, 4, 8, 30)))


def duplicate(dice: random.Random, data: bytearray, other: bytes) -> None:
    at, to = dice.randrange(len(data)), dice.randrange(len(data) + 1)
    piece = data[at : at + dice.choice((1, 2, 4, 16, 64, len(data)))]
    data[to:to] = piece * dice.choice((1, 1, 1, 2, 30))


def splice(dice: random.Random, data: bytearray, other: bytes) -> None:
    at, theirs = dice.randrange(len(data)), dice.randrange(len(other))
    length = dice.choice((4, 16, 64, len(other)))
    if dice.random() < 0.5:
        del data[at : at + length]
    data[at:at] = other[theirs : theirs + length]


def set_number(dice: random.Random, data: bytearray, other: bytes) -> None:
    """A binary number of 1 to 8 bytes becomes one at a boundary, or is off by a little."""
    size = dice.choice((1, 2, 4, 8))
    at = dice.randrange(max(1, len(data) - size))
    if dice.random() < 0.5:
        value = dice.choice(BOUNDARIES)
    else:
        value = int.from_bytes(data[at : at + size], "little") + dice.choice((-2, -1, 1, 2, 8))
    data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def set_decimal(dice: random.Random, data: bytearray, other: bytes) -> None:
    """Digits of a text become another number, or something that is none."""
    places = [i for i in range(len(data)) if 48 <= data[i] < 58 and not (i and 48 <= data[i - 1] < 58)]
    if not places:
        return set_bytes(dice, data, other)
    at = end = dice.choice(places)
    while end < len(data) and 48 <= data[end] < 58:
        end += 1
    data[at:end] = dice.choice(NUMBERS)
    return None


def swap_opcode(dice: random.Random, data: bytearray, other: bytes) -> None:
    places = [i for i in range(len(data)) if data[i] in OPCODES]
    for _ in range(dice.choice((1, 1, 2, 3))):
        data[dice.choice(places) if places else 0] = dice.choice(OPCODES)


def insert_opcode(dice: random.Random, data: bytearray, other: bytes) -> None:
    at = dice.randrange(min(2, len(data)), len(data) + 1)
    data[at:at] = bytes(dice.choices(OPCODES, k=dice.choice((1, 1, 2, 5))))


GENERAL: tuple[Mutation, ...] = (flip_bits, set_bytes, truncate, delete, insert, duplicate, splice, set_number)
MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "safetensors": (*GENERAL, set_decimal, set_decimal, set_decimal),
    "zip": GENERAL,
    "pickle": (*GENERAL, swap_opcode, swap_opcode, insert_opcode, insert_opcode, set_decimal),
    "stream": (*GENERAL, swap_opcode, insert_opcode, set_decimal),
    "index": (*GENERAL, set_decimal),
}
KINDS = tuple(MUTATIONS)


def mutant(seed: int, number: int) -> tuple[str, bytes]:
    """The kind and the bytes of one mutant."""
    dice = random.Random(f"{seed}:{number}")
    kind = KINDS[number % len(KINDS)]
    base, other = dice.choice(seeds()[kind]), dice.choice(seeds()[kind])
    if kind == "pickle":
        names, contents = records_of(base)
        changed = [bytes(_mutated(dice, kind, contents[0], records_of(other)[1][0])), *contents[1:]]
        if dice.random() < 0.1:  # the storages too
            at = dice.randrange(len(changed))
            changed[at] = changed[at][: dice.randrange(len(changed[at]) + 1)] + bytes(dice.choice((0, 0, 1, 4)))
        return kind, zip_of(names, changed)
    return kind, bytes(_mutated(dice, kind, base, other))


def _mutated(dice: random.Random, kind: str, base: bytes, other: bytes) -> bytearray:
    data = bytearray(base)
    header = kind == "safetensors" and dice.random() < 0.8  # the length before it is made to fit again
    length = int.from_bytes(base[:8], "little") if header else 0
    tail = data[8 + length :] if header else bytearray()
    data = data[8 : 8 + length] if header else data
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        if data:
            dice.choice(MUTATIONS[kind])(dice, data, other)
    return bytearray(len(data).to_bytes(8, "little") + data + tail if header else data)


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of a number of mutants."""

    loaded: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)  # number of the mutant, what it raised
    slowest: tuple[float, int] = (0.0, -1)  # seconds of the processor, number of the mutant
    memory: int = 0  # KiB by which the process grew

    def add(self, other: Report) -> None:
        """Take in the report on other mutants."""
        self.loaded.update(other.loaded)
        self.refused.update(other.refused)
        self.faults += other.faults
        self.slowest, self.memory = max(self.slowest, other.slowest), max(self.memory, other.memory)


def read_all(kind: str, data: bytes, directory: Path) -> None:
    """Open a mutant and read all of its tensors. Raises what the readers raise, and AssertionError where a tensor is
    not what was announced."""
    if kind == "index":
        (directory / f"{STEM}.safetensors.index.json").write_bytes(data)
        with Folder(directory) as folder:
            add_component(folder, directory, (STEM, STEM), "")
            for key in folder:
                folder[key].sum()
        return
    path = directory / "x"
    path.write_bytes(data)
    with open_file(path) as file:
        for key, spec in file.specs.items():
            value = file[key]
            assert (value.dtype, tuple(value.shape)) == (spec.dtype, spec.shape)
            if value.numel():
                value.reshape(-1).view(torch.uint8).sum()  # touches every byte


def run(seed: int, numbers: range) -> Report:
    """Read these mutants one after the other."""
    report = Report()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        directory = Path(name)
        for i in (1, 2):
            (directory / f"{STEM}-{i}.safetensors").write_bytes(safetensors.torch.save({"wv"[i - 1]: torch.ones(3)}))
        for number in numbers:
            kind, data = mutant(seed, number)
            start = time.process_time()
            try:
                read_all(kind, data, directory)
                report.loaded[kind] += 1
            except FileError as error:
                report.refused[kind] += 1
                if len(str(error)) > 200 or {unicodedata.category(c) for c in str(error)} & {
                    "Cc",
                    "Cf",
                    "Cs",
                    "Zl",
                    "Zp",
                }:
                    report.faults.append((number, f"an unseemly message: {str(error)!r}"))
            except Exception:  # the point of the exercise
                report.faults.append((number, traceback.format_exc(limit=-2)))
            report.slowest = max(report.slowest, (time.process_time() - start, number))
    report.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return report


def _run(task: tuple[int, range]) -> Report:
    return run(*task)


def main(line: list[str] | None = None) -> int:
    """Read the arguments, run, and say what was found; 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first mutant; with --mutants 1 it repeats one"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args(line)
    end, step = arguments.first + arguments.mutants, 5000
    tasks = [(arguments.seed, range(at, min(at + step, end))) for at in range(arguments.first, end, step)]
    total, start = Report(), time.monotonic()
    with contextlib.ExitStack() as stack:
        if arguments.jobs > 1:
            pool = stack.enter_context(
                multiprocessing.get_context("spawn").Pool(arguments.jobs, torch.set_num_threads, (1,))
            )
        for i, part in enumerate(pool.imap_unordered(_run, tasks) if arguments.jobs > 1 else map(_run, tasks), 1):
            total.add(part)
            for number, what in part.faults:
                print(
                    f"FAULT: python -m tests.made.fuzz --seed {arguments.seed} --first {number} --mutants 1\n{what}",
                    flush=True,
                )
            if i % 20 == 0 or i == len(tasks):
                seconds = time.monotonic() - start
                done = min(i * step, arguments.mutants)
                print(
                    f"{done} mutants in {seconds:.0f} s ({done / seconds:.0f}/s), {len(total.faults)} faults",
                    flush=True,
                )
    for kind in KINDS:
        count = total.loaded[kind] + total.refused[kind]
        print(f"{kind:12} {count:8} mutants, {total.loaded[kind] / max(count, 1):6.1%} loaded")
    print(
        f"slowest {total.slowest[0] * 1000:.0f} ms (number {total.slowest[1]}); memory grew by at most "
        f"{total.memory // 1024} MiB"
    )
    return 1 if total.faults else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
