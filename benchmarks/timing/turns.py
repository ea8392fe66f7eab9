"""Sides in processes of their own that stay alive and work only when it is their turn: times that fall on the same moments, memory that is theirs alone."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import without_folders
from benchmarks.sides.all import SIDES, Job, Side, Unmeasured
from benchmarks.sides.cells import Cell

SHORT = 0.2  # seconds: what takes less is timed several times in a row
WARM, WARM_BELOW = 3, 1.0  # calls before anything is timed, of what takes less than so many seconds


# --- from outside -----------------------------------------------------------------------------------------------------


class SideFailed(Exception):
    """A side could not do what it should; the message is its own."""


class Turns:
    """One side in its own process. Its process waits, using no processor, while it is not asked."""

    def __init__(self, job: Job):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        begun = time.perf_counter()
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, json.dumps(asdict(job))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        try:
            self.imported = self._answer()
            self.imported["seconds"] = time.perf_counter() - begun
            self.loaded = self.ask(do="load")
            self.fresh = True
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """What the side answers. Raises Unmeasured or SideFailed, with its reason."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            raise SideFailed(
                f"its process ended with status {status}: {without_folders(self.errors.read().strip())[-300:]}"
            )
        answer = json.loads(line)
        if "unmeasured" in answer:
            raise Unmeasured(answer["unmeasured"])
        if "failed" in answer:
            raise SideFailed(answer["failed"])
        return answer

    def prepare(self, cell: Cell) -> dict[str, Any]:
        """The first call of a cell: {first: seconds, cold, peak, device_peak: bytes, output}.

        cold  seconds from the start of the process to its first picture, if this is that picture
        """
        with tempfile.TemporaryDirectory() as folder:
            answer = self.ask(do="prepare", cell=asdict(cell), save=f"{folder}/output.safetensors")
            output = load_file(f"{folder}/output.safetensors")["output"].clone()
        began = self.imported["seconds"] + self.loaded["seconds"] if self.fresh and cell.stage == "picture" else None
        self.fresh = False
        return {**answer, "cold": began and began + answer["first"], "output": output}

    def time(self, cell: Cell) -> float:
        """Seconds of one call of a cell that was prepared."""
        return self.ask(do="time", cell=asdict(cell))["seconds"]

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=60)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def in_turn(calls: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each call gives: A, B, A, B, ... so that whatever else the machine does falls on all."""
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(repeats):
        for side, call in calls.items():
            seconds[side].append(call())
    return seconds


# --- inside -----------------------------------------------------------------------------------------------------------


def resident(field: str) -> int | None:
    """Bytes of this process in memory: now ("VmRSS") or at their peak ("VmHWM"). None where the system does not say."""
    try:
        return next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(field)
        )
    except (OSError, StopIteration):
        return None


def forget_peak(device: str) -> None:
    """Begin the peaks anew. Linux lets a process do that to its own; elsewhere peaks only ever rise."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # what is counted is what is reserved: graphs hold memory that is allocated only while they are captured
        torch.cuda.reset_peak_memory_stats(device)


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
    """The cells that a side has begun, with the seconds that a warm call of each took."""

    def __init__(self, side: Side, device: str):
        self.side, self.device = side, device
        self.calls: dict[Cell, Callable[[], Tensor]] = {}
        self.seconds: dict[Cell, float] = {}

    def prepare(self, cell: Cell, save: str) -> dict[str, Any]:
        call, output = self.side(cell), []
        forget_peak(self.device)
        first = last = timed(lambda: output.append(call()), self.device)
        save_file({"output": output.pop().cpu().contiguous()}, save)
        for _ in range(WARM - 1):
            if last < WARM_BELOW or self.device != "cpu":
                last = timed(call, self.device)
        on_device = torch.cuda.max_memory_reserved(self.device) if self.device.startswith("cuda") else None
        self.calls[cell], self.seconds[cell] = call, last
        return {"first": first, "peak": resident("VmHWM"), "device_peak": on_device}

    def time(self, cell: Cell) -> dict[str, float]:
        call = self.calls[cell]
        n = max(1, math.ceil(SHORT / max(self.seconds[cell], 1e-4)))

        def calls() -> None:
            for _ in range(n):
                call()

        return {"seconds": timed(calls, self.device) / n}


@torch.no_grad()
def serve(job: Job, answer: Callable[[dict[str, Any]], None]) -> None:
    """Do what the lines of standard input ask for until they end."""
    if job.threads:
        torch.set_num_threads(job.threads)
    if job.device != "cpu":
        torch.cuda.set_device(torch.device(job.device))  # whose stream events are recorded in
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    _import(job.side)
    answer({"bytes": resident("VmRSS")})
    prepared: _Prepared | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                begun = time.perf_counter()
                with warnings.catch_warnings(record=True) as said:
                    prepared = _Prepared(SIDES[job.side](job), job.device)
                seconds, warned = (
                    time.perf_counter() - begun,
                    [without_folders(str(each.message)) for each in said if each.category is UserWarning],
                )
                answer({"seconds": seconds, "bytes": resident("VmRSS"), "warned": warned})
            else:
                cell = Cell(**request["cell"])
                answer(prepared.prepare(cell, request["save"]) if request["do"] == "prepare" else prepared.time(cell))
        except Unmeasured as reason:
            answer({"unmeasured": str(reason)})
        except Exception as error:  # told to who asked, who goes on with what is left
            answer({"failed": without_folders(f"{type(error).__name__}: {error}")[:500]})


def _import(side: str) -> None:
    """What a side needs besides torch: its code is neither its weights nor its loading."""
    if side in ("ldm", "fast"):
        import ldm.tasks
        import weights

        _ = ldm.tasks, weights
    elif side == "sdcpp":
        import stable_diffusion_cpp

        _ = stable_diffusion_cpp
    else:
        import diffusers
        import transformers

        _ = (
            diffusers.StableDiffusionPipeline,
            diffusers.StableDiffusionXLPipeline,
            transformers.CLIPTextModel,
        )  # they import when used


def main(argv: list[str]) -> None:
    """Serve the job that is told as JSON. What libraries print goes to standard error, so that answers stand alone."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Job(**json.loads(argv[0])), lambda reply: print(json.dumps(reply), file=out, flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
