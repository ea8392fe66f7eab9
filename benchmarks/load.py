"""Times loading and converting checkpoints, beside safetensors, torch and diffusers on the same files."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.machine import machine, peak_memory

DTYPES = {"float32": torch.float32, "float16": torch.float16}
LIMITS = {"raw": 1.1, "diffusers": 0.5}  # what loading should take at most, in units of the others' times

SINGLE, FOLDER = "StableDiffusionPipeline.from_single_file", "StableDiffusionPipeline.from_pretrained"
Rows = dict[str, dict[str, str]]  # row -> {side: what it does}
# `single`, `pickled` and `folder` are the same seeded weights in three forms.
LOADS: Rows = {
    "single": {"raw": "safetensors.torch.load_file", "ldm": "weights.load", "diffusers": SINGLE},
    "pickled": {"raw": "torch.load(weights_only=True, mmap=True)", "ldm": "weights.load", "diffusers": SINGLE},
    "folder": {"raw": "safetensors.torch.load_file, each", "ldm": "weights.load", "diffusers": FOLDER},
}
CONVERSIONS: Rows = {
    "single to folder": {"ldm": "weights.convert", "diffusers": "from_single_file, save_pretrained"},
    "folder to single": {"ldm": "weights.convert"},  # diffusers has a script for it outside the package
    "pickled to single": {"ldm": "weights.convert"},
}


def files_of(path: Path) -> list[Path]:
    """The files of weights in a form."""
    return [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))


def evict(path: Path) -> None:
    """Let the system forget what it has cached of these files."""
    for file in files_of(path):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touched(tensors: Iterable[Tensor]) -> int:
    """Read one byte of every page of these tensors, since mapped files are read only when used. Returns their bytes."""
    total = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        flat[::4096].sum().item()
        total += flat.numel()
    return total


def load(side: str, form: str, path: Path, config: Path) -> Callable[[], Any]:
    """The function to be timed. What it needs is imported before."""
    if side == "ldm":
        import weights

        return lambda: weights.load(path, dtype=_dtype(path))
    if side == "raw":
        from safetensors.torch import load_file

        if form == "pickled":
            return lambda: torch.load(path, weights_only=True, mmap=True)["state_dict"]
        return lambda: {(file, key): tensor for file in files_of(path) for key, tensor in load_file(file).items()}
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionPipeline
    if form == "folder":
        return lambda: pipeline.from_pretrained(path, torch_dtype=_dtype(path), local_files_only=True)
    alike = {"config": str(config), "local_files_only": True, "safety_checker": None}
    return lambda: pipeline.from_single_file(str(path), torch_dtype=_dtype(path), **alike)


def _dtype(path: Path) -> torch.dtype:
    """The type that the weights have in the file: none is converted."""
    return DTYPES[next(name for name in DTYPES if name in path.name)]


def tensors_of(loaded: Any) -> Iterable[Tensor]:
    """Every tensor of what was loaded."""
    if isinstance(loaded, dict):
        return (tensor for tensor in loaded.values() if isinstance(tensor, Tensor))
    parts = [loaded] if isinstance(loaded, nn.Module) else loaded.components.values()
    return (tensor for part in parts if isinstance(part, nn.Module) for tensor in part.state_dict().values())


def one(side: str, row: str, path: Path, config: Path, cold: bool) -> dict[str, Any]:
    """Seconds until it returns, and until every weight was read; the process's peak memory in bytes, and before."""
    before, loading = peak_memory(), row in LOADS
    run = load(side, row, path, config) if loading else _conversion(side, row, path, config)
    if cold:
        evict(path)
    began = time.perf_counter()
    made = run()
    returned = read = time.perf_counter() - began
    if loading:
        made = touched(tensors_of(made))
        read = time.perf_counter() - began
    return {"returned": returned, "read": read, "bytes": made, "peak": peak_memory(), "before": before}


def _conversion(side: str, row: str, path: Path, config: Path) -> Callable[[], int]:
    target = path.parent / f"converted-{path.stem}{'' if row.endswith('folder') else '.safetensors'}"
    if side == "ldm":
        import weights

        return lambda: weights.convert(path, target, overwrite=True).bytes
    pipeline = load("diffusers", "single", path, config)

    def both() -> int:
        pipeline().save_pretrained(target)
        os.sync()  # ours is on the disk when it returns
        return sum(file.stat().st_size for file in files_of(target))

    return both


