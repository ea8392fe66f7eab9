"""The machine that a measurement is made on: its description, which tells nothing of whose it is, and its memory."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(device: str = "cpu", packages: tuple[str, ...] = ()) -> dict[str, str | int | float | None]:
    """The machine, for a caption or a JSON file. `packages` get their versions, None where one is not installed."""
    found: dict[str, str | int | float | None] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # runnable processes
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found | {name: _version(name) for name in packages}


def cpu_model() -> str:
    """The processor's name."""
    return _system_file("cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _system_file(file: str, line: str) -> str | None:
    """The group of the first line of a file in /proc that matches, or None: only Linux has these files."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{line}$", Path("/proc", file).read_text(), re.MULTILINE):
            return found[1]
    return None


def without_folders(text: str) -> str:
    """The text with the names of files in it, but not where on this machine they lie."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+", "", text)


def use(threads: int | None) -> None:
    """Compute with this many threads, or as many as torch chooses, and let float32 mean float32 on GPUs too."""
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _bytes(file: str, field: str) -> int | None:
    kilobytes = _system_file(file, rf"{field}:\s+(\d+) kB")
    return None if kilobytes is None else 1024 * int(kilobytes)


def resident() -> int | None:
    """Bytes of this process in memory now. None where the system does not say."""
    return _bytes("self/status", "VmRSS")


def peak_memory() -> int | None:
    """The most bytes that this process has had in memory. (A child inherits that of `getrusage` from its parent.)"""
    return _bytes("self/status", "VmHWM")


def reserved_peak(device: str) -> int | None:
    """The most bytes that torch has reserved on a GPU, None on the CPU."""
    # Reserved, not allocated: what CUDA graphs hold is allocated only while they are captured.
    return torch.cuda.max_memory_reserved(device) if device.startswith("cuda") else None


def forget_peak(device: str) -> None:
    """Begin the peaks anew. Linux lets a process do that to its own; elsewhere peaks only ever rise."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def available() -> float:
    """Bytes of the system's memory that are free; infinity where the system does not say."""
    return _bytes("meminfo", "MemAvailable") or float("inf")


def fitting(own: Mapping[str, float], shared: float, device: str) -> tuple[bool, dict[str, str]]:
    """Do these sides fit into memory together; and which do not fit even alone, with the figures.

    own     bytes that each side needs
    shared  bytes that all of them need once
    """
    room = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else available()
    large = {side: shared + need for side, need in own.items() if shared + need > room}
    why = {side: f"needs about {need / 1e9:.1f} GB where {room / 1e9:.1f} are free" for side, need in large.items()}
    return shared + sum(need for side, need in own.items() if side not in large) <= room, why
