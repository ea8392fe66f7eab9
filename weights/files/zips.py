"""A zip archive as torch writes it: stored entries that tile the file, every claim checked before it is believed."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from weights.files.source import Source

MAX_ENTRIES = 50_000
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_CENTRAL, _LOCAL, _DESCRIPTOR = b"PK\x01\x02", b"PK\x03\x04", b"PK\x07\x08"
_HAS_DESCRIPTOR = 0x0008
_KNOWN_FLAGS = _HAS_DESCRIPTOR | 0x0800  # and "the name is UTF-8"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 field"


@dataclass(frozen=True)
class Entry:
    """One stored file of the archive: `size` bytes from `start` on, whose CRC-32 is `crc`."""

    name: str
    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class _Claim:
    """What the central directory says of an entry."""

    name: bytes
    flags: int
    crc: int
    size: int
    offset: int  # of its local header


def entries(source: Source) -> dict[str, Entry]:
    """Name -> entry, in the order of the directory.

    Refused: compression, encryption, repeated names, and a file that is not its entries followed by their directory.
    """
    start, size, count = _directory(source)
    claims = _claims(source, source.read(start, size), count)
    if not claims:
        raise source.damaged("is an empty zip archive")
    found: dict[bytes, Entry] = {}
    position = 0
    in_file_order = sorted(claims, key=lambda claim: claim.offset)
    for claim, following in zip(in_file_order, [*(c.offset for c in in_file_order[1:]), start], strict=True):
        if claim.offset != position:
            what = "whose entries overlap or leave holes" if position else "with bytes before its first entry"
            raise source.damaged(f"is a zip {what}", claim.name.decode(errors="replace"))
        found[claim.name] = _local(source, claim, following)
        position = following
    seen: set[str] = set()
    for entry in found.values():
        if entry.name.casefold() in seen:
            raise source.damaged(f"is a zip with two entries named {entry.name}", entry.name)
        seen.add(entry.name.casefold())
    if len(found) != len(claims):
        raise source.damaged("is a zip with two entries of one name")
    return {entry.name: entry for entry in (found[claim.name] for claim in claims)}


def contents(source: Source, entry: Entry, limit: int) -> bytes:
    """The bytes of a small entry, CRC checked. Refused when it is longer than `limit`."""
    if entry.size > limit:
        raise source.error(
            f"has {entry.size} bytes in {entry.name}, above the limit of {limit}; use a .safetensors of this model",
            entry.name,
        )
    data = source.read(entry.start, entry.size)
    if zlib.crc32(data) != entry.crc:
        raise source.damaged(f"is damaged: the checksum of {entry.name} is wrong", entry.name)
    return data


def _directory(source: Source) -> tuple[int, int, int]:
    """Start and size of the central directory in bytes, and its number of entries."""
    end = source.size - 22
    tail = source.read(max(end, 0), min(22, source.size))
    if len(tail) < 22 or tail[:4] != _END or tail[20:] != b"\0\0":
        rest = source.read(max(0, source.size - 66_000), min(66_000, source.size))
        if _END in rest:
            raise source.damaged("is a zip with bytes after its end")
        raise source.damaged(f"is truncated: a zip whose directory is missing ({source.size} bytes are there)")
    disk, first, here, count, size, start = struct.unpack("<HHHHII", tail[4:20])
    if end >= 20 + 56 and source.read(end - 20, 4) == _LOCATOR64:
        disk64, at, disks = struct.unpack("<IQI", source.read(end - 16, 16))
        record = source.read(end - 76, 56)
        length, _, _, disk_a, disk_b, here64, count64, size64, start64 = struct.unpack("<QHHIIQQQQ", record[4:])
        small = ((here, here64, _FULL16), (count, count64, _FULL16), (size, size64, _FULL32), (start, start64, _FULL32))
        if record[:4] != _END64 or at != end - 76 or length != 44 or disk64 or disks > 1 or disk_a or disk_b:
            raise source.damaged("is a zip whose zip64 record is damaged")
        if any(value not in (wide, full) for value, wide, full in small):
            raise source.damaged("is a zip whose two end records disagree")
        here, count, size, start, end = here64, count64, size64, start64, end - 76
    if disk not in (0, _FULL16) or first not in (0, _FULL16) or here != count or start + size != end:
        raise source.damaged("is a zip whose directory is not where it says")
    if count > MAX_ENTRIES or size > 1024 * MAX_ENTRIES:
        raise source.error(
            f"is a zip with {count} entries, above the limit of {MAX_ENTRIES}; use a .safetensors of this model"
        )
    return start, size, count


def _claims(source: Source, directory: bytes, count: int) -> list[_Claim]:
    claims, at = [], 0
    while at < len(directory):
        header = directory[at : at + 46]
        if len(header) < 46 or header[:4] != _CENTRAL:
            raise source.damaged("is a zip whose directory is damaged")
        flags, method = struct.unpack("<HH", header[8:12])
        crc, packed, size, name_length, extra_length, comment_length, disk = struct.unpack("<IIIHHHH", header[16:36])
        (offset,) = struct.unpack("<I", header[42:46])
        name = directory[at + 46 : at + 46 + name_length]
        extra = directory[at + 46 + name_length : at + 46 + name_length + extra_length]
        at += 46 + name_length + extra_length + comment_length
        if at > len(directory):
            raise source.damaged("is a zip whose directory is damaged")
        size, packed, offset = _wide(source, extra, (size, packed, offset))
        shown = name.decode(errors="replace")
        if flags & ~_KNOWN_FLAGS:
            raise source.error(
                f"is a zip with an encrypted or unusual entry ({shown}); use a .safetensors of this model", shown
            )
        if method != 0 or packed != size:
            raise source.error(
                f"is a zip with a compressed entry ({shown}); unpack it and repack it with 'zip -0'", shown
            )
        if disk not in (0, _FULL16):
            raise source.error("is one part of a zip over several files; join them first")
        claims.append(_Claim(name, flags, crc, size, offset))
    if len(claims) != count:
        raise source.damaged(f"is a zip that announces {count} entries and lists {len(claims)}")
    return claims


def _wide(source: Source, extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """`values` (size, packed size, offset), those that are full replaced from the zip64 field as far as it goes."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack("<HH", extra[at : at + 4])
        if at + 4 + length > len(extra):
            raise source.damaged("is a zip with a damaged extra field")
        if tag == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    result = []
    for value in values:
        if value == _FULL32 and len(wide) >= 8:
            value, wide = struct.unpack("<Q", wide[:8])[0], wide[8:]
        result.append(value)
    return tuple(result)


