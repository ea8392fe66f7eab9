"""Times training steps and their memory, in turn with diffusers' training scripts on the same weights and batches."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import machine
from benchmarks.models.peers import require, write_folder
from benchmarks.sides import cells, training
from benchmarks.sides.process import Process, SideFailed
from benchmarks.sides.training import SIDES, Job, config_of
from benchmarks.timing import command
from benchmarks.timing.rows import Row, spread, unmeasured
from ldm.networks.unet import UNet
from weights.names.blank import shapes


@dataclass(frozen=True)
class Case:
    """What is trained."""

    family: str
    method: Literal["full", "lora"]
    rate: float  # of learning


CASES = {
    "sd1-full": Case("sd1", "full", 1e-5),
    "sd1-lora": Case("sd1", "lora", 1e-4),
    "sdxl-lora": Case("sdxl-base", "lora", 1e-4),
}
DEFAULTS = {"case": [*CASES], "side": [*SIDES]}
QUICK = {"size": 256, "repeats": 2}
PACKAGES = ("diffusers", "accelerate", "peft")

# What passes as the same step: by how much the first update's loss and norm of the gradient may differ, relative to
# diffusers'. In half precision these are four roundings for the loss (of weights, inputs, activations and output),
# and ten times that for the norm, as in float32.
LIMITS = {
    "float32": {"loss": 1e-4, "grad_norm": 1e-3},
    "bfloat16": {"loss": 4 * 2**-8, "grad_norm": 40 * 2**-8},
    "float16": {"loss": 4 * 2**-11, "grad_norm": 40 * 2**-11},
}

# Bytes: of a process with its libraries, and of the activations that SD 1 keeps of 512 x 512 pixels (4.8e9 as
# autograd counts them; SDXL has less) together with what is passing.
PROCESS, KEPT = 1.2e9, 6.5e9
COPIES = 4  # of what is trained: itself, its gradient, AdamW's two averages

MEASURED = (
    "seconds", "repeats", "first", "peak", "between", "device_peak", "load", "trained", "losses", "grad_norms", "error",
    "ratio", "memory", "why",
)  # fmt: skip
Found = dict[str, Row]  # side -> {"load", "updates"}, or "why" or "failed" with a reason


def measured(jobs: Mapping[str, Job], repeats: int) -> tuple[Found, str]:
    """1 + `repeats` updates of every side, in turn where all fit into memory; and whether they took turns."""
    together, large = fitting(jobs)
    found: Found = {side: {"why": why} for side, why in large.items()}
    rest = {side: job for side, job in jobs.items() if side not in large}
    for group in [rest] if together else [{side: job} for side, job in rest.items()]:
        found |= _in_turn(group, repeats)
    how = "in turn" if together else "one side after the other: together they do not fit into memory"
    return {side: found[side] for side in jobs}, how


def _in_turn(jobs: Mapping[str, Job], repeats: int) -> Found:
    found: Found = {}
    updates: dict[str, Callable[[], Row]] = {}
    with contextlib.ExitStack() as stack:
        for side, job in jobs.items():
            process = Process(training.__name__, job)
            stack.callback(process.close)
            try:
                found[side] = {"load": process.answer(), "updates": []}
                updates[side] = process.ask
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
    """Do these sides fit into memory together; and which do not fit even alone. Estimated from the weights."""
    own, shared, device = {}, 0.0, "cpu"
    for side, job in jobs.items():
        device, lora = job.device, job.method == "lora"
        held = 4 * sum(map(math.prod, shapes(UNet, config_of(job.family, tiny=job.tiny).unet).values()))
        shared = held if lora and device == "cpu" else 0.0  # of the files that both map ...
        as_stored = shared and job.dtype == "float32"  # ... and read as they are
        copies = COPIES if not lora else 0 if as_stored else 1
        kept = KEPT * job.batch * (job.size / 512) ** 2
        own[side] = PROCESS + copies * held + (0.1 if job.checkpointing else 1) * kept
    return machine.fitting(own, shared, device)


def rows_of(name: str, job: Job, found: Found, how: str) -> Iterator[Row]:
    """One row for each side: `ratio` is how many times as fast as diffusers, `memory` the peak in units of its peak."""
    status = compared(found, job.dtype)
    figures = {side: _figures(entry) for side, entry in found.items() if "updates" in entry}
    for side, entry in found.items():
        about = {key: getattr(job, key) for key in ("family", "method", "checkpointing", "size", "batch", "dtype")}
        row: Row = {"case": name, **about, "side": side, "turns": how, **dict.fromkeys(MEASURED)}
        if side in figures:
            row |= figures[side] | status
            if status["status"] == "same":
                theirs = figures["diffusers"]
                row["ratio"] = theirs["seconds"]["median"] / row["seconds"]["median"]
                row["memory"] = most(row) / most(theirs)
        else:
            row |= unmeasured(entry)
        yield row


def _figures(entry: Row) -> Row:
    load, updates = entry["load"], entry["updates"]
    first, *rest = updates
    found = spread([each["seconds"] for each in rest]) | {"first": first["seconds"], "trained": load["trained"]}
    found |= {name: rest[-1][name] for name in ("peak", "between", "device_peak")}
    found |= {
        name: [_finite(each[one]) for each in updates]
        for name, one in (("losses", "loss"), ("grad_norms", "grad_norm"))
    }
    return found | {"load": {name: load[name] for name in ("seconds", "between", "peak")}}


def most(row: Row) -> float:
    """Bytes at the peak: on the GPU where there is one, else in memory."""
    return row["peak"] if row["device_peak"] is None else row["device_peak"]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def compared(found: Found, dtype: str) -> Row:
    """{status, why, error} of all sides: "same", "void" with the reason, or "not compared" where a side is missing.

    The first update that is finite on both sides counts: in float16 the scaler begins with updates that are left out.
    """
    if missing := [side for side in SIDES if "updates" not in found.get(side, {})]:
        return {"status": "not compared", "why": f"no update of {' or '.join(missing)}", "error": None}
    ours, theirs = found["ldm"], found["diffusers"]
    n, m = ours["load"]["trained"], theirs["load"]["trained"]
    if n != m:
        return {"status": "void", "why": f"ldm trains {n} numbers, diffusers {m}", "error": None}
    limits = LIMITS[dtype]
    for a, b in zip(ours["updates"], theirs["updates"], strict=True):
        if all(_finite(each[name]) is not None for each in (a, b) for name in limits):
            error = {name: abs(a[name] - b[name]) / abs(b[name]) for name in limits}
            far = [f"{name}: {a[name]:.6g} and {b[name]:.6g}" for name in limits if error[name] > limits[name]]
            return {"status": "void" if far else "same", "why": "; ".join(far) or None, "error": error}
    return {"status": "void", "why": "no update with a finite loss and gradient", "error": None}


HEAD = f"{'':34}{'side':11}{'median (p10 to p90), s':32}{'ratio':>6}{'first, s':>10}{'peak, GB':>10}{'ratio':>7}"
HEAD += f"{'between, GB':>13}  loss, gradient off by"


def show(row: Row) -> None:
    """Print one line of the table."""
    line = f"{row['case']}, {row['size']}, {'' if row['checkpointing'] else 'no '}checkpointing".ljust(34)
    line += f"{row['side']:11}"
    if row["seconds"]:
        times = row["seconds"]
        line += f"{times['median']:.4g} ({times['p10']:.4g} to {times['p90']:.4g})".ljust(32)
        line += f"{row['ratio']:6.2f}" if row["ratio"] else " " * 6
        line += f"{row['first']:10.4g}{most(row) / 1e9:10.2f}"
        line += f"{row['memory']:7.2f}" if row["memory"] else " " * 7
        line += f"{row['between'] / 1e9:13.2f}  "
        line += f"{row['error']['loss']:.0e}, {row['error']['grad_norm']:.0e}  " if row["error"] else ""
    print(f"{line}{row['status']}{': ' + row['why'] if row['why'] else ''}", flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Exits with status 2 where it cannot be honoured."""
    parser = argparse.ArgumentParser(description=__doc__)
    again = "compute activations again instead of keeping them (default: %(default)s)"
    parser.add_argument("--case", nargs="+", choices=CASES, help="what is trained (default: all)")
    parser.add_argument("--checkpointing", choices=("both", "on", "off"), default="both", help=again)
    parser.add_argument("--size", type=int, help="pixels along a side, a multiple of 64 (default: the model's own)")
    parser.add_argument("--batch", type=int, default=1, help="examples per update (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="at 256 x 256, 2 repeats")
    command.add_options(parser, SIDES)
    args = command.arguments(parser, argv, DEFAULTS, QUICK)
    if args.dtype == "float16" and args.device == "cpu":
        parser.error("--dtype float16: diffusers does not train in it on a CPU; give bfloat16, or --device cuda")
    return args


def measure(args: argparse.Namespace, keep: command.Keep) -> list[Row]:
    """All rows; `keep` gets them whenever there are more."""
    rows: list[Row] = []
    print(HEAD)
    with tempfile.TemporaryDirectory(prefix="ldm-train-") as passing:
        cache = args.cache or Path(passing)
        cache.mkdir(parents=True, exist_ok=True)
        for name, case in {name: CASES[name] for name in args.case}.items():
            folder = cache / f"{'tiny-' * args.tiny}{case.family}-training"
            if not folder.exists():
                write_folder(config_of(case.family, tiny=args.tiny), folder, torch.float32)
            size = args.size or cells.config_of(case.family, tiny=args.tiny).size
            for checkpointing in {"both": (False, True), "on": (True,), "off": (False,)}[args.checkpointing]:
                job = Job(
                    "", case.family, args.tiny, case.method, checkpointing, size, args.batch, case.rate, str(folder),
                    args.dtype, args.device, args.threads,
                )  # fmt: skip
                found, how = measured({side: replace(job, side=side) for side in args.side}, args.repeats)
                for row in rows_of(name, job, found, how):
                    show(row)
                    rows.append(row)
                keep({"rows": rows})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0, or 1 if the sides did not do the same or one failed."""
    args = arguments(argv)
    if "diffusers" in args.side:
        require("bench", *PACKAGES)
    machine.use(args.threads)
    names = ("case", "checkpointing", "side", "size", "batch", "dtype", "repeats", "device", "threads", "quick", "tiny")
    settings = {name: getattr(args, name) for name in names}
    rows, _ = command.run(args, settings, PACKAGES, lambda keep: measure(args, keep))
    return command.status(rows)


if __name__ == "__main__":
    sys.exit(main())
