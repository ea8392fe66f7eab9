"""torch.save files, zip and pre-1.6 stream -> named tensors, each with the place of its bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

from ldm.errors import FileError
from weights.files import zips
from weights.files.pickles import MAX_BYTES, REMEDY, Machine
from weights.files.rebuild import Inert, Storage, TensorRef
from weights.files.source import MAX_RANK, MAX_TENSORS, Contents, Record, Source, Spec, contiguous

MAX_FACT = 100_000  # characters of what is noted beside the tensors
MAX_EXPANSION = 4  # elements of a view per element of its storage
MAGIC = 0x1950A86A20F9469CFC6C  # opens the pre-1.6 stream
PROTOCOL = 1001

_NAME = re.compile(
    r"([^/\\]+)/"
    r"(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]{1,20})"
)
_WRAPPERS = ("state_dict", "module", "model")  # keys under which trainers put the tensors


def read_zip(source: Source) -> Contents:
    """The contents of a torch zip archive. Raises FileError for a zip that torch.save did not write."""
    entries = zips.entries(source)
    files: dict[str, zips.Entry] = {}
    tops = set()
    for name, entry in entries.items():
        match = _NAME.fullmatch(name)
        if match is None or match[1] in (".", ".."):
            if re.search(r"/(code/|constants\.pkl)", name):
                raise source.error("is a TorchScript program, not weights; save its state_dict() instead")
            raise source.error(
                f"is a zip with {name} in it, which is no part of a torch checkpoint; unpack it first", name
            )
        tops.add(match[1])
        files[match[2]] = entry
    if len(tops) != 1 or "data.pkl" not in files:
        raise source.damaged("is a zip, but not one that torch.save wrote: it has no data.pkl, or two top folders")
    if "byteorder" in files and zips.contents(source, files["byteorder"], 16).strip() != b"little":
        raise source.error("holds big-endian numbers; save it again on a little-endian machine")
    data = zips.contents(source, files["data.pkl"], MAX_BYTES)
    storages: dict[str, Storage] = {}
    machine = Machine(data, 0, source.error, storages)
    top = machine.run()
    if machine.at != len(data):
        raise source.error("has bytes after the end of its pickle; use a .safetensors of this model")
    records = {
        name.removeprefix("data/"): Record(e.start, e.size, e.crc)
        for name, e in files.items()
        if name.startswith("data/")
    }
    return _contents(source, top, storages, records)


def read_stream(source: Source) -> Contents:
    """The contents of a pre-1.6 torch.save stream: five pickles, then every storage as a count and its numbers."""
    data = source.read(0, min(source.size, MAX_BYTES))
    storages: dict[str, Storage] = {}
    at = 0

    def following() -> Any:
        nonlocal at
        machine = Machine(data, at, source.error, storages)
        value = machine.run()
        at = machine.at
        return value

    magic = following()
    if type(magic) is not int or magic != MAGIC:
        raise source.error("is a pickle, but not one that torch.save wrote; use a .safetensors of this model")
    protocol, system = following(), following()
    if type(protocol) is not int or protocol != PROTOCOL:
        raise source.error("is a torch stream of an unknown version; save it again with a current torch")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise source.error("holds big-endian numbers; save it again on a little-endian machine")
    top, keys = following(), following()
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
        raise source.damaged("lists other storages than its tensors use")
    records = {}
    for key in keys:
        (count,) = struct.unpack("<q", source.read(at, 8))
        if count != storages[key].numel:  # of bytes, where the storage has no type
            raise source.damaged(f"storage {key} has {count} numbers where its tensors expect {storages[key].numel}")
        size = storages[key].size
        at += 8
        if at + size > source.size:
            raise source.damaged(f"is truncated: {source.size} bytes, at least {at + size} are needed")
        records[key] = Record(at, size)
        at += size
    if at != source.size:
        raise source.damaged(f"has {source.size - at} extra bytes after the last tensor")
    return _contents(source, top, storages, records)


def _contents(source: Source, top: Any, storages: Mapping[str, Storage], records: Mapping[str, Record]) -> Contents:
    refs, facts = _named(source, top)
    for key in sorted(set(storages) ^ set(records), key=lambda key: key in records):  # the missing ones first
        raise source.damaged(f"storage {key} is {'missing' if key in storages else 'used by no tensor'}")
    for key, storage in storages.items():
        if storage.size != records[key].size:
            raise source.damaged(
                f"storage {key} has {records[key].size} bytes where {storage.numel} numbers are expected"
            )
    for ref in refs.values():
        records[ref.storage.key].users += 1
    return Contents({key: _checked(source, key, ref, records) for key, ref in refs.items()}, facts)


def _checked(source: Source, key: str, ref: TensorRef, records: Mapping[str, Record]) -> Spec:
    """The tensor, if it lies within its storage. All in Python's integers, which do not overflow."""
    capacity = ref.storage.size // ref.dtype.itemsize
    if len(ref.shape) > MAX_RANK or len(ref.shape) != len(ref.stride):
        raise source.damaged(f"{key} has {len(ref.shape)} dimensions and {len(ref.stride)} strides", key)
    if ref.offset < 0 or any(n < 0 for n in ref.shape) or any(n < 0 for n in ref.stride):
        raise source.damaged(f"{key} has a negative size, stride or offset", key)
    spec = Spec(ref.dtype, ref.shape, ref.stride, ref.offset, records[ref.storage.key])
    if any(n >= 2**63 for n in (*ref.stride, ref.offset)) or (not spec.numel and not spec.is_possible):
        raise source.damaged(f"{key} has an absurd size, stride or offset", key)
    last = ref.offset + sum((n - 1) * step for n, step in zip(ref.shape, ref.stride, strict=True))
    if (spec.numel and last >= capacity) or (not spec.numel and ref.offset > capacity):
        raise source.damaged(f"{key} reaches beyond its storage of {capacity} numbers", key)
    if spec.numel > MAX_EXPANSION * capacity:
        raise source.damaged(f"{key} claims {spec.numel} numbers and stores {capacity}", key)
    # A dimension of one never steps: torch writes any stride for it.
    normal = tuple(
        own if n != 1 else usual for n, own, usual in zip(ref.shape, ref.stride, contiguous(ref.shape), strict=True)
    )
    return Spec(spec.dtype, spec.shape, normal, spec.offset, spec.record)