def _local(source: Source, claim: _Claim, following: int) -> Entry:
    """The entry that `claim` describes, its local header agreeing; the next thing in the file begins at `following`."""
    shown = claim.name.decode(errors="replace")
    header = source.read(claim.offset, min(30, source.size - claim.offset) if claim.offset < source.size else 30)
    if len(header) < 30 or header[:4] != _LOCAL:
        raise source.damaged(f"is a zip whose entry {shown} is not where the directory says", shown)
    flags, method = struct.unpack("<HH", header[6:10])
    crc, packed, size, name_length, extra_length = struct.unpack("<IIIHH", header[14:30])
    rest = source.read(claim.offset + 30, name_length + extra_length)
    size, packed = _wide(source, rest[name_length:], (size, packed))
    agrees = (flags, method, rest[:name_length]) == (claim.flags, 0, claim.name)
    if flags & _HAS_DESCRIPTOR:  # the sizes come after the data; here they may be left open
        agrees = agrees and crc in (0, claim.crc) and {size, packed} <= {0, _FULL32, claim.size}
    else:
        agrees = agrees and (crc, size, packed) == (claim.crc, claim.size, claim.size)
    if not agrees:
        raise source.damaged(f"is a zip whose entry {shown} and its directory disagree", shown)
    start = claim.offset + 30 + name_length + extra_length
    end = start + claim.size
    gap = following - end
    if end > source.size or gap < 0 or not _is_descriptor(source, claim, end, gap):
        raise source.damaged(f"is a zip whose entries overlap or leave holes (at {shown})", shown)
    try:
        return Entry(claim.name.decode(), start, claim.size, claim.crc)
    except UnicodeDecodeError:
        raise source.damaged(f"is a zip with an entry name that is not UTF-8 ({shown})", shown) from None


def _is_descriptor(source: Source, claim: _Claim, end: int, gap: int) -> bool:
    """Are the `gap` bytes after an entry's data its checksum and sizes again, or none where none are announced?"""
    if gap == 0:
        return not claim.flags & _HAS_DESCRIPTOR or claim.size == 0
    if not claim.flags & _HAS_DESCRIPTOR or gap not in (12, 16, 20, 24):
        return False
    data = source.read(end, gap)
    if gap in (16, 24):
        if data[:4] != _DESCRIPTOR:
            return False
        data = data[4:]
    return struct.unpack("<III" if len(data) == 12 else "<IQQ", data) == (claim.crc, claim.size, claim.size)
