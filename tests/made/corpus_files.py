"""Files that must be refused for what holds the weights: other formats, zips, streams and headers that lie."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from tests.made.checkpoints import ckpt_of, pickled, safetensors_of, tensor, zip_of
from tests.made.corpus_pickles import LIVE

MAGIC = 0x1950A86A20F9469CFC6C  # opens a pre-1.6 stream
SOUND = ckpt_of({"w": tensor()})
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
SAFE = safetensors_of({"w": ENTRY}, bytes(24))


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_field(offset: int, new: bytes, signature: bytes = b"PK\x01\x02") -> bytes:
    """The sound zip, the field at `offset` of its first record with that signature overwritten."""
    return changed(SOUND, SOUND.index(signature) + offset, new)


def stream_of(
    count: int = 6, keys: Any = None, data: bytes = bytes(24), system: dict | None = None, contents: Any = None
) -> bytes:
    """A pre-1.6 stream with one tensor `w`."""
    system = {"little_endian": True} if system is None else system
    parts = [MAGIC, 1001, system, contents or {"w": tensor()}, ["0"] if keys is None else keys]
    return b"".join(map(pickled, parts)) + struct.pack("<q", count) + data


def zipped(**options) -> bytes:
    return zip_of({"data.pkl": pickled({"w": tensor()}), "version": b"3\n", "data/0": bytes(24)}, **options)


def deflated() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({"w": tensor()}))
        archive.writestr("archive/data/0", bytes(24))
    return buffer.getvalue()


def two_of_one_name() -> bytes:
    """Two entries `data/0`; Python's own writer would do, and would warn."""
    data = zip_of({"data.pkl": pickled({"w": tensor()}), "data/0": bytes(24), "data/1": bytes(24)})
    return data.replace(b"archive/data/1", b"archive/data/0")


def one_record_twice() -> bytes:
    """The directory names the bytes of one entry a second time."""
    start, end = SOUND.index(b"PK\x01\x02"), SOUND.index(b"PK\x05\x06")
    (last,) = (SOUND[at:end] for at in [SOUND.rindex(b"PK\x01\x02")])
    counts = struct.pack("<HHII", 4, 4, end - start + len(last), start)
    return SOUND[:end] + last + SOUND[end : end + 8] + counts + SOUND[end + 20 :]


def zip64_of(change: dict[int, bytes] | None = None) -> bytes:
    """The sound zip with zip64 end records, and bytes of the wide record changed."""
    start, end = SOUND.index(b"PK\x01\x02"), SOUND.index(b"PK\x05\x06")
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 3, 3, end - start, start)
    for at, new in (change or {}).items():
        wide = changed(wide, at, new)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    return (
        SOUND[:end]
        + wide
        + locator
        + b"PK\x05\x06"
        + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )


def local(offset: int, new: bytes) -> bytes:
    """The sound zip, a field of the local header of its first entry overwritten."""
    return with_field(offset, new, b"PK\x03\x04")


def flipped() -> bytes:
    """A bit of the tensor's numbers is another one; nothing but the CRC tells."""
    at = SOUND.index(bytes(24))
    return changed(SOUND, at + 5, b"\x04")


def big(directory: Path) -> None:
    """A data.pkl of more than the limit, all of it there."""
    (directory / "x.ckpt").write_bytes(zip_of({"data.pkl": bytes(64 * 2**20 + 1)}))


def long_header(directory: Path) -> None:
    """A header one byte longer than the format allows, all of it there, as a hole that takes no disk."""
    with (directory / "x.safetensors").open("wb") as file:
        file.write((10**8 + 1).to_bytes(8, "little") + b"{")
        file.truncate(10**8 + 300)


