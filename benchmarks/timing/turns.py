"""Each side in a process of its own, called in turn: whatever else the machine does falls on all of them."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import forget_peak, peak_memory, reserved_peak, resident, without_folders
from benchmarks.sides.all import SIDES
from benchmarks.sides.cells import Cell, Job, Side
from benchmarks.sides.process import Answer, Process, attempted, serve

SHORT = 0.2  # seconds: what takes less is timed several times in a row
WARM, WARM_BELOW = 3, 1.0  # calls before anything is timed, of what takes less than so many seconds


class Turns(Process):
    """One side in its own process, with its weights loaded."""

    def __init__(self, job: Job):
        begun = time.perf_counter()
        super().__init__(__name__, job)
        try:
            self.imported = self.answer()
            self.imported["seconds"] = time.perf_counter() - begun
            self.loaded = self.ask(do="load")
            self.fresh = True
        except BaseException:
            self.close()
            raise

    def prepare(self, cell: Cell) -> Answer:
        """The first call of a cell: {first: seconds, cold, peak, device_peak: bytes, output}."""
        with tempfile.TemporaryDirectory() as folder:
            answer = self.ask(do="prepare", cell=asdict(cell), save=f"{folder}/output.safetensors")
            output = load_file(f"{folder}/output.safetensors")["output"].clone()
        # `cold`: seconds from the start of the process to its first picture, if this is that picture.
        began = self.imported["seconds"] + self.loaded["seconds"] if self.fresh and cell.stage == "picture" else None
        self.fresh = False
        return {**answer, "cold": began and began + answer["first"], "output": output}

    def time(self, cell: Cell) -> float:
        """Seconds of one call of a cell that was prepared."""
        return self.ask(do="time", cell=asdict(cell))["seconds"]


def in_turn(calls: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each call gives: A, B, A, B, ... so that whatever else the machine does falls on all."""
    rounds = [[call() for call in calls.values()] for _ in range(repeats)]
    return {side: [each[k] for each in rounds] for k, side in enumerate(calls)}


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds until the result is there: of the processor's clock, or of the GPU's between events before and after."""
    if not device.startswith("cuda"):
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    call()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000


class _Prepared:
    """A side with the cells that it has begun, and the seconds that a warm call of each took."""

    def __init__(self, job: Job):
        self.job, self.device = job, job.device
        self.side: Side
        self.calls: dict[Cell, Callable[[], Tensor]] = {}
        self.seconds: dict[Cell, float] = {}

    def load(self) -> Answer:
        begun = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            self.side = SIDES[self.job.side](self.job)
        seconds = time.perf_counter() - begun
        warned = [without_folders(str(each.message)) for each in caught if each.category is UserWarning]
        return {"seconds": seconds, "bytes": resident(), "warned": warned}

    def prepare(self, cell: Mapping[str, Any], save: str) -> Answer:
        call, output = self.side(Cell(**cell)), []
        forget_peak(self.device)
        first = last = timed(lambda: output.append(call()), self.device)
        save_file({"output": output.pop().cpu().contiguous()}, save)
        for _ in range(WARM - 1):
            if last < WARM_BELOW or self.device != "cpu":
                last = timed(call, self.device)
        self.calls[Cell(**cell)], self.seconds[Cell(**cell)] = call, last
        return {"first": first, "peak": peak_memory(), "device_peak": reserved_peak(self.device)}

    def time(self, cell: Mapping[str, Any]) -> Answer:
        call = self.calls[Cell(**cell)]
        n = max(1, math.ceil(SHORT / max(self.seconds[Cell(**cell)], 1e-4)))

        def calls() -> None:
            for _ in range(n):
                call()

        return {"seconds": timed(calls, self.device) / n}


@torch.no_grad()
def answers(job: Job, answer: Callable[[Answer], None]) -> None:
    """Do what the lines of standard input ask for until they end."""
    if job.device != "cpu":
        torch.cuda.set_device(torch.device(job.device))  # whose stream events are recorded in
    _import(job.side)
    answer({"bytes": resident()})
    side = _Prepared(job)
    requests: dict[str, Callable[..., Answer]] = {"load": side.load, "prepare": side.prepare, "time": side.time}
    for line in sys.stdin:
        request = json.loads(line)
        answer(attempted(partial(requests[request.pop("do")], **request)))


def _import(side: str) -> None:
    """Import what a side needs besides torch, so that loading its weights is timed without that."""
    ours: dict[str, list[str]] = {"ldm.tasks": [], "weights": []}
    sdcpp: dict[str, list[str]] = {"stable_diffusion_cpp": []}
    theirs = {"diffusers": ["StableDiffusionPipeline", "StableDiffusionXLPipeline"], "transformers": ["CLIPTextModel"]}
    needed = {"ldm": ours, "fast": ours, "sdcpp": sdcpp}.get(side, theirs)
    for module, names in needed.items():
        imported = import_module(module)
        for name in names:
            getattr(imported, name)  # this imports the module that the name is of


if __name__ == "__main__":
    serve(Job, answers)
