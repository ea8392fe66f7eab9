"""AdamW as the paper writes it, with rates by group; what it remembers goes away and comes back bit by bit."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.errors import ArgumentError, FileError
from ldm.train.optim import load_state_tensors, optimizer, state_tensors
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
        match=rf"optimizer\.groups: '{groups[-1].match}' is in the name of no parameter left for it; names look like unet\.weight",
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
    """What 8-bit optimisers keep: a count that is no tensor, whole numbers, and tables that belong to no parameter's shape."""
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
