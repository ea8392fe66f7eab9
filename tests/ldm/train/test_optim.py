"""AdamW as the paper writes it, rates by group and over a run, and the optimiser's state, which comes back bit by
bit."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.errors import ArgumentError, FileError
from ldm.train.optim import ema_decay, factor, last_rate, load_state_tensors, optimizer, state_tensors
from ldm.train.recipe import Group, Optimizer


def network() -> dict[str, nn.Parameter]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.ModuleDict({"unet": nn.Linear(3, 4), "text": nn.Linear(4, 2)})
    return dict(module.named_parameters())


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, p in parameters.items():
        p.grad = None if name == "text.bias" else torch.randn(p.shape, generator=generator)  # one is never used


def update(adam: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(parameters, step)
        adam.step()


def test_an_update_is_the_papers():
    """Loshchilov & Hutter 2019, algorithm 2, in float64 with plain Python numbers."""
    p = nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))
    settings = Optimizer(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    adam = optimizer({"p": p}, settings)
    wanted, m, v = p.tolist(), [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 6):
        g = [math.sin(t), math.cos(2 * t)]
        p.grad = torch.tensor(g, dtype=torch.float64)
        adam.step()
        for i in range(2):
            m[i], v[i] = 0.8 * m[i] + 0.2 * g[i], 0.95 * v[i] + 0.05 * g[i] ** 2
            step = m[i] / (1 - 0.8**t) / (math.sqrt(v[i] / (1 - 0.95**t)) + 1e-6)
            wanted[i] -= 0.01 * (step + 0.1 * wanted[i])
    assert p.tolist() == pytest.approx(wanted, rel=1e-13)


def test_each_parameter_learns_at_the_rate_of_the_first_group_that_its_name_contains():
    parameters = network()
    adam = optimizer(parameters, Optimizer(lr=1e-3, groups=(Group("^text", 1e-5), Group("bias$", 1e-4))))
    rates = {id(p): (group["lr"], group["initial_lr"]) for group in adam.param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in parameters.items()} == {
        "unet.weight": (1e-3, 1e-3), "unet.bias": (1e-4, 1e-4), "text.weight": (1e-5, 1e-5), "text.bias": (1e-5, 1e-5),
    }  # fmt: skip


def test_where_groups_take_everything_there_is_no_other():
    assert [group["lr"] for group in optimizer(network(), Optimizer(groups=(Group(".", 0.5),))).param_groups] == [0.5]


@pytest.mark.parametrize(
    "groups", [(Group("vae", 1e-5),), (Group("text", 1e-5), Group("text.bias", 1e-4))], ids=["nothing", "taken already"]
)
def test_a_group_without_parameters_is_refused(groups):
    with pytest.raises(
        ArgumentError,
        match=rf"optimizer\.groups: '{groups[-1].match}' is in the name of no parameter left for it; names look like "
        r"unet\.weight",
    ):
        optimizer(network(), Optimizer(groups=groups))


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(
        ArgumentError,
        match=r"optimizer\.groups: '\(' is no regular expression \(missing \), unterminated subpattern at position 0\)",
    ):
        optimizer(network(), Optimizer(groups=(Group("(", 1e-5),)))


def test_8_bit_is_asked_of_bitsandbytes_and_says_so_where_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ArgumentError,
        match=r"adamw8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or take adamw",
    ):
        optimizer(network(), Optimizer(kind="adamw8bit"))
    monkeypatch.setitem(
        sys.modules,
        "bitsandbytes",
        SimpleNamespace(optim=SimpleNamespace(AdamW8bit=type("AdamW8bit", (torch.optim.AdamW,), {}))),
    )
    assert type(optimizer(network(), Optimizer(kind="adamw8bit"))).__name__ == "AdamW8bit"


def test_an_optimiser_that_went_away_and_came_back_goes_on_bit_by_bit():
    straight, resumed = network(), network()
    settings = Optimizer(lr=0.1, groups=(Group("bias", 0.01),))
    update(optimizer(straight, settings), straight, range(6))
    before = optimizer(resumed, settings)
    update(before, resumed, range(3))
    kept = {key: tensor.clone() for key, tensor in state_tensors(before, resumed).items()}
    assert set(kept) == {
        f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in resumed if name != "text.bias"
    }
    after = optimizer(resumed, settings)
    load_state_tensors(after, resumed, kept)
    update(after, resumed, range(3, 6))
    assert all(straight[name].equal(resumed[name]) for name in straight)
    assert kept["step/unet.weight"] == 3  # what was kept is not what goes on


def test_counts_in_python_and_tables_of_another_shape_come_back_as_they_were():
    """What 8-bit optimisers keep: a count that is no tensor, whole numbers, and tables that belong to no parameter's
    shape."""
    parameters = network()
    adam = optimizer(parameters, Optimizer())
    p = parameters["unet.weight"]
    adam.state[p] = {
        "step": 7,
        "state1": torch.arange(12, dtype=torch.uint8).reshape(4, 3),
        "qmap1": torch.linspace(-1, 1, 256),
        "absmax1": torch.ones(1),
        "none": None,
    }
    kept = state_tensors(adam, parameters)
    other = optimizer(parameters, Optimizer())
    load_state_tensors(other, parameters, kept)
    back = other.state[p]
    assert back["step"] == 7
    assert type(back["step"]) is int
    assert all(
        back[key].dtype == adam.state[p][key].dtype and back[key].equal(adam.state[p][key])
        for key in ("state1", "qmap1", "absmax1")
    )
    assert set(back) == {"step", "state1", "qmap1", "absmax1"}


def test_the_memory_of_a_parameter_that_is_not_trained_is_refused():
    parameters = network()
    with pytest.raises(
        FileError, match=r"the state remembers vae\.weight, which is not trained; use another directory"
    ):
        load_state_tensors(optimizer(parameters, Optimizer()), parameters, {"exp_avg/vae.weight": torch.zeros(1)})


def curve(settings: Optimizer, steps: int) -> list[float]:
    return [factor(settings, steps, step) for step in range(steps)]


def test_without_a_warm_up_a_constant_rate_is_whole_from_the_first_update() -> None:
    assert curve(Optimizer(), 5) == [1.0] * 5


def test_the_warm_up_rises_in_equal_parts_and_wastes_no_update_on_nothing() -> None:
    assert curve(Optimizer(warmup=4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_run_shorter_than_its_warm_up_ends_on_the_way_up() -> None:
    assert curve(Optimizer(warmup=4, schedule="cosine"), 2) == [0.25, 0.5]


def test_a_linear_rate_falls_from_the_warm_up_to_one_part_before_nothing() -> None:
    assert curve(Optimizer(schedule="linear", warmup=2), 6) == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_a_linear_rate_falls_over_the_last_part_only_where_that_is_asked_for() -> None:
    assert curve(Optimizer(schedule="linear", decay=0.4), 10) == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_cosine_passes_its_middle_halfway_between_warm_up_and_end() -> None:
    rates = curve(Optimizer(schedule="cosine", warmup=10), 110)
    assert rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert rates[109] == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_restarts_begin_each_cycle_with_the_whole_rate() -> None:
    rates = curve(Optimizer(schedule="cosine-restarts", cycles=4, warmup=20), 120)
    assert [step for step in range(20, 120) if rates[step] == 1] == [20, 45, 70, 95]
    assert rates[44] < 0.01
    assert rates[20:45] == rates[95:120]


def test_one_cycle_of_restarts_is_a_cosine() -> None:
    assert curve(Optimizer(schedule="cosine-restarts", warmup=3), 17) == curve(
        Optimizer(schedule="cosine", warmup=3), 17
    )


def test_more_cycles_than_updates_stay_between_nothing_and_the_whole() -> None:
    assert all(0 <= rate <= 1 for rate in curve(Optimizer(schedule="cosine-restarts", cycles=100, warmup=1), 7))


def test_the_next_run_takes_the_last_rate_that_was_logged(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "lr": 1e-05}',
        '{"step": 2, "lr": 2.5e-06}',
        '{"step": 2, "event": "saved"}',
        '{"step": 3, "validation_loss": 1, "lr": null}',
        "[1]",
        '{"step": 4, "lr": 9e-0',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert last_rate(tmp_path) == 2.5e-06


@pytest.mark.parametrize("text", ["", '{"step": 1, "lr": 0.0}\n', '{"step": 1}\n', "\x00\xff"])
def test_a_log_without_a_rate_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(FileError, match="names no learning rate above 0; give optimizer"):
        last_rate(tmp_path)


def test_a_directory_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"log\.jsonl: cannot be read .*lr_from is the directory of an earlier run"):
        last_rate(tmp_path)


def test_averaged_weights_keep_little_of_themselves_at_first_and_their_decay_in_the_end() -> None:
    assert [ema_decay(0.9999, step) for step in (1, 8, 89_990)] == [2 / 11, 0.5, 0.9999]
    assert ema_decay(0.3, 8) == 0.3
