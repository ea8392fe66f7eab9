"""The loop: what an update is, what it leaves out, and that an interrupted run ends where it would have."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.seeded import normal
from ldm.errors import ArgumentError, NonFinite
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.loop import PATIENCE, Fitted, Watchers, accumulation, fit
from ldm.train.recipe import Group, Objective, Optimizer, Recipe, Run, Watch
from ldm.train.state import latest_state
from ldm.train.tasks import Loss

RECIPE = Recipe(
    "line", objective=Objective(), optimizer=Optimizer(lr=1e-2, schedule="linear", warmup=3, decay=0.5),
    run=Run(steps=12, batch=4, micro=2, ema=0.9, save_every=4), watch=Watch(log_every=5),
)  # fmt: skip


class Line(nn.Module):
    """Learns to add three numbers up; NaN for the examples in `broken`."""

    def __init__(self, seed: int = 0, broken: range = range(0)):
        super().__init__()
        self.w, self.bias = nn.Parameter(normal(f"w{seed}", (3,))), nn.Parameter(normal(f"b{seed}", (1,)))
        self.broken, self.seen = broken, []

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        self.seen += batch.index
        x = draws.normal("x", (3,))
        each = (x @ self.w + self.bias - x.sum(1)).square().float()
        bad = torch.tensor([i in self.broken for i in batch.index])
        return Loss(torch.where(bad, math.nan, 1.0) * each, draws.integers("timestep", 1000), 1000)

    def named(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


def micro(size: int):
    def made(number: int) -> Batch:
        return Batch(tuple(range(number * size, (number + 1) * size)), ("",) * size, (8, 8), (), torch.ones(size))

    return made


def run(out: Path, recipe: Recipe = RECIPE, task: Line | None = None, **more) -> tuple[Fitted, Line]:
    task = task or Line()
    return fit(
        task, task.named(), micro(recipe.run.micro), recipe, out, state=latest_state(out / "states"), **more
    ), task


def changed(**keys) -> Recipe:
    """RECIPE with keys of [run]."""
    return replace(RECIPE, run=replace(RECIPE.run, **keys))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_loop_minimises_the_loss(tmp_path: Path) -> None:
    recipe = replace(changed(steps=400, save_every=400), optimizer=replace(RECIPE.optimizer, lr=3e-2))
    fitted, _ = run(tmp_path, recipe)
    assert torch.allclose(fitted.averaged["w"], torch.ones(3), atol=0.05)


def test_an_update_is_adamw_on_the_mean_of_its_examples(tmp_path: Path) -> None:
    """Loshchilov & Hutter 2019, algorithm 2, written out for the first update; the average is LitEma's."""
    recipe = replace(
        changed(steps=1), optimizer=Optimizer(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.5, clip=0.0)
    )
    fitted, task = run(tmp_path, recipe)
    start = Line()
    draws = Draws(0, range(4))
    x = draws.normal("x", (3,))
    (gradient,) = torch.autograd.grad((x @ start.w + start.bias - x.sum(1)).square().mean(), [start.w])
    wanted = start.w * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-6)
    assert torch.allclose(task.w, wanted, rtol=1e-5)
    decay = 2 / 11
    assert torch.allclose(fitted.averaged["w"], decay * start.w + (1 - decay) * wanted, rtol=1e-5)


def test_accumulating_changes_nothing_but_rounding(tmp_path: Path) -> None:
    ends = [run(tmp_path / str(size), changed(micro=size)) for size in (4, 2, 1)]
    for fitted, task in ends[1:]:
        assert torch.allclose(task.w, ends[0][1].w, rtol=1e-6)
        assert torch.allclose(fitted.averaged["w"], ends[0][0].averaged["w"], rtol=1e-6)
    assert ends[0][1].seen == ends[1][1].seen == ends[2][1].seen == list(range(48))


def test_without_an_average_the_weights_themselves_are_the_result(tmp_path: Path) -> None:
    fitted, task = run(tmp_path, changed(ema=0.0))
    assert same(fitted.averaged, {name: p.detach() for name, p in task.named().items()})


def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path) -> None:
    """AdamW divides by the size of the gradient, so that only its eps shows what came."""
    recipe = replace(changed(steps=1, ema=0.0), optimizer=Optimizer(lr=1.0, eps=1.0, weight_decay=0.0, clip=0.01))
    _, task = run(tmp_path, recipe)
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(task.parameters(), Line().parameters(), strict=True)])
    assert moved.norm() == pytest.approx(0.01, rel=0.02)


def test_parameters_have_the_rates_of_their_groups(tmp_path: Path) -> None:
    recipe = replace(
        changed(steps=1, ema=0.0), optimizer=Optimizer(lr=0.1, weight_decay=0.0, groups=(Group("bias", 0.0),))
    )
    _, task = run(tmp_path, recipe)
    assert torch.equal(task.bias, Line().bias)
    assert not torch.equal(task.w, Line().w)


def test_a_run_that_stops_and_goes_on_ends_bit_for_bit_where_it_would_have(tmp_path: Path) -> None:
    straight, whole = run(tmp_path / "straight")
    asked = iter([False] * 6 + [True] * 99)
    stopped, _ = run(tmp_path / "stopped", watchers=Watchers(stop=lambda: next(asked)))
    assert (stopped.step, stopped.stopped) == (7, True)
    other = Line(seed=1)  # other weights at first: all must come from the state
    ended, task = run(tmp_path / "stopped", task=other)
    assert same(ended.averaged, straight.averaged)
    assert same(dict(task.named_parameters()), dict(whole.named_parameters()))
    assert other.seen == list(range(28, 48))
    a, b = (latest_state(tmp_path / name / "states").open() for name in ("straight", "stopped"))
    assert same(dict(a), dict(b)), "moments, averages and weights"
    assert any(name.startswith("adam/exp_avg_sq/") for name in a)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    task = Line(seed=1)
    again, _ = run(tmp_path, task=task)
    assert same(first.averaged, again.averaged)
    assert task.seen == []