def _named(source: Source, top: Any) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Tensors by name, nested names joined by dots, and the numbers and words beside the wrappers."""
    if type(top) is TensorRef:
        if len(top.shape) <= 2:  # old embeddings are no more than that
            return {"tensor": top}, {}
        raise source.error("holds one tensor without a name, not a model; save the model's state_dict() instead")
    facts: dict[str, str] = {}
    for _ in range(8):
        if not isinstance(top, dict):
            kind = top.type_name if isinstance(top, Inert) else type(top).__name__
            raise source.error(f"holds {kind}, not named tensors; save the model's state_dict() instead")
        has_tensors = any(type(value) is TensorRef for value in top.values())
        for key, value in top.items():
            if type(key) is str and type(value) in (int, float, bool, str) and len(str(value)) <= MAX_FACT:
                facts.setdefault(key, str(value))
        inside = [
            name for name in _WRAPPERS if isinstance(top.get(name), dict) and (name == "state_dict" or not has_tensors)
        ]
        if not inside:
            break
        top = top[inside[0]]
    found: dict[str, TensorRef] = {}
    rooms = [("", top, 0)]
    seen = 0  # one dictionary may stand in many places
    while rooms:
        prefix, room, depth = rooms.pop()
        seen += 1 + len(room)
        if seen > 10 * MAX_TENSORS:
            raise source.error(f"names more than {10 * MAX_TENSORS} things, far more than a model needs; {REMEDY}")
        for name, value in room.items():
            key = f"{prefix}{name}"
            if type(value) is TensorRef:
                if key in found or len(found) >= MAX_TENSORS:
                    raise source.error(f"names {key} twice, or has more than {MAX_TENSORS} tensors; {REMEDY}", key)
                found[key] = value
            elif isinstance(value, dict) and depth < 3:
                rooms.append((f"{key}.", value, depth + 1))
    if not found:
        raise source.error("holds no tensors; save the model's state_dict() instead")
    return found, facts


def legacy_magic(source: Source, head: bytes) -> bool:
    """Does the file open with torch's magic number, in any protocol?"""
    try:
        return Machine(head[:64], 0, source.error, {}).run() == MAGIC
    except FileError:
        return False
