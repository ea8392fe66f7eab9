"""Times training steps and the memory they take, side by side with diffusers' own training step on the same weights, batches, dtype and threads."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.machine import machine, without_folders
from benchmarks.models.peers import require, write_folder
from benchmarks.sides import training as train_sides
from benchmarks.sides.all import DTYPES
from benchmarks.sides.cells import config_of as whole_config_of
from benchmarks.sides.training import SIDES, Job, config_of
from benchmarks.timing.rounds import available
from benchmarks.timing.turns import SideFailed
from ldm.networks.unet import UNet
from weights.names.blank import shapes


@dataclass(frozen=True)
class Case:
    """What is trained."""

    family: str
    method: str  # "full" or "lora"
    rate: float  # of learning


CASES = {
    "sd1-full": Case("sd1", "full", 1e-5),
    "sd1-lora": Case("sd1", "lora", 1e-4),
    "sdxl-lora": Case("sdxl-base", "lora", 1e-4),
}
QUICK = {"size": 256, "repeats": 2}
PACKAGES = ("diffusers", "accelerate", "peft")

# What passes as the same step: by how much the first update's loss and norm of the gradient may differ, relative to diffusers'. In half precision
# four roundings for the loss (of weights, inputs, activations and output), and ten times that for the norm, as in float32.
HALF = {"bfloat16": 2**-8, "float16": 2**-11}
LIMITS = {"float32": {"loss": 1e-4, "grad_norm": 1e-3}} | {
    dtype: {"loss": 4 * u, "grad_norm": 40 * u} for dtype, u in HALF.items()
}

# Bytes: of a process with its libraries, and of the activations that SD 1 keeps of 512 x 512 pixels (4.8e9 as autograd counts them; SDXL has
# less), to which what is passing is added.
PROCESS, KEPT = 1.2e9, 6.5e9
COPIES = 4  # of what is trained: itself, its gradient, AdamW's two averages

Row = dict[str, Any]
Found = dict[str, Row]  # side -> {"load", "updates"}, or "why" or "failed" with a reason


# --- one side in its own process --------------------------------------------------------------------------------------


@contextlib.contextmanager
def training(job: Job) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """What `train_sides.Asked` says of loading, and a function that makes one update and gives what is said of it. Both raise SideFailed."""
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, train_sides.__file__, json.dumps(asdict(job))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)

        def answer() -> Row:
            line = process.stdout.readline()
            if not line:
                status = process.wait()
                errors.seek(0)
                raise SideFailed(
                    f"its process ended with status {status}: {without_folders(errors.read().strip())[-300:]}"
                )
            told = json.loads(line)
            if "failed" in told:
                raise SideFailed(told["failed"])
            return told

        def update() -> Row:
            with contextlib.suppress(BrokenPipeError):
                print(file=process.stdin, flush=True)
            return answer()

        try:
            yield answer(), update
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def measured(jobs: Mapping[str, Job], repeats: int) -> tuple[Found, str]:
    """1 + `repeats` updates of every side, in turn where all fit into memory; and whether they took turns."""
    together, large = fitting(jobs)
    found: Found = {side: {"why": why} for side, why in large.items()}
    rest = {side: job for side, job in jobs.items() if side not in large}
    for group in [rest] if together else [{side: job} for side, job in rest.items()]:
        found |= _in_turn(group, repeats)
    return {
        side: found[side] for side in jobs
    }, "in turn" if together else "one side after the other: together they do not fit into memory"


def _in_turn(jobs: Mapping[str, Job], repeats: int) -> Found:
    found: Found = {}
    updates: dict[str, Callable[[], Row]] = {}
    with contextlib.ExitStack() as stack:
        for side, job in jobs.items():
            try:
                load, updates[side] = stack.enter_context(training(job))
                found[side] = {"load": load, "updates": []}
            except SideFailed as error:
                found[side] = {"failed": str(error)}
        for _, side in product(range(1 + repeats), list(updates)):
            if "updates" in found[side]:
                try:
                    found[side]["updates"].append(updates[side]())
                except SideFailed as error:
                    found[side] = {"failed": str(error)}
    return found


def fitting(jobs: Mapping[str, Job]) -> tuple[bool, dict[str, str]]:
    """Do these sides fit into memory together; and which do not even alone, with the figures. Estimates, from the bytes of the weights."""
    own, shared, room = {}, 0.0, 0.0
    for side, job in jobs.items():
        on_gpu, lora = job.device.startswith("cuda"), job.method == "lora"
        held = 4 * sum(math.prod(shape) for shape in shapes(UNet, config_of(job.family, tiny=job.tiny).unet).values())
        shared = held if lora and not on_gpu else 0.0  # of the files that both map ...
        copies = (
            COPIES if not lora else 0 if shared and job.dtype == "float32" else 1
        )  # ... and read as they are, unless they are rounded
        own[side] = (
            PROCESS + copies * held + (0.1 if job.checkpointing else 1) * KEPT * job.batch * (job.size / 512) ** 2
        )
        room = torch.cuda.mem_get_info(job.device)[0] if on_gpu else available()
    large = {
        side: f"needs about {(shared + need) / 1e9:.1f} GB where {room / 1e9:.1f} are free"
        for side, need in own.items()
        if shared + need > room
    }
    return shared + sum(need for side, need in own.items() if side not in large) <= room, large


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(name: str, job: Job, found: Found, how: str) -> Iterator[Row]:
    """One row for each side.

    ratio   how many times as fast as diffusers
    memory  the peak in units of diffusers'
    """
    status = compared(found, job.dtype)
    told = {side: _figures(entry) for side, entry in found.items() if "updates" in entry}
    theirs = told.get("diffusers")
    for side, entry in found.items():
        row: Row = {
            "case": name,
            **{key: getattr(job, key) for key in ("family", "method", "checkpointing", "size", "batch", "dtype")},
            "side": side,
            "turns": how,
        }
        row |= dict.fromkeys(
            (
                "seconds",
                "repeats",
                "first",
                "peak",
                "between",
                "device_peak",
                "load",
                "trained",
                "losses",
                "grad_norms",
                "error",
                "ratio",
                "memory",
                "why",
            )
        )
        if side in told:
            row |= told[side] | status
            if status["status"] == "same":
                row["ratio"] = theirs["seconds"]["median"] / row["seconds"]["median"]
                row["memory"] = most(row) / most(theirs)
        else:
            row |= (
                {"status": "failed", "why": entry["failed"]}
                if "failed" in entry
                else {"status": "absent", "why": entry["why"]}
            )
        yield row


def _figures(entry: Row) -> Row:
    first, *rest = entry["updates"]
    p10, median, p90 = np.percentile([each["seconds"] for each in rest], (10, 50, 90)).tolist()
    load, last = entry["load"], rest[-1]
    return {
        "seconds": {"median": median, "p10": p10, "p90": p90}, "repeats": len(rest), "first": first["seconds"],
        "peak": last["peak"], "between": last["between"], "device_peak": last["device_peak"], "trained": load["trained"],
        "load": {"seconds": load["seconds"], "between": load["between"], "peak": load["peak"]},
        "losses": [_finite(each["loss"]) for each in entry["updates"]], "grad_norms": [_finite(each["grad_norm"]) for each in entry["updates"]],
    }  # fmt: skip


def most(row: Row) -> float:
    """Bytes at the peak: on the GPU where there is one, else in memory."""
    return row["peak"] if row["device_peak"] is None else row["device_peak"]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def compared(found: Found, dtype: str) -> Row:
    """{status, why, error} of all sides: "same", "void" with the reason, or "not compared" where one of them is missing.

    Of the first update that is finite on both: in float16 the scaler begins with updates that are left out.
    """
    if missing := [side for side in SIDES if "updates" not in found.get(side, {})]:
        return {"status": "not compared", "why": f"no update of {' or '.join(missing)}", "error": None}
    ours, theirs = found["ldm"], found["diffusers"]
    if ours["load"]["trained"] != theirs["load"]["trained"]:
        return {
            "status": "void",
            "why": f"ldm trains {ours['load']['trained']} numbers, diffusers {theirs['load']['trained']}",
            "error": None,
        }
    for a, b in zip(ours["updates"], theirs["updates"], strict=True):
        if all(_finite(each[name]) is not None for each in (a, b) for name in LIMITS[dtype]):
            error = {name: abs(a[name] - b[name]) / abs(b[name]) for name in LIMITS[dtype]}
            far = [
                f"{name}: {a[name]:.6g} and {b[name]:.6g}"
                for name, limit in LIMITS[dtype].items()
                if error[name] > limit
            ]
            return {"status": "void" if far else "same", "why": "; ".join(far) or None, "error": error}
    return {"status": "void", "why": "no update with a finite loss and gradient", "error": None}


# --- what is printed --------------------------------------------------------------------------------------------------

HEAD = f"{'':34}{'side':11}{'median (p10 to p90), s':32}{'ratio':>6}{'first, s':>10}{'peak, GB':>10}{'ratio':>7}{'between, GB':>13}  loss, gradient off by"


def show(row: Row) -> None:
    """Print one line of the table."""
    line = f"{row['case']}, {row['size']}, {'' if row['checkpointing'] else 'no '}checkpointing".ljust(34) + row[
        "side"
    ].ljust(11)
    if row["seconds"]:
        times = row["seconds"]
        line += f"{times['median']:.4g} ({times['p10']:.4g} to {times['p90']:.4g})".ljust(32)
        line += f"{row['ratio']:6.2f}" if row["ratio"] else " " * 6
        line += f"{row['first']:10.4g}{most(row) / 1e9:10.2f}"
        line += f"{row['memory']:7.2f}" if row["memory"] else " " * 7
        line += f"{row['between'] / 1e9:13.2f}  "
        line += f"{row['error']['loss']:.0e}, {row['error']['grad_norm']:.0e}  " if row["error"] else ""
    print(f"{line}{row['status']}{': ' + row['why'] if row['why'] else ''}", flush=True)


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Exits with status 2 where it cannot be honoured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="what is trained (default: all)")
    parser.add_argument(
        "--checkpointing",
        choices=("both", "on", "off"),
        default="both",
        help="compute activations again instead of keeping them (default: %(default)s)",
    )
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES), help="who trains (default: both)")
    parser.add_argument("--size", type=int, help="pixels along a side, a multiple of 64 (default: the model's own)")
    parser.add_argument("--batch", type=int, default=1, help="examples per update (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the arithmetic (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="updates that are timed after the first (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of every side (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="at 256 x 256, 2 repeats")
    parser.add_argument(
        "--tiny", action="store_true", help="narrow networks: shows that this works, not how fast it is"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep weights there for the next time (default: a passing folder)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write all figures there, with the machine and the versions"
    )
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else {"repeats": 5}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, limit in (("batch", 1024), ("repeats", 10**6), ("threads", 4096)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= limit:
            parser.error(f"--{name} {value}: give 1 to {limit}")
    if args.size is not None and (args.size < 64 or args.size % 64):
        parser.error(f"--size {args.size}: give a multiple of 64, which both sides take without padding")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device}: give cpu, cuda or cuda:N")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no CUDA device here")
    if args.dtype == "float16" and args.device == "cpu":
        parser.error("--dtype float16: diffusers does not train in it on a CPU; give bfloat16, or --device cuda")
    return args


def measure(args: argparse.Namespace, keep: Callable[[list[Row]], None]) -> list[Row]:
    """All rows; `keep` is told them whenever there are more."""
    rows: list[Row] = []
    print(HEAD)
    with tempfile.TemporaryDirectory(prefix="ldm-train-") as passing:
        cache = args.cache or Path(passing)
        cache.mkdir(parents=True, exist_ok=True)
        for name, case in {name: CASES[name] for name in args.case}.items():
            folder = cache / f"{'tiny-' * args.tiny}{case.family}-training"
            if not folder.exists():
                write_folder(config_of(case.family, tiny=args.tiny), folder, torch.float32)
            size = args.size or whole_config_of(case.family, tiny=args.tiny).size
            for checkpointing in {"both": (False, True), "on": (True,), "off": (False,)}[args.checkpointing]:
                jobs = {
                    side: Job(side, case.family, args.tiny, case.method, checkpointing, size, args.batch, case.rate, str(folder), args.dtype, args.device, args.threads)
                    for side in args.side
                }  # fmt: skip
                found, how = measured(jobs, args.repeats)
                for row in rows_of(name, jobs[args.side[0]], found, how):
                    show(row)
                    rows.append(row)
                keep(rows)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0, or 1 if the sides did not do the same or one failed."""
    args = arguments(argv)
    if "diffusers" in args.side:
        require("bench", *PACKAGES)
    settings = {
        name: getattr(args, name)
        for name in (
            "case",
            "checkpointing",
            "side",
            "size",
            "batch",
            "dtype",
            "repeats",
            "device",
            "threads",
            "quick",
            "tiny",
        )
    }
    print("\n".join(f"{name}: {value}" for name, value in settings.items()))
    here, begun = (
        machine(args.device, PACKAGES) | ({"threads": args.threads} if args.threads else {}),
        time.perf_counter(),
    )
    print(", ".join(f"{name} {value}" for name, value in here.items() if value is not None))

    def keep(rows: list[Row]) -> None:
        if args.out:
            args.out.write_text(json.dumps({"settings": settings, "machine": here, "rows": rows}, indent=1) + "\n")

    rows = measure(args, keep)
    print(f"all in {time.perf_counter() - begun:.0f} s")
    return 1 if any(row["status"] in ("void", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
