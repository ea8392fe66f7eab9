"""Why a path is no file that can be read, and what to do."""

from __future__ import annotations

import difflib
import errno
import os
import stat
from pathlib import Path


def unreadable(path: Path, error: OSError) -> str:
    """What the system's refusal to open a path means."""
    if error.errno == errno.ELOOP:
        return "is a loop of links; link it to the real file"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "may not be read (permission denied); change its permissions"
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        return f"cannot be opened: {error.strerror}; check the path"
    if path.is_symlink():
        return f"is a link to {os.readlink(path)}, which does not exist; download the file again"
    near = nearest(path)
    return f"does not exist; near it: {', '.join(near)}" if near else "does not exist; check the path"


def irregular(path: Path, mode: int) -> str:
    """What a path of this mode, which is no regular file, is instead."""
    if stat.S_ISDIR(mode):
        if (path / "model_index.json").exists():
            return "is a diffusers folder, not a file; use weights.load, which reads it as a whole"
        return "is a directory; name the .safetensors or .ckpt file in it"
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    kind = kinds.get(stat.S_IFMT(mode), "not a regular file")
    return f"is {kind}, not a file of weights; name a .safetensors or .ckpt file"


def nearest(path: Path, count: int = 3) -> list[str]:
    """Names in the same directory that resemble `path`'s, the most similar first."""
    try:
        names = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        return []
    return difflib.get_close_matches(path.name, names[:10_000], n=count, cutoff=0.5)
