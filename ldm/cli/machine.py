"""What to compute on: device, type of numbers, and whether the memory will do."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from ldm import tiles
from ldm.errors import ArgumentError, DeviceError, MemoryLimit
from ldm.model import LatentDiffusion

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device_of(name: str) -> torch.device:
    """Where to compute. Raises DeviceError rather than fall back to another device than the one asked for."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ArgumentError(f"--device: {name[:40]!r} is unknown; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", built without CUDA")
            raise DeviceError(f"--device: there is no {name}, {found} CUDA devices were found ({build}); use --device cpu")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The type to compute in. auto: float16 on CUDA; on the CPU bfloat16 where the processor multiplies it in hardware, else float32."""
    if name != "auto" and name not in DTYPES:
        raise ArgumentError(f"--dtype: {name[:40]!r} is unknown; use auto, {', '.join(DTYPES)}")
    dtype = DTYPES.get(name) or (torch.float16 if device.type == "cuda" else torch.bfloat16 if has_bfloat16() else torch.float32)
    if dtype == torch.float16 and device.type == "cpu":
        warnings.warn("--dtype: float16 on the CPU is slow and may overflow; bfloat16 or float32 are made for it", stacklevel=2)
    if dtype == torch.float32 and device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # who asks for float32 here wants its precision
    return dtype


def has_bfloat16() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 in hardware: x86's AVX512-BF16 and AMX, ARM's BF16. False where the system does not say."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found[1].split())


def check_size(model: LatentDiffusion, size: tuple[int, int], batch: int, tile: int | None = None) -> None:
    """Raises MemoryLimit for pictures that cannot fit. `tile` as in `ldm.precision.decode`: strips need half as much."""
    width, height = size
    config = model.config.vae
    widest = max(config.channel_mult[:2]) * config.channels  # what the decoder holds at full resolution, as input, output and between
    needed = (4 if tiles.side_for(tile, height, width) is None else 2) * widest * width * height * batch * model.dtype.itemsize
    free = free_memory(model.device)
    if free is not None and needed > free:
        raise MemoryLimit(f"{width}x{height} in batches of {batch} needs about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; use a smaller --width and --height, or --batch 1")


def warn_of_size(model: LatentDiffusion, size: tuple[int, int]) -> None:
    """Warns of a size that the model was not trained for, of what it draws from noise alone."""
    width, height = size
    if max(size) > 2 * model.config.size:
        warnings.warn(f"{width}x{height} from a model trained at {model.config.size}x{model.config.size}: things may appear twice; --width and --height set the size", stacklevel=2)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on the device, for a container within its limit; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    free = int(found[1]) * 1024 if found else None
    try:
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit: the file is missing, or says "max"
        return free
    return left if free is None else min(free, left)
