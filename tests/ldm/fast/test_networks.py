"""Work that leaves the step: what is computed once in a run, or once for both halves of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.models.golden import relative
from benchmarks.models.seeded import normal
from ldm.conditioning.cond import Cond
from ldm.denoiser import guided
from ldm.fast import optimize, plain
from ldm.fast.networks import FastUNet
from ldm.model import LatentDiffusion
from ldm.networks.attention import CrossAttention
from samplers import cfg
from tests.made.inputs import STATED, inputs


class Counted:
    """The plain operations, counted."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __getattr__(self, name: str):
        def call(x: Tensor, *args, **keywords) -> Tensor:
            self.calls.append((name, tuple(x.shape)))
            return getattr(plain, name)(x, *args, **keywords)

        return call


@pytest.fixture
def counted(sd1: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> tuple[FastUNet, Counted]:
    unet, ops = optimize(sd1).unet, Counted()
    monkeypatch.setattr(type(unet), "ops", ops)
    return unet, ops


@torch.no_grad()
def test_keys_and_values_of_a_context_are_computed_once(
    sd1: LatentDiffusion, counted: tuple[FastUNet, Counted]
) -> None:
    unet, ops = counted
    x, t, context, _ = inputs(sd1)
    layers = sum(
        isinstance(module, CrossAttention) for module in unet.modules()
    )  # as many as half of them have keys and values to compute

    def told() -> int:
        ops.calls.clear()
        assert relative(unet(x, t, context), sd1.unet(x, t, context)) < STATED
        return ops.calls.count(("linear", tuple(context.shape)))

    assert [told(), told(), told()] == [layers, 0, 0]
    context.mul_(2)
    assert [told(), told()] == [layers, 0]
    context = context.clone()
    assert [told(), told()] == [layers, 0]
    weight = next(p for name, p in sd1.unet.named_parameters() if name.endswith("attn2.to_v.weight"))
    weight.mul_(2)
    assert [told(), told()] == [layers, 0]
    weight.mul_(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_they_are_computed_once_in_a_run(
    sd1: LatentDiffusion, counted: tuple[FastUNet, Counted], dtype: torch.dtype
) -> None:
    unet, ops = counted
    fast = optimize(sd1)
    fast.unet = unet
    if dtype != torch.float32:
        fast = copy.deepcopy(fast).to(dtype)
        type(fast.unet).made_for = "cpu", dtype
    conds = [Cond(normal(name, (1, 5, 64))) for name in ("uncond", "cond")]
    denoise = guided(fast, conds, cfg(3.0))
    for sigma in (9.0, 3.0, 1.0):
        denoise(normal("x", (1, 4, 8, 8)), sigma)
    assert ops.calls.count(("linear", (2, 5, 64))) == sum(
        isinstance(module, CrossAttention) for module in unet.modules()
    )


@torch.no_grad()
def test_what_both_halves_of_a_guided_batch_share_is_computed_once(
    sd1: LatentDiffusion, counted: tuple[FastUNet, Counted]
) -> None:
    unet, ops = counted
    first = next(i for i, block in enumerate(unet.input_blocks) if len(block) > 1)  # the first with a transformer
    for given, rows in ((inputs(sd1), 2), (inputs(sd1, guided=True), 1)):
        ops.calls.clear()
        assert relative(unet(*given), sd1.unet(*given)) < STATED
        before = ops.calls[: [name for name, _ in ops.calls].index("attend")]
        assert {shape[0] for name, shape in before if name == "conv"} == {rows}
        assert ops.calls[-1][1][0] == 2
    assert first == 1


@torch.no_grad()
def test_halves_that_differ_in_time_alone_are_not_shared(sd1: LatentDiffusion) -> None:
    x, t, context, _ = inputs(sd1)
    given = x[:1].repeat(2, 1, 1, 1), t, context
    assert relative(optimize(sd1).unet(*given), sd1.unet(*given)) < STATED


@torch.no_grad()
def test_in_inference_mode_nothing_is_kept_of_what_cannot_be_watched(sd1: LatentDiffusion) -> None:
    fast = optimize(sd1)
    with torch.inference_mode():
        x, t, context, _ = inputs(sd1)
        context = context + 0
        fast.unet(x, t, context)
        context.mul_(2)
        assert relative(fast.unet(x, t, context), sd1.unet(x, t, context)) < STATED
