"""What a measurement was made on: processor, cores, threads and versions, nothing that tells whose machine it is."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(device: str = "cpu", packages: tuple[str, ...] = ()) -> dict[str, str | int | float | None]:
    """The machine, for a table's caption or a JSON file. `packages` are named with their versions, None where one is not installed."""
    found: dict[str, str | int | float | None] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2)
        if hasattr(os, "getloadavg")
        else None,  # runnable processes in the last minute: 0 is idle
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | {name: _version(name) for name in packages}


def cpu_model() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory() -> int:
    """The most bytes that this process has had resident. Not `getrusage`, whose figure a child inherits from the process that started it."""
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def without_folders(text: str) -> str:
    """The text with the names of files in it, but not where on this machine they lie."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:'\"]+/)+", "", text)
