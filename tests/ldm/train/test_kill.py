"""A run that is killed again and again comes to the same bits as one that is not, and loses at most what it did since
its last state."""

from __future__ import annotations

import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.loop import Watchers, fit
from ldm.train.recipe import Optimizer, Recipe, Run
from ldm.train.state import TENSORS, latest_state, only_run
from ldm.train.tasks import Loss
from tests.made.forked import start

RECIPE = Recipe(
    "killed", run=Run(steps=60, batch=4, micro=2, ema=0.9, save_every=3, keep=2),
    optimizer=Optimizer(lr=1e-2, schedule="cosine", warmup=5)
)  # fmt: skip


class Small(nn.Module):
    """Learns to say of noise what it was before it was turned."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        x = draws.normal("x", (8,))
        return Loss((self.net(x.flip(1)) - x).square().mean(1), draws.integers("t", 10), 10)


def micro(number: int) -> Batch:
    return Batch((2 * number, 2 * number + 1), ("", ""), (8, 8), (), torch.ones(2))


def train(out: Path, progress: Path) -> None:
    """Begin or go on. The number of updates done is always in the file `progress`."""
    descriptor = os.open(progress, os.O_WRONLY | os.O_CREAT)
    with only_run(out):
        task = Small()
        watchers = Watchers(tick=lambda step: os.pwrite(descriptor, b"%6d" % step, 0))
        fit(
            task,
            dict(task.named_parameters()),
            micro,
            RECIPE,
            out,
            state=latest_state(out / "states"),
            watchers=watchers,
        )


def finished(out: Path) -> bytes:
    """Weights, averages and what AdamW remembers after the last update."""
    state = latest_state(out / "states")
    assert state.step == RECIPE.run.steps
    assert {name.split("/")[0] for name in state.open()} == {"raw", "ema", "adam"}
    return (state.path / TENSORS).read_bytes()


def begun(out: Path, said: Path) -> BaseProcess:
    """A process that trains, from its first moment on."""
    progress = out.with_suffix(".txt")
    progress.unlink(missing_ok=True)
    process = start(train, out, progress, said=said)
    while not progress.exists() and process.is_alive():
        time.sleep(0.001)
    return process


def kill_at_random(folder: Path, kills: int) -> None:
    """Kill runs so many times in all. Each one is started again until it is finished, and then compared with one that
    was left alone."""
    folder.mkdir()
    said = folder / "said"
    process, since = begun(folder / "alone", said), time.monotonic()
    process.join()
    duration = time.monotonic() - since
    wanted = finished(folder / "alone")
    draws, killed, whole_runs, in_saving = random.Random(kills), 0, 0, 0
    while killed < kills or not whole_runs:
        out = folder / f"run-{whole_runs}"
        process = begun(out, said)
        process.join(draws.uniform(0, duration / 4) if killed < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
            in_saving += any((out / "states").glob("*.tmp"))
            done = int(out.with_suffix(".txt").read_text() or 0)
            state = latest_state(
                out / "states"
            )  # a warning would be an error here: nothing half-written has a state's name
            assert done - (state.step if state else 0) <= RECIPE.run.save_every
        else:
            assert process.exitcode == 0, said.read_text()
            assert finished(out) == wanted
            whole_runs += 1
    assert not said.read_text()
    assert in_saving


@pytest.mark.filterwarnings("error")
def test_a_run_killed_twenty_times_comes_to_the_same_bits_and_loses_at_most_one_interval(tmp_path):
    kill_at_random(tmp_path / "runs", 20)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_runs_killed_two_hundred_times_come_to_the_same_bits_and_lose_at_most_one_interval(tmp_path):
    kill_at_random(tmp_path / "runs", 200)