def prepare(directory: Path, family: str, dtype: torch.dtype, tiny: bool) -> dict[str, Path]:
    """Seeded weights with the published names, in three forms, and the configs of their folder."""
    import weights
    from benchmarks.models.peers import seeded
    from benchmarks.models.published import manifest, narrow_manifest
    from benchmarks.models.published import tiny as narrow
    from weights.files.write import cast, write

    name = str(dtype).removeprefix("torch.")
    raw, single = directory / "raw.safetensors", directory / f"{name}.safetensors"
    shapes = narrow_manifest(family) if tiny else manifest(family)
    entries = {key: seeded(key, cast(stored, dtype), shape) for key, (shape, stored) in shapes.items()}
    write(entries, raw, {"format": "pt"})
    config = narrow(family) if tiny else None
    if tiny:
        weights.convert(raw, single, config=config)  # so that the file tells its sizes, which are no family's
    else:
        raw.rename(single)
    weights.convert(single, directory / f"{name}.ckpt")
    weights.convert(single, directory / f"{name}-folder", config=config)
    return {"single": single, "pickled": directory / f"{name}.ckpt", "folder": directory / f"{name}-folder"}


def measure(forms: dict[str, Path], rows: Rows, sides: Sequence[str], repeats: int, cold: bool) -> list[dict[str, Any]]:
    """Every row, its sides in turn, each run in a process of its own."""
    found = []
    for row, what in rows.items():
        paths = [str(forms[row.split(" ")[0]]), str(forms["folder"])]
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in what if side in sides}
        for _, side in product(range(repeats), list(runs)):
            runs[side].append(_in_a_process(["--one", side, row, *paths, *["--cold"] * cold]))
        for side, taken in runs.items():
            values = {name: statistics.median(run[name] for run in taken) for name in taken[0]}
            spread = max(run["read"] for run in taken) - min(run["read"] for run in taken)
            about: dict[str, Any] = {"row": row, "side": side, "what": what[side], "cold": cold}
            found.append({**about, **values, "spread": spread, "repeats": repeats})
    return found


def _in_a_process(options: list[str]) -> dict[str, float]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{', '.join(options[1:3])}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def lines_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each row, with its ratio to the others."""
    times = {(row["row"], row["side"], row["cold"]): row["read"] for row in rows}
    lines = [f"{'':18}{'':12}{'returned':>10}{'all read':>10}{'spread':>8}{'peak':>9}  against"]
    for row in rows:
        keys = [(row["row"], side, row["cold"]) for side in LIMITS] if row["side"] == "ldm" else []
        against = [_against(row, key[1], times[key]) for key in keys if key in times]
        state = "cold" if row["cold"] else "warm"
        figures = f"{row['returned']:9.2f}s{row['read']:9.2f}s{row['spread']:7.2f}s{row['peak'] / 1e9:6.2f} GB"
        lines.append(f"{row['row']:18}{row['side']:7}{state:5}{figures}  {', '.join(against)}")
    return lines


def _against(row: dict[str, Any], side: str, theirs: float) -> str:
    """Our time in units of another's, and whether that is what it should be."""
    ratio = row["read"] / theirs
    wanted = f" ({'' if ratio <= LIMITS[side] else 'not '}<= {LIMITS[side]})" if row["row"] in LOADS else ""
    return f"{ratio:.2f} of {side}{wanted}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was measured where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    rows = (*LOADS, *CONVERSIONS)
    parser.add_argument("--family", default="sd1", help="whose names the weights have (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the weights (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="whose medians are shown (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: whether this runs, not how fast")
    parser.add_argument("--out", metavar="FILE", help="write the figures there, as JSON with the machine")
    parser.add_argument("--cold", action="store_true", help="only with files not cached by the system (default: both)")
    parser.add_argument("--row", choices=rows, action="append", help="measure this; may be repeated (default: all)")
    parser.add_argument("--one", nargs=4, metavar=("SIDE", "ROW", "PATH", "CONFIG"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        side, row, path, config = args.one
        print(json.dumps(one(side, row, Path(path), Path(config), args.cold)))
        return 0
    from benchmarks.models.peers import require

    if not args.tiny:
        require("bench", "diffusers", "transformers")
    with tempfile.TemporaryDirectory(prefix="ldm-load-") as directory:
        forms = prepare(Path(directory), args.family, DTYPES[args.dtype], args.tiny)
        sides = ("raw", "ldm") if args.tiny else ("raw", "ldm", "diffusers")
        measured = []
        for table, cold in ((LOADS, True), (LOADS, False), (CONVERSIONS, True)):
            if cold or not args.cold:
                chosen = {row: table[row] for row in args.row or table if row in table}
                measured += measure(forms, chosen, sides, args.repeats, cold)
    print("\n".join(lines_of(measured)))
    if args.out:
        here = machine(packages=("safetensors", "diffusers", "transformers"))
        found = {"family": args.family, "dtype": args.dtype, "machine": here, "rows": measured}
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
