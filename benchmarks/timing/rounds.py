"""A model's cells measured on every side, in turn where all sides fit into memory together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod

from torch import Tensor

from benchmarks import machine
from benchmarks.sides.all import convert, missing
from benchmarks.sides.cells import DTYPES, Cell, Job, config_of
from benchmarks.sides.openvino import openvino_note
from benchmarks.sides.process import SideFailed, Unmeasured
from benchmarks.timing.rows import Found, Row, finished
from benchmarks.timing.turns import Turns, in_turn
from ldm.model import LatentDiffusion
from weights.names.blank import shapes

# Copies of the weights, at most, that a side makes for itself, while all map the same files.
COPIES = {"diffusers-best": 1, "openvino": 1, "sdcpp": 1}
# Bytes: of a process with its libraries, and of what it makes on the way to a picture of 1024 x 1024.
PROCESS, PICTURE = 1.2e9, 4.0e9


def rows_of(
    job: Job, sides: Sequence[str], cells: Sequence[Cell], repeats: int, best: float, known: list[Row]
) -> Iterator[Row]:
    """A row for each cell and side.

    job     of the model, whichever side
    best    FLOP/s that this machine reaches
    known   gets a record of each side as a whole: its import, its load
    """
    absent: dict[str, dict[str, str]] = {}
    jobs: dict[str, Job] = {}
    for side in sides:
        ending = ".safetensors" if side == "sdcpp" else ""
        mine = replace(job, side=side, converted=f"{job.folder}-{side}{ending}")
        if why := missing(side, job.device):
            absent[side] = {"why": why}
        elif why := convert(mine):
            absent[side] = {"failed": why}
        else:
            jobs[side] = mine
    together, large = fitting(job, list(jobs), cells)
    absent |= {side: {"why": why} for side, why in large.items()}
    rest = {side: jobs[side] for side in jobs if side not in large}
    how = "in turn" if together else "one side after the other: together they do not fit into memory"
    groups = [] if not rest else [rest] if together else [{side: mine} for side, mine in rest.items()]
    everything: dict[Cell, Found] = {cell: {side: dict(absent.get(side, {})) for side in sides} for cell in cells}
    reference = {} if not rest or (job.dtype == "float32" and "ldm" in rest) else references(job, cells)
    for i, group in enumerate(groups):
        with contextlib.ExitStack() as stack:
            running = started(stack, group, everything, known)
            for cell in cells:
                visit(running, cell, everything[cell], repeats)
                if i == len(groups) - 1:
                    yield from finished(job, cell, everything[cell], reference.get(cell), best, how)
    if not rest:
        for cell in cells:
            yield from finished(job, cell, everything[cell], None, best, how)


def started(
    stack: contextlib.ExitStack, jobs: Mapping[str, Job], everything: Mapping[Cell, Found], known: list[Row]
) -> dict[str, Turns]:
    """A process for every side, begun one after the other. One that fails has its reason in all its cells."""
    running = {}
    for side, job in jobs.items():
        turns = attempted(job)
        if isinstance(turns, SideFailed):
            for found in everything.values():
                found[side] = {"failed": str(turns)}
            continue
        stack.callback(turns.close)
        running[side] = turns
        notes = [*turns.loaded["warned"], *([openvino_note(job.dtype)] if side == "openvino" else [])]
        about = {"imported": turns.imported, "loaded": turns.loaded, "notes": [note for note in notes if note]}
        known.append({"model": job.family, "dtype": job.dtype, "side": side, **about})
    return running


def attempted(job: Job) -> Turns | SideFailed:
    """The side's process, or why there is none."""
    try:
        return Turns(job)
    except SideFailed as error:
        return error


def visit(running: Mapping[str, Turns], cell: Cell, found: Found, repeats: int) -> None:
    """Measure one cell on all sides that run: the first call of each, then all of them in turn."""
    found |= {side: begun(turns, cell) for side, turns in running.items()}
    able = {side: turns for side, turns in running.items() if "output" in found[side]}
    try:
        times = in_turn({side: partial(turns.time, cell) for side, turns in able.items()}, repeats)
    except SideFailed as error:
        times, why = {}, f"one of those that took turns ({', '.join(able)}): {error}"
        found |= {side: {"failed": why} for side in able}
    for side, seconds in times.items():
        found[side]["seconds"] = seconds


def begun(turns: Turns, cell: Cell) -> Row:
    """What the first call gave, or why there is nothing."""
    try:
        return turns.prepare(cell)
    except Unmeasured as reason:
        return {"why": str(reason)}
    except SideFailed as error:
        return {"failed": str(error)}


def references(job: Job, cells: Sequence[Cell]) -> dict[Cell, Tensor]:
    """The output of the plain networks in float32 on the same weights, but where they fail or need too much memory."""
    plain = replace(job, side="ldm", dtype="float32")
    turns = None if fitting(plain, ["ldm"], cells)[1] else attempted(plain)
    if not isinstance(turns, Turns):
        return {}
    try:
        made = {cell: begun(turns, cell) for cell in cells}
    finally:
        turns.close()
    return {cell: found["output"] for cell, found in made.items() if "output" in found}


def fitting(job: Job, sides: Sequence[str], cells: Sequence[Cell]) -> tuple[bool, dict[str, str]]:
    """Do these sides fit into memory together; and which do not fit even alone. Estimated from the weights."""
    config = config_of(job.family, tiny=job.tiny)
    weights = DTYPES[job.dtype].itemsize * sum(map(prod, shapes(LatentDiffusion, config).values()))
    making = PROCESS + PICTURE * max(cell.batch * cell.size**2 for cell in cells) / 1024**2
    on_gpu = job.device.startswith("cuda")
    own = {side: making + weights * (on_gpu + COPIES.get(side, 0)) for side in sides}
    return machine.fitting(own, 0 if on_gpu else weights, job.device)