FOREIGN = {  # file name, bytes, words of the message
    "empty": ("x.ckpt", b"", "is empty (0 bytes)"),
    "four bytes": ("x.ckpt", b"abcd", "only 4 bytes"),
    "zeros": ("x.safetensors", bytes(100_000), "all zeros"),
    "git lfs pointer": (
        "x.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n",
        "is a Git LFS pointer, not the weights; run 'git lfs pull'",
    ),
    "html": ("x.ckpt", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page (HTML)"),
    "html without doctype": ("x.ckpt", b"<HTML><head>", "web page (HTML)"),
    "xml error": ("x.ckpt", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML text"),
    "json error": ("x.safetensors", b'{"error": "Repository not found", "status": 404}', "JSON text"),
    "plain text": ("x.ckpt", b"Not found. Please try again later.", "plain text"),
    "gzip": ("x.ckpt", b"\x1f\x8b\x08" + bytes(100), "gzip-compressed; unpack"),
    "7z": ("x.ckpt", b"7z\xbc\xaf\x27\x1c" + bytes(100), "7z archive"),
    "npy": ("x.ckpt", b"\x93NUMPY\x01\x00" + bytes(100), "numpy array"),
    "hdf5": ("x.ckpt", b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "gguf": ("x.safetensors", b"GGUF\x03" + bytes(100), "GGUF"),
    "png": ("x.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"),
    "tar": ("x.ckpt", bytes(257) + b"ustar\0" + bytes(600), "tar archive"),
    "plain pickle": ("x.ckpt", pickled({"a": 1}), "is a pickle, but not one that torch.save wrote"),
    "html after a byte order mark": ("x.ckpt", b"\xef\xbb\xbf<!doctype HTML>" + bytes(5000), "web page (HTML)"),
    "html body": ("x.safetensors", b"<body>moved</body>", "web page (HTML)"),
    "html comment": ("x.ckpt", b"<!-- saved from url -->" + b" " * 100, "XML text"),
    "xml of a bucket": (
        "x.safetensors",
        b"<Error><Code>NoSuchKey</Code></Error>",
        "XML text, perhaps a server's error message; download",
    ),
    "json list": ("x.ckpt", b'[{"detail": "rate limit"}]', "JSON text"),
    "json after blanks": ("x.safetensors", b'\n\n  {"detail": "rate limit"}', "JSON text"),
    "an old lfs pointer": ("x.ckpt", b"version https://git-lfs.github.com/spec/v0\n", "Git LFS pointer"),
    "one byte": ("x.safetensors", b"{", "only 1 bytes"),
    "seven bytes": ("x.ckpt", b"PK\x03\x04abc", "only 7 bytes"),
    "eight zeros": ("x.ckpt", bytes(8), "all zeros"),
    "an email": ("x.ckpt", b"From: me\r\nTo: you\r\n\tthe weights" * 300, "plain text"),
    "UTF-16": ("x.ckpt", "not found, sorry".encode("utf-16"), "neither .safetensors nor"),
    "rar": ("x.ckpt", b"Rar!\x1a\x07" + bytes(100), "RAR archive; unpack"),
    "bzip2": ("x.ckpt", b"BZh91AY" + bytes(100), "bzip2-compressed; unpack it with 'bunzip2'"),
    "xz": ("x.ckpt", b"\xfd7zXZ\0" + bytes(100), "xz-compressed; unpack it with 'unxz'"),
    "zstd": ("x.ckpt", b"\x28\xb5\x2f\xfd" + bytes(100), "zstd-compressed; unpack it with 'unzstd'"),
    "jpeg": ("x.safetensors", b"\xff\xd8\xff\xe0" + bytes(100), "JPEG"),
    "pdf": ("x.safetensors", b"%PDF-1.7" + bytes(100), "PDF"),
    "program": (
        "x.ckpt",
        b"\x7fELF\x02\x01\x01" + bytes(100),
        "neither .safetensors nor a torch checkpoint (it begins with 7f 45 4c 46",
    ),
    "zip over several files": ("x.ckpt", b"PK\x07\x08PK\x03\x04" + bytes(100), "neither .safetensors nor"),
    "pickle of protocol 5": ("x.ckpt", b"\x80\x05}." + bytes(10), "is a pickle, but not one that torch.save wrote"),
    "pickle of protocol 0": ("x.ckpt", b"(dp0\nVa\nI1\ns.", "plain text"),
    "half a magic number": ("x.ckpt", pickled(0x1950A86A20F9469CFC6C)[:-4] + bytes(4), "is a pickle, but not one"),
    "another magic number": ("x.ckpt", pickled(0x1950A86A20F9469CFC6D) + bytes(8), "is a pickle, but not one"),
    "zip named safetensors, in capitals": ("x.SAFETENSORS", SOUND, "not safetensors as its name says"),
    "noise": ("x.ckpt", bytes(range(128, 255)) * 9, "neither .safetensors nor"),
    "zip named safetensors": ("x.safetensors", SOUND, "not safetensors as its name says; rename it to .ckpt"),
    "stream named safetensors": ("x.safetensors", stream_of(), "not safetensors as its name says"),
}

ZIPS = {
    "other zip": (zip_of({"readme.txt": b"hello"}), "no part of a torch checkpoint", "archive/readme.txt"),
    "torchscript": (zip_of({"data.pkl": pickled({}), "code/__torch__.py": b"", "constants.pkl": b""}), "TorchScript"),
    "path upwards": (
        zip_of({"data.pkl": pickled({"w": tensor()}), "../../evil": b""}),
        "no part of a torch checkpoint",
        "archive/../../evil",
    ),
    "absolute name": (
        zip_of({"data.pkl": pickled({"w": tensor()})}, top="/"),
        "no part of a torch checkpoint",
        "/data.pkl",
    ),
    "top folder is ..": (zipped(top="../"), "no part of a torch checkpoint", "../data.pkl"),
    "two tops": (zip_of({"a/data.pkl": pickled({"w": tensor()}), "b/data/0": bytes(24)}, top=""), "two top folders"),
    "no pickle": (zip_of({"data/0": bytes(24)}), "no data.pkl"),
    "compressed": (deflated(), "compressed entry", "archive/data.pkl"),
    "encrypted": (with_field(8, b"\x01\x00"), "encrypted or unusual", "archive/data.pkl"),
    "big endian": (ckpt_of({"w": tensor()}, byteorder=b"big"), "big-endian"),
    "storage that nothing uses": (
        ckpt_of({"w": tensor()}, {"data/0": bytes(24), "data/1": bytes(4)}),
        "storage 1 is used by no tensor",
    ),
    "record too short": (ckpt_of({"w": tensor()}, {"data/0": bytes(20)}), "has 20 bytes where 6 numbers"),
    "record too long": (ckpt_of({"w": tensor()}, {"data/0": bytes(28)}), "has 28 bytes where 6 numbers"),
    "wrong checksum of the pickle": (
        changed(SOUND, SOUND.index(b"_rebuild"), b"_Rebuild"),
        "the checksum of archive/data.pkl is wrong",
        "archive/data.pkl",
    ),
    "truncated": (SOUND[:-40], "is truncated"),
    "truncated in the data": (SOUND[: len(SOUND) // 2], "is truncated"),
    "byte at the end": (SOUND + b"\0", "bytes after its end"),
    "comment": (SOUND[:-2] + b"\x05\0hello", "bytes after its end"),
    "prefix": (b"PK\x03\x04" + bytes(60) + SOUND, "not where it says"),
    "hole": (SOUND[: SOUND.index(b"PK\x01\x02")] + bytes(9) + SOUND[SOUND.index(b"PK\x01\x02") :], "not where it says"),
    "count too high": (with_field(8, struct.pack("<HH", 9, 9), b"PK\x05\x06"), "announces 9 entries and lists 3"),
    "directory beyond the end": (with_field(12, struct.pack("<I", 2**31), b"PK\x05\x06"), "not where it says"),
    "size beyond the end": (with_field(20, struct.pack("<II", 2**30, 2**30)), "disagree", "archive/data.pkl"),
    "offset of another entry": (with_field(42, struct.pack("<I", 60)), "before its first entry", "archive/data.pkl"),
    "name differs from the directory's": (
        changed(SOUND, SOUND.index(b"archive/data.pkl"), b"Archive"),
        "disagree",
        "archive/data.pkl",
    ),
    "name in another case twice": (
        zip_of({"data.pkl": pickled({"w": tensor()}), "data/0": bytes(24), "DATA.PKL": b""}),
        "two entries named",
        "archive/DATA.PKL",
    ),
    "empty archive": (zip_of({}), "empty zip"),
    "one name twice": (two_of_one_name(), "two entries of one name"),
    "one record in two entries": (one_record_twice(), "overlap or leave holes", "archive/data/0"),
    "a flipped bit in a tensor": (flipped(), "the checksum of w is wrong; download it again", "w"),
    "a flipped bit in the byte order": (
        changed(
            ckpt_of({"w": tensor()}, byteorder=b"little"),
            ckpt_of({"w": tensor()}, byteorder=b"little").index(b"little"),
            b"L",
        ),
        "checksum of archive/byteorder",
        "archive/byteorder",
    ),
    "another way to compress": (with_field(10, b"\x0c\0"), "compressed entry", "archive/data.pkl"),
    "compressed only in the local header": (local(8, b"\x08\0"), "disagree", "archive/data.pkl"),
    "encrypted only in the local header": (local(6, b"\x01\0"), "disagree", "archive/data.pkl"),
    "another checksum in the local header": (local(14, b"\x01\x02\x03\x04"), "disagree", "archive/data.pkl"),
    "another size in the local header": (local(18, struct.pack("<II", 9, 9)), "disagree", "archive/data.pkl"),
    "a local header that is none": (
        local(0, b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x05\x06", 1),
        "not where the directory says",
        "archive/data.pkl",
    ),
    "a longer name in the local header": (local(26, struct.pack("<H", 17)), "disagree", "archive/data.pkl"),
    "a longer extra field in the local header": (local(28, struct.pack("<H", 8)), "damaged extra field"),
    "an extra field that reaches out": (local(28, struct.pack("<H", 65535)), "is truncated"),
    "a part of several": (with_field(34, b"\x01\0"), "one part of a zip over several files; join"),
    "a directory on another disk": (with_field(4, b"\x01\0", b"PK\x05\x06"), "not where it says"),
    "a damaged directory": (with_field(0, b"PK\x01\x03"), "is a zip whose directory is damaged"),
    "a directory whose last entry reaches out": (with_field(32, b"\xff\xff"), "directory is damaged"),
    "a name that is not UTF-8": (
        SOUND.replace(b"archive/data.pkl", b"archive/data.pk\xff"),
        "not UTF-8",
        "archive/data.pk\ufffd",
    ),
    "a name with a backslash": (
        SOUND.replace(b"archive/data/0", b"archive\\data\\0"),
        "no part of a torch checkpoint",
        "archive\\data\\0",
    ),
    "a folder as an entry": (
        zip_of({"data.pkl": pickled({"w": tensor()}), "data/0": bytes(24), "data/": b""}),
        "archive/data/ in it, which is no part",
        "archive/data/",
    ),
    "a program beside the weights": (
        ckpt_of({"w": tensor()}, **{"setup.py": b"import os"}),
        "setup.py in it, which is no part of a torch checkpoint; unpack it first",
        "archive/setup.py",
    ),
    "a pickle beside the pickle": (ckpt_of({"w": tensor()}, **{"constants.pkl": b""}), "TorchScript"),
    "a wide record that is damaged": (zip64_of({0: b"PK\x06\x05"}), "zip64 record is damaged"),
    "a wide record of another length": (zip64_of({4: b"\x2d"}), "zip64 record is damaged"),
    "a wide record of 2^63 entries": (zip64_of({24: b"\xff" * 15 + b"\x7f"}), "not where it says"),
    "a wide record for a directory elsewhere": (zip64_of({48: struct.pack("<Q", 2**63)}), "not where it says"),
    "two end records that disagree": (
        zip64_of()[:-14] + struct.pack("<HHIIH", 2, 2, 0xFFFFFFFF, 0xFFFFFFFF, 0),
        "two end records disagree",
    ),
    "a size of 2^64 with nowhere to say it": (with_field(20, b"\xff" * 8), "disagree", "archive/data.pkl"),
    "sizes after the data that are not there": (
        SOUND.replace(b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\x08\0").replace(
            b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\x08\0"
        ),
        "overlap or leave holes",
        "archive/data.pkl",
    ),
    "a pickle of more than 64 MiB": (
        big,
        "bytes in archive/data.pkl, above the limit of 67108864; use a .safetensors",
        "archive/data.pkl",
    ),
    "only its end": (SOUND[SOUND.index(b"PK\x05\x06") :], "not where it says"),
    "60000 entries": (with_field(8, struct.pack("<HH", 60_000, 60_000), b"PK\x05\x06"), "above the limit of 50000"),
    "20000 entries": (zip_of({f"{i}": b"" for i in range(20_000)}), "no part of a torch checkpoint", "archive/0"),
}

STREAMS = {
    "count differs": (stream_of(count=7), "has 7 numbers where its tensors expect 6"),
    "negative count": (stream_of(count=-1), "has -1 numbers"),
    "truncated": (stream_of(data=bytes(23)), "is truncated"),
    "one byte more": (stream_of(data=bytes(25)), "1 extra bytes after the last tensor"),
    "key missing": (stream_of(keys=[]), "lists other storages"),
    "key unknown": (stream_of(keys=["0", "1"]), "lists other storages"),
    "key twice": (stream_of(keys=["0", "0"]), "lists other storages"),
    "bytes after 8 more": (stream_of(data=bytes(32)), "8 extra bytes after the last tensor"),
    "2^62 numbers": (stream_of(count=2**62), "has 4611686018427387904 numbers"),
    "count cut off": (stream_of()[:-28], "is truncated"),
    "keys cut off": (stream_of()[:-40], "ends too early"),
    "another protocol": (b"".join(map(pickled, (MAGIC, 1002, {}, {}, []))), "unknown version; save it again"),
    "a system that is a list": (b"".join(map(pickled, (MAGIC, 1001, [], {}, []))), "big-endian"),
    "keys that are a tuple": (stream_of(keys=("0",)), "lists other storages"),
    "keys that are numbers": (stream_of(keys=[0]), "lists other storages"),
    "no tensors": (b"".join(map(pickled, (MAGIC, 1001, {"little_endian": True}, {}, []))), "holds no tensors"),
    "only the magic number": (pickled(MAGIC), "ends too early"),
    "code in the protocol": (pickled(MAGIC) + LIVE["global and reduce"], "refers to posix.system, which is code"),
    "code in the system": (b"".join(map(pickled, (MAGIC, 1001))) + LIVE["INST"], "refers to os.system, which is code"),
    "code in the weights": (
        b"".join(map(pickled, (MAGIC, 1001, {"little_endian": True}))) + LIVE["STACK_GLOBAL"],
        "refers to os.system",
    ),
    "code in the keys": (
        b"".join(map(pickled, (MAGIC, 1001, {"little_endian": True}, {"w": tensor()}))) + LIVE["OBJ"],
        "refers to os.system",
    ),
    "a tensor beyond its storage": (
        stream_of(contents={"w": tensor(shape=(7,), stride=(1,))}),
        "w reaches beyond",
        "w",
    ),
    "big endian": (stream_of(system={"little_endian": False}), "big-endian"),
}

HEADERS = {
    "truncated header": (safetensors_of({"w": ENTRY})[:20], "its header alone"),
    "truncated data": (safetensors_of({"w": ENTRY}, bytes(23)), "bytes of"),
    "extra byte": (safetensors_of({"w": ENTRY}, bytes(25)), "1 extra bytes after the last tensor"),
    "header of 10^18 bytes": (b"\x00\x00\x64\xa7\xb3\xb6\xe0\x0d{}" + bytes(100), "neither .safetensors"),
    "header beyond the limit": (long_header, "above the limit of 100000000"),
    "not JSON": (safetensors_of(None, raw=b'{"w": '), "it is not JSON"),
    "not UTF-8": (safetensors_of(None, raw=b'{"\xff": 1}'), "it is not JSON"),
    "nested 100000 deep": (
        safetensors_of(None, raw=b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "damaged header",
    ),
    "millions of parts": (safetensors_of(None, raw=b'{"w":[' + b"[]," * 600_000 + b"0]}"), "too many parts"),
    "key twice": (
        safetensors_of(
            None,
            bytes(24),
            raw=b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        ),
        "w appears twice",
    ),
    "key twice by escape": (
        safetensors_of(
            None,
            bytes(24),
            raw=b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"\\u0077":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        ),
        "w appears twice",
    ),
    "shape twice": (
        safetensors_of(None, bytes(24), raw=b'{"w":{"dtype":"F32","shape":[6],"shape":[6],"data_offsets":[0,24]}}'),
        "shape appears twice",
    ),
    "no tensors": (safetensors_of({"__metadata__": {"a": "b"}}), "holds no tensors"),
    "metadata of numbers": (
        safetensors_of({"__metadata__": {"a": 1}, "w": ENTRY}, bytes(24)),
        "metadata are not text",
        "__metadata__",
    ),
    "NaN": (safetensors_of(None, raw=b'{"w": NaN}'), "it holds NaN"),
    "entry is a list": (safetensors_of({"w": [1]}), "w is not a dtype", "w"),
    "entry with more": (safetensors_of({"w": {**ENTRY, "x": 1}}, bytes(24)), "w is not a dtype", "w"),
    "unknown dtype": (safetensors_of({"w": {**ENTRY, "dtype": "F4"}}, bytes(24)), "dtype F4", "w"),
    "dtype is a number": (safetensors_of({"w": {**ENTRY, "dtype": 32}}, bytes(24)), "dtype 32", "w"),
    "shape with a bool": (safetensors_of({"w": {**ENTRY, "shape": [True, 6]}}, bytes(24)), "no valid shape", "w"),
    "shape with a float": (safetensors_of({"w": {**ENTRY, "shape": [2.0, 3]}}, bytes(24)), "no valid shape", "w"),
    "negative shape": (safetensors_of({"w": {**ENTRY, "shape": [-2, -3]}}, bytes(24)), "no valid shape", "w"),
    "rank 17": (safetensors_of({"w": {**ENTRY, "shape": [1] * 16 + [6]}}, bytes(24)), "no valid shape", "w"),
    "shape that wraps 64 bits": (
        safetensors_of({"w": {**ENTRY, "shape": [2**62, 2**62, 2]}}, bytes(24)),
        "w has an absurd size",
        "w",
    ),
    "number of 5000 digits": (
        safetensors_of(None, raw=b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,24]}}'),
        "damaged header",
    ),
    "size and place differ": (
        safetensors_of({"w": {**ENTRY, "shape": [2, 2]}}, bytes(24)),
        "4 numbers of 4 bytes by its shape",
        "w",
    ),
    "offsets reversed": (safetensors_of({"w": {**ENTRY, "data_offsets": [24, 0]}}, bytes(24)), "by its shape", "w"),
    "offsets of three": (
        safetensors_of({"w": {**ENTRY, "data_offsets": [0, 24, 24]}}, bytes(24)),
        "no valid offsets",
        "w",
    ),
    "negative offset": (safetensors_of({"w": {**ENTRY, "data_offsets": [-24, 0]}}, bytes(24)), "no valid offsets", "w"),
    "overlap": (safetensors_of({"w": ENTRY, "v": ENTRY}, bytes(24)), "overlaps another tensor", "v"),
    "hole": (
        safetensors_of({"w": ENTRY, "v": {**ENTRY, "data_offsets": [28, 52]}}, bytes(52)),
        "unused bytes before it",
        "v",
    ),
    "nine extra bytes": (
        safetensors_of({"w": ENTRY}, bytes(33)),
        "9 extra bytes after the last tensor; run 'ldm repair x.safetensors'",
    ),
    "header of no bytes": (bytes(8) + b"{" + bytes(30), "has a header of 0 bytes"),
    "header of one byte": (b"\x01" + bytes(7) + b"{" + bytes(30), "has a header of 1 bytes"),
    "header of 2^63 bytes": (b"\0" * 7 + b"\x80{" + bytes(100), "neither .safetensors"),
    "header one byte too long": ((len(SAFE) - 7).to_bytes(8, "little") + SAFE[8:], "its header alone"),
    "header that ends early": (
        safetensors_of(None, bytes(24), raw=json.dumps({"w": ENTRY}).encode()[:-1]),
        "it is not JSON",
    ),
    "bytes after the header's end": (
        safetensors_of(None, bytes(24), raw=json.dumps({"w": ENTRY}).encode() + b"{}"),
        "it is not JSON",
    ),
    "comments": (safetensors_of(None, raw=b'{/*w*/"a":1}'), "it is not JSON"),
    "comma at the end": (safetensors_of(None, raw=b'{"a":[1,],}'), "it is not JSON"),
    "single quotes": (safetensors_of(None, raw=b"{'a': 1}"), "it is not JSON"),
    "infinity": (safetensors_of(None, raw=b'{"w": -Infinity}'), "it holds -Infinity"),
    "lone control character": (safetensors_of(None, raw=b'{"a\x01": 1}'), "it is not JSON"),
    "half a surrogate pair in UTF-8": (safetensors_of(None, raw=b'{"\xed\xa0\x80": 1}'), "it is not JSON"),
    "nothing at all": (safetensors_of({}), "holds no tensors"),
    "metadata that are a list": (
        safetensors_of({"__metadata__": [], "w": ENTRY}, bytes(24)),
        "metadata are not text",
        "__metadata__",
    ),
    "metadata that are null": (
        safetensors_of({"__metadata__": None, "w": ENTRY}, bytes(24)),
        "metadata are not text",
        "__metadata__",
    ),
    "metadata of objects": (
        safetensors_of({"__metadata__": {"a": {}}, "w": ENTRY}, bytes(24)),
        "metadata are not text",
        "__metadata__",
    ),
    "metadata key twice": (
        safetensors_of(
            None,
            bytes(24),
            raw=b'{"__metadata__":{"a":"1","a":"2"},"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        ),
        "a appears twice",
    ),
    "entry is null": (safetensors_of({"w": None}), "w is not a dtype", "w"),
    "entry without dtype": (
        safetensors_of({"w": {"shape": [6], "data_offsets": [0, 24]}}, bytes(24)),
        "w is not a dtype",
        "w",
    ),
    "dtype in small letters": (
        safetensors_of({"w": {**ENTRY, "dtype": "f32"}}, bytes(24)),
        "dtype f32, which this version does not read; convert it",
        "w",
    ),
    "complex numbers": (
        safetensors_of({"w": {**ENTRY, "dtype": "C64", "shape": [3]}}, bytes(24)),
        "dtype C64, which",
        "w",
    ),
    "float8 of only exponents": (
        safetensors_of({"w": {**ENTRY, "dtype": "F8_E8M0", "shape": [24]}}, bytes(24)),
        "dtype F8_E8M0, which",
        "w",
    ),
    "dtype of a thousand letters": (
        safetensors_of({"w": {**ENTRY, "dtype": "F" * 1000}}, bytes(24)),
        "FFF, which this version does not read; convert it",
        "w",
    ),
    "shape that is a number": (safetensors_of({"w": {**ENTRY, "shape": 6}}, bytes(24)), "no valid shape", "w"),
    "shape of text": (safetensors_of({"w": {**ENTRY, "shape": ["6"]}}, bytes(24)), "no valid shape", "w"),
    "shape of 2^63": (safetensors_of({"w": {**ENTRY, "shape": [2**63]}}, bytes(24)), "no valid shape", "w"),
    "empty of absurd size": (
        safetensors_of({"w": {**ENTRY, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
        "absurd",
        "w",
    ),
    "offsets with a bool": (
        safetensors_of({"w": {**ENTRY, "data_offsets": [False, 24]}}, bytes(24)),
        "no valid offsets",
        "w",
    ),
    "offsets with a float": (
        safetensors_of({"w": {**ENTRY, "data_offsets": [0, 24.0]}}, bytes(24)),
        "no valid offsets",
        "w",
    ),
    "offsets of text": (
        safetensors_of({"w": {**ENTRY, "data_offsets": ["0", "24"]}}, bytes(24)),
        "no valid offsets",
        "w",
    ),
    "offsets beyond 64 bits": (
        safetensors_of({"w": {**ENTRY, "data_offsets": [2**64, 2**64 + 24]}}, bytes(24)),
        "unused bytes before it",
        "w",
    ),
    "empty inside another": (
        safetensors_of({"w": ENTRY, "v": {**ENTRY, "shape": [0], "data_offsets": [8, 8]}}, bytes(24)),
        "v overlaps another tensor",
        "v",
    ),
    "first tensor not at the start": (
        safetensors_of({"w": {**ENTRY, "data_offsets": [8, 32]}}, bytes(32)),
        "w has unused bytes before it",
        "w",
    ),
    "60000 tensors": (
        safetensors_of({str(i): 0 for i in range(60_000)}),
        "has 60000 tensors, above the limit of 50000",
    ),
    "a name of 5000 letters": (
        safetensors_of({"n" * 5000: {**ENTRY, "shape": [-1]}}, bytes(24)),
        "nnn...; download it again",
        "n" * 5000,
    ),
    "control characters in a name": (safetensors_of({"w\x1b[2J\u202e": [1]}), "w\\u001b[2J\\u202e", "w\x1b[2J\u202e"),
}
