"""What was measured of a cell, as rows: medians, ratios to diffusers, floors, and whether the outputs are the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.sides.cells import Cell, Job, config_of
from benchmarks.timing.floors import flops

# What passes as the same output, as mean errors against the plain networks in float32. In float32 that is 1e-5 of the
# output's root mean square, the project's bound. Guidance 7.5 makes up to 14 times as much of it, and at 127.5 levels
# to the unit about 0.02 of all values of a picture then round to the neighbouring level.
FLOAT32, FLOAT32_LEVELS = 1e-5, 0.05
HALF = 1.5  # half precision: in units of diffusers' error

NAMED = ("model", "dtype", "side", "stage", "sampler", "steps")  # what tells a row from others
MEASURED = ("seconds", "repeats", "first", "cold", "peak", "device_peak", "error", "ratio", "of_floor", "why")
GROWING = ("ssd-1b", "sdxl-base")  # models whose times are compared, the smaller first

Row = dict[str, Any]
# side -> what was measured of one cell: `seconds` and `output`, or the reason why not as `why` or `failed`
Found = dict[str, dict[str, Any]]


def error(ours: Tensor, reference: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference: of pictures in 8-bit levels, else in units of the reference's rms."""
    unit = 1.0 if reference.dtype == torch.uint8 else reference.double().square().mean().sqrt().item()
    difference = (ours.double() - reference.double()).abs() / unit
    return {"max": difference.max().item(), "mean": difference.mean().item()}


def check(outputs: Mapping[str, Tensor], reference: Tensor | None, dtype: str) -> dict[str, Row]:
    """{side: {status, why, error}}: "same", "void" with the reason, or "not compared" where there is no reference.

    outputs    of the sides
    reference  the output of the plain networks in float32, on the same weights
    """
    finite = {side: out for side, out in outputs.items() if torch.isfinite(out.float()).all()}
    errors = {} if reference is None else {side: error(out, reference) for side, out in finite.items()}
    means = {side: each["mean"] for side, each in errors.items()}
    verdicts = {side: _verdict(side, out, means, dtype) for side, out in outputs.items()}
    return {side: {"status": status, "why": why, "error": errors.get(side)} for side, (status, why) in verdicts.items()}


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
    same = [side for side, entry in found.items() if "seconds" in entry and checks[side]["status"] == "same"]
    for side, entry in found.items():
        row: Row = {"model": job.family, "dtype": job.dtype, "cell": str(cell), **asdict(cell), "side": side}
        row |= {"turns": how, "flops": count, "floor": count / best} | dict.fromkeys(MEASURED)
        if "seconds" in entry:
            row |= spread(entry["seconds"]) | {name: entry[name] for name in ("first", "cold", "peak", "device_peak")}
            row |= {"of_floor": row["seconds"]["median"] / row["floor"], **checks[side]}
            if side in same and "diffusers" in same:
                row["ratio"] = float(np.median(found["diffusers"]["seconds"])) / row["seconds"]["median"]
        else:
            row |= unmeasured(entry)
        yield row


def spread(seconds: Sequence[float]) -> Row:
    """Median and deciles, and of how many."""
    p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
    return {"seconds": {"median": median, "p10": p10, "p90": p90}, "repeats": len(seconds)}


def unmeasured(entry: Row) -> Row:
    """What a row says instead of times: the side failed, or it is absent."""
    if "failed" in entry:
        return {"status": "failed", "why": entry["failed"]}
    return {"status": "absent", "why": entry["why"]}


def growth(rows: Sequence[Row]) -> list[Row]:
    """How times grow from a size, a batch or a model to the next, all else being the same, and how FLOPs grow."""
    found = []
    for what in ("size", "batch", "model"):
        alike: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if row["status"] == "same" and not (what == "size" and row["stage"] == "text"):
                alike.setdefault(tuple(row[name] for name in (*NAMED, "batch", "size") if name != what), []).append(row)
        for each in alike.values():
            if what == "model":
                each = [row for name in GROWING for row in each if row["model"] == name]
            else:
                each.sort(key=itemgetter(what))
            for less, more in pairwise(each):
                times = more["seconds"]["median"] / less["seconds"]["median"]
                change = {"what": what, "from": less[what], "to": more[what], **{name: more[name] for name in NAMED}}
                found.append({**change, "times": times, "flops": more["flops"] / less["flops"]})
    return found