def test_a_finished_run_goes_on_where_more_updates_are_asked_for(tmp_path: Path) -> None:
    run(tmp_path)
    fitted, task = run(tmp_path, changed(steps=14))
    assert fitted.step == 14
    assert task.seen == list(range(48, 56))


def test_the_state_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    run(tmp_path, identity={"optimizer": {"lr": 0.01}, "data": {"hash": "a"}})
    with pytest.raises(
        ArgumentError, match=r"holds a run with another optimizer.lr \(0.01, not 0.02\); use another run.out"
    ):
        run(tmp_path, identity={"optimizer": {"lr": 0.02}, "data": {"hash": "a"}})
    with pytest.raises(ArgumentError, match=r"another data.hash \(a, not b\)"):
        run(tmp_path, identity={"optimizer": {"lr": 0.01}, "data": {"hash": "b"}})


def test_an_update_with_a_loss_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    events: list[dict] = []
    fitted, task = run(tmp_path / "a", task=Line(broken=range(9, 13)), watchers=Watchers(event=events.append))
    assert fitted.skipped == 2
    assert torch.isfinite(task.w).all()
    skips = [event for event in events if event["event"] == "skipped"]
    assert [event["step"] for event in skips] == [3, 4]
    assert math.isnan(skips[0]["loss"])
    assert [event["step"] for event in events if event["event"] == "saved"] == [8, 12], (
        "step 4, right after such an update, is no state to go back to"
    )


def test_ten_such_updates_in_a_row_end_the_run_and_keep_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(
        NonFinite, match=r"10 times in a row, at step 15 last; the state of step 4 is kept: lower optimizer.lr"
    ):
        run(tmp_path, changed(steps=40), task=Line(broken=range(24, 4 * 40)))
    state = latest_state(tmp_path / "states")
    assert state.step == 4
    assert all(torch.isfinite(tensor).all() for tensor in state.open().values())
    assert PATIENCE == 10


def test_what_is_logged_is_the_mean_since_the_last_line(tmp_path: Path) -> None:
    records: list[dict] = []
    ticks: list[int] = []
    run(tmp_path, watchers=Watchers(log=records.append, tick=ticks.append))
    assert [record["step"] for record in records] == [5, 10, 12]
    assert ticks == list(range(1, 13))
    last = records[-1]
    assert last["lr"] == pytest.approx(1e-2 * (12 - 11) / 6)
    assert last["grad_norm"] > 0
    assert last["examples_per_second"] > 0
    assert sum(last["band_counts"]) == 8
    total = sum(mean * count for mean, count in zip(last["bands"], last["band_counts"], strict=True) if count)
    assert total / 8 == pytest.approx(last["loss"], rel=1e-5)
    assert all((mean is None) == (count == 0) for mean, count in zip(last["bands"], last["band_counts"], strict=True))


def test_validation_sees_the_averaged_weights(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    recipe = replace(RECIPE, watch=Watch(every=4))
    task = Line()
    run(
        tmp_path,
        recipe,
        task,
        watchers=Watchers(
            validate=lambda step, averaged: seen.append((step, (averaged["w"] - task.w).abs().max().item()))
        ),
    )
    assert [step for step, _ in seen] == [4, 8]
    assert all(apart > 0 for _, apart in seen)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_goes_on_from_its_state(dtype: str, tmp_path: Path) -> None:
    recipe = replace(changed(steps=150, dtype=dtype, save_every=75), optimizer=replace(RECIPE.optimizer, lr=6e-2))
    fitted, _ = run(tmp_path / "a", recipe)
    assert torch.allclose(fitted.averaged["w"], torch.ones(3), atol=0.05)
    asked = iter([False] * 74 + [True] * 99)
    run(tmp_path / "b", recipe, watchers=Watchers(stop=lambda: next(asked)))
    again, _ = run(tmp_path / "b", recipe)
    assert same(again.averaged, fitted.averaged)
    if dtype == "float16":
        assert latest_state(tmp_path / "a" / "states").facts["scaler"]["scale"] > 0


class Steep(Line):
    """A gradient that float16's first loss scale overflows."""

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        loss = super().forward(batch, draws)
        return loss._replace(each=loss.each * 100)


def test_overflow_of_the_loss_scale_is_not_counted_as_a_fault(tmp_path: Path) -> None:
    recipe = replace(changed(steps=40, dtype="float16"), optimizer=replace(RECIPE.optimizer, clip=1.0))
    events: list[dict] = []
    fitted, task = run(tmp_path, recipe, Steep(), watchers=Watchers(event=events.append))
    assert fitted.skipped == 0
    assert not [event for event in events if event["event"] == "skipped"]
    assert latest_state(tmp_path / "states").facts["scaler"]["scale"] < 65536
    assert torch.isfinite(task.w).all()


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    assert accumulation(changed(batch=8, micro=2).run, 4) == 1
    with pytest.raises(
        ArgumentError,
        match=r"run.batch: 8 examples cannot be shared evenly by 3 ranks with 2 at once; give a multiple of 6",
    ):
        accumulation(changed(batch=8, micro=2).run, 3)


class Bottomless(Line):
    """A gradient that no loss scale makes finite."""

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        loss = super().forward(batch, draws)
        return loss._replace(each=loss.each + (self.w - self.w.detach()).sqrt().sum())


def test_a_gradient_that_no_loss_scale_makes_finite_ends_the_run_too(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"10 times in a row, at step 25 last"):
        run(tmp_path, changed(steps=40, dtype="float16"), Bottomless())
