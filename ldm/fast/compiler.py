"""Compiles a C++ file of this folder for this very machine on first use, and keeps the result for the next."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")
COMPILERS = ("g++", "c++")  # the code is written in GNU's vector extensions


class CannotCompile(RuntimeError):
    """There is no compiler, or it failed. The message says which, in one line."""


def compiled(name: str, *extra: str) -> ctypes.CDLL:
    """The library of `ldm/fast/{name}`, compiled with the flags above and `extra`; tried once in a process.

    It is kept in $LDM_CACHE, or ldm/ under $XDG_CACHE_HOME or ~/.cache, under a name that depends on source, flags,
    compiler and processor. The compiler is $CXX or the first of COMPILERS. Raises CannotCompile.
    """
    made = _made(name, *extra)
    if isinstance(made, CannotCompile):
        raise made
    return made


@functools.cache
def _made(name: str, *extra: str) -> ctypes.CDLL | CannotCompile:
    source = Path(__file__).with_name(name)
    compiler = shlex.split(os.environ.get("CXX", "")) or [*filter(None, map(shutil.which, COMPILERS))][:1]
    if not compiler:
        return CannotCompile(f"no C++ compiler: {', '.join(COMPILERS)} not found, $CXX not set")
    command = [*compiler, *FLAGS, *extra]
    try:
        made_from = source.read_bytes(), command, _first_line([*compiler, "--version"]), _processor()
        key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        kept = Path(os.environ.get("LDM_CACHE") or Path(caches) / "ldm") / f"{source.stem}-{key}.so"
        if not kept.exists():
            _compile([*command, str(source)], kept)
    except CannotCompile as fault:
        return fault
    except (OSError, RuntimeError) as error:  # no home, or one that may not be entered
        return CannotCompile(f"no folder for what is compiled: {error}; set LDM_CACHE to one")
    try:
        return ctypes.CDLL(str(kept))
    except OSError as error:
        return CannotCompile(f"{kept} does not load, remove it: {error}")


def _compile(command: list[str], kept: Path) -> None:
    """Run the compiler and rename its output into place, so that processes that do this at once do not meet."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / kept.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                lines = [line.strip() for line in done.stderr.splitlines() if "error" in line]
                what = lines[0] if lines else f"exit status {done.returncode}"
                raise CannotCompile(f"{Path(command[0]).name} failed: {what}")
            made.replace(kept)
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"{Path(command[0]).name}: {error}") from None


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{command[0]}: {error}") from None


def _processor() -> str:
    """What -march=native depends on: the processor's instructions, or its name where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
