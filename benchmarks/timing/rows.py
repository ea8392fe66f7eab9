"""What was measured of a cell, as rows: medians, ratios to diffusers, floors, and whether each side's output is the same as the plain networks'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.sides.all import Job
from benchmarks.sides.cells import Cell, config_of
from benchmarks.timing.floors import flops

# What passes as the same output, as mean errors against the plain networks in float32. float32: 1e-5 of the output's root mean square, the
# project's bound; guidance 7.5 makes up to 14 times as much of it, and at 127.5 levels to the unit about 0.02 of all values then round to
# the neighbouring level.
FLOAT32, FLOAT32_LEVELS = 1e-5, 0.05
HALF = 1.5  # half precision: in units of diffusers' error

Row = dict[str, Any]
Found = dict[
    str, dict[str, Any]
]  # side -> what was measured of one cell there: `seconds` and `output`, or `why` or `failed` with a reason


# --- sameness ---------------------------------------------------------------------------------------------------------


def error(ours: Tensor, reference: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference: of pictures in 8-bit levels, of anything else in units of the root mean square of `reference`."""
    unit = 1.0 if reference.dtype == torch.uint8 else reference.double().square().mean().sqrt().item()
    difference = (ours.double() - reference.double()).abs() / unit
    return {"max": difference.max().item(), "mean": difference.mean().item()}


def check(outputs: Mapping[str, Tensor], reference: Tensor | None, dtype: str) -> dict[str, Row]:
    """{side: {status, why, error}}: "same", "void" with the reason, or "not compared" where there is nothing to hold it against.

    outputs    of the sides
    reference  the output of the plain networks in float32, on the same weights
    """
    finite = {side: out for side, out in outputs.items() if reference is not None and torch.isfinite(out.float()).all()}
    errors = {side: error(out, reference) for side, out in finite.items()}
    found = {}
    for side, out in outputs.items():
        status, why = _verdict(side, out, {name: each["mean"] for name, each in errors.items()}, dtype)
        found[side] = {"status": status, "why": why, "error": errors.get(side)}
    return found


def _verdict(side: str, out: Tensor, means: Mapping[str, float], dtype: str) -> tuple[str, str | None]:
    if not torch.isfinite(out.float()).all():
        return "void", "NaN or infinity"
    if side not in means:
        return "not compared", "no output of the plain networks in float32"
    if dtype == "float32":
        most, unit = (FLOAT32_LEVELS, "levels") if out.dtype == torch.uint8 else (FLOAT32, "of the rms")
    elif "diffusers" not in means:
        return "not compared", "no diffusers, whose error in this type is the measure"
    elif side == "diffusers":
        return "same", None
    else:
        most, unit = HALF * means["diffusers"], f"= {HALF} times diffusers'"
    if means[side] <= most:
        return "same", None
    return "void", f"mean error {means[side]:.1e} > {most:.1e} {unit}"


# --- rows -------------------------------------------------------------------------------------------------------------


def finished(job: Job, cell: Cell, found: Found, reference: Tensor | None, best: float, how: str) -> Iterator[Row]:
    """One row for each side.

    reference  as for `check`; None: the output of the side "ldm", where it was computed in float32
    best       FLOP/s that this machine reaches
    how        whether the sides took turns
    """
    if reference is None and job.dtype == "float32":
        reference = found.get("ldm", {}).get("output")
    checks = check({side: entry["output"] for side, entry in found.items() if "output" in entry}, reference, job.dtype)
    count = flops(config_of(job.family, tiny=job.tiny), cell)
    medians = {
        side: float(np.median(entry["seconds"]))
        for side, entry in found.items()
        if "seconds" in entry and checks[side]["status"] == "same"
    }
    for side, entry in found.items():
        row: Row = {
            "model": job.family,
            "dtype": job.dtype,
            "cell": str(cell),
            **asdict(cell),
            "side": side,
            "turns": how,
            "flops": count,
            "floor": count / best,
        }
        row |= dict.fromkeys(
            ("seconds", "repeats", "first", "cold", "peak", "device_peak", "error", "ratio", "of_floor", "why")
        )
        if "seconds" in entry:
            p10, median, p90 = np.percentile(entry["seconds"], (10, 50, 90)).tolist()
            row |= {
                "seconds": {"median": median, "p10": p10, "p90": p90},
                "repeats": len(entry["seconds"]),
                "of_floor": median / row["floor"],
            }
            row |= {name: entry[name] for name in ("first", "cold", "peak", "device_peak")} | checks[side]
            if side in medians and "diffusers" in medians:
                row["ratio"] = medians["diffusers"] / median
        else:
            row |= (
                {"status": "failed", "why": entry["failed"]}
                if "failed" in entry
                else {"status": "absent", "why": entry["why"]}
            )
        yield row


def growth(rows: Sequence[Row]) -> list[Row]:
    """How times grow from a size, a batch or a model to the next, beside how FLOPs grow: of rows that are the same but for that."""
    timed = [row for row in rows if row["status"] == "same"]
    found = []
    for what, order in (("size", int), ("batch", int), ("model", {"ssd-1b": 0, "sdxl-base": 1}.get)):
        alike: dict[tuple[Any, ...], list[Row]] = {}
        for row in timed:
            if order(row[what]) is not None and (what != "size" or row["stage"] != "text"):
                rest = tuple(
                    row[name]
                    for name in ("model", "dtype", "side", "stage", "sampler", "steps", "batch", "size")
                    if name != what
                )
                alike.setdefault(rest, []).append(row)
        for each in alike.values():
            for less, more in pairwise(sorted(each, key=lambda row: order(row[what]))):
                times, count = more["seconds"]["median"] / less["seconds"]["median"], more["flops"] / less["flops"]
                named = {name: more[name] for name in ("model", "dtype", "side", "stage", "sampler", "steps")}
                found.append(
                    {"what": what, "from": less[what], "to": more[what], **named, "times": times, "flops": count}
                )
    return found
