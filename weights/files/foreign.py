"""What the first bytes of a file say it is, where they are not those of a usual .safetensors."""

from __future__ import annotations

from typing import Literal

from weights.files.source import Source
from weights.files.torchfiles import legacy_magic

_FOREIGN = {  # first bytes -> what the file is, and what to do
    b"\x1f\x8b": "is gzip-compressed; unpack it with 'gunzip'",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it first",
    b"Rar!": "is a RAR archive; unpack it first",
    b"BZh": "is bzip2-compressed; unpack it with 'bunzip2'",
    b"\xfd7zXZ": "is xz-compressed; unpack it with 'unxz'",
    b"\x28\xb5\x2f\xfd": "is zstd-compressed; unpack it with 'unzstd'",
    b"\x93NUMPY": "is a numpy array, not a model; name a .safetensors or .ckpt file",
    b"\x89HDF": "is an HDF5 file (Keras?), not a torch checkpoint; convert it to .safetensors",
    b"GGUF": "is a GGUF file; use the .safetensors or .ckpt it was made from",
    b"\x89PNG": "is a PNG picture, not weights; name a .safetensors or .ckpt file",
    b"\xff\xd8\xff": "is a JPEG picture, not weights; name a .safetensors or .ckpt file",
    b"%PDF": "is a PDF document, not weights; name a .safetensors or .ckpt file",
}


def kind_of(source: Source, head: bytes, max_header: int) -> Literal["safetensors", "zip", "stream"]:
    """What a file is by its first 4 KiB. Raises FileError that names what is no file of weights."""
    if source.size == 0:
        raise source.damaged("is empty (0 bytes)")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise source.error("is a Git LFS pointer, not the weights; run 'git lfs pull' or download the file")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        raise source.error("is a web page (HTML), not the weights; download the file itself, not the page about it")
    if text.startswith((b"<?xml", b"<error", b"<!--")):
        raise source.error("is an XML text, perhaps a server's error message; download the weights again")
    if source.size < 8:
        raise source.damaged(f"is only {source.size} bytes long")
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return "zip"
    for start, what in _FOREIGN.items():
        if head.startswith(start):
            raise source.error(what)
    if head[257:262] == b"ustar":
        raise source.error(
            "is a tar archive; unpack it, or save it again with a current torch if torch before 0.1.10 wrote it"
        )
    if head[:1] == b"\x80" and legacy_magic(source, head):
        return "stream"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= max(max_header, source.size):
        return "safetensors"
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        raise source.error("is a pickle, but not one that torch.save wrote; use a .safetensors of this model")
    if not any(head):
        raise source.damaged("is all zeros: the download did not finish")
    if text[:1] in (b"{", b"["):
        raise source.error("is JSON text, perhaps a server's error message; download the weights again")
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head[:512]):
        raise source.error("is plain text, not weights; download the file itself")
    raise source.damaged(f"is neither .safetensors nor a torch checkpoint (it begins with {head[:8].hex(' ')})")
