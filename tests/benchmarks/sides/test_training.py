"""Both sides learn the same from the same batches, and their clock stands still while they wait."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch

from benchmarks.models import peers
from benchmarks.sides import training
from benchmarks.sides.training import Ended, Job


class Counted:
    """A pace that asks for a few updates and keeps what is said of them."""

    def __init__(self, updates):
        self.updates, self.noted = updates, []

    def note(self, **seen):
        self.noted.append(seen)

    def wait(self):
        if len(self.noted) > self.updates:
            raise Ended


def learned(side, folder, method, checkpointing, updates, *, rate=1e-3, batch=1):
    """What a side notes: the number of trained values, then every update's loss and norm of the gradient."""
    pace = Counted(updates)
    with pytest.raises(Ended):
        training.SIDES[side](
            Job(side, "sd1", True, method, checkpointing, 64, batch, rate, str(folder), "float32", "cpu", None), pace
        )
    return pace.noted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seeded narrow weights, written once."""
    made = tmp_path_factory.mktemp("training") / "sd1"
    peers.write_folder(training.config_of("sd1", tiny=True), made, torch.float32)
    return made


@pytest.mark.parametrize(("method", "checkpointing", "batch"), [("full", True, 1), ("lora", False, 2)])
def test_both_sides_learn_the_same(with_peers, folder, method, checkpointing, batch):
    """Later losses too, after updates that change them: optimisers agree.

    1e-4, since Adam takes the sign of a gradient, which rounding alone may decide.
    """
    ours, theirs = (learned(side, folder, method, checkpointing, 2, batch=batch) for side in ("ldm", "diffusers"))
    assert ours[0] == theirs[0]
    assert ours[0]["trained"] > 0
    for i, (a, b) in enumerate(zip(ours[1:], theirs[1:], strict=True)):
        limits = {"loss": 1e-6, "grad_norm": 1e-5} if i == 0 else {"loss": 1e-4, "grad_norm": 1e-3}
        for name, limit in limits.items():
            assert a[name] == pytest.approx(b[name], rel=limit)


@pytest.mark.parametrize("side", training.SIDES)
def test_checkpointing_computes_every_attention_twice(with_peers, folder, side, monkeypatch):
    attend, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *given, **options: calls.append(1) or attend(*given, **options),
    )
    seen = []
    for checkpointing in (False, True):
        calls.clear()
        learned(side, folder, "lora", checkpointing, 1)
        seen.append(len(calls))
    assert seen == [32, 64]  # 16 transformer blocks of SD 1, each with two


def test_a_rate_of_learning_shows_in_the_second_loss(folder):
    """By five times what the test above lets pass at least, or it would compare nothing after the first update."""
    slow, fast = (learned("ldm", folder, "lora", False, 2, rate=rate) for rate in (1e-9, 1e-3))
    assert slow[1] == fast[1]
    assert fast[2]["loss"] != pytest.approx(slow[2]["loss"], rel=5e-4)


def test_the_clock_stands_still_while_nobody_asks(monkeypatch):
    now, told = [1000], []

    class Patient(io.StringIO):
        def readline(self):
            now[0] += 100
            return super().readline()

    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(training.sys, "stdin", Patient("\n\n"))
    monkeypatch.setattr(training, "forget_peak", lambda device: told.append("peak forgotten"))
    pace = training.Asked("cpu", told.append)
    for seconds, noted in ((7, {"trained": 5}), (2, {"loss": 1.0})):
        now[0] += seconds
        pace.note(**noted)
        pace.wait()
    now[0] += 3
    with pytest.raises(Ended):
        pace.wait()
    load, forgotten, *updates = told
    assert forgotten == "peak forgotten"  # that of loading, which is told before
    assert (load["seconds"], load["trained"]) == (7, 5)
    assert [(update["seconds"], update["loss"]) for update in updates] == [(2, 1.0), (3, 1.0)]


def test_a_side_that_cannot_begin_says_why_but_not_where(tmp_path):
    told, lost = [], str(tmp_path / "nothing")
    job = Job("ldm", "sd1", True, "lora", False, 64, 1, 1e-4, lost, "float32", "cpu", None)
    training.answers(job, told.append)
    assert "nothing" in told[0]["failed"]
    assert str(tmp_path) not in told[0]["failed"]  # it goes into a file that others read
