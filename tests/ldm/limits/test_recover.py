"""UNet calls where half precision overflows or memory is short, and where NaN and infinity begin."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.golden import fill
from benchmarks.models.seeded import normal
from ldm.conditioning.cond import Cond
from ldm.config import SD1, ModelConfig, VAEConfig
from ldm.denoiser import guided, predict_x0
from ldm.errors import MemoryLimit, NonFinite
from ldm.limits import recover
from ldm.limits.recover import converted, first_not_finite, weights_not_finite
from ldm.model import LatentDiffusion
from samplers import cfg
from tests.made.warned import caught


@pytest.fixture
def half() -> LatentDiffusion:
    return fill(LatentDiffusion(SMALL), lambda key: key).half()


SMALL = ModelConfig(
    "tiny",
    vae=VAEConfig(channels=32),
    size=64,
    unet=replace(
        SD1,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        down_depth=((1,), (0,)),
        up_depth=((0, 0), (1, 1)),
        cross_only=(False, False),
        context_dim=64,
    ),
    text=(),
)
X, CONDS = normal("x", (1, 4, 8, 8)), [Cond(normal(name, (1, 77, 64))) for name in ("u", "c")]


def enlarge(layer: nn.Module, by: float) -> None:
    with torch.no_grad():
        layer.weight.mul_(by)


def as_(model: LatentDiffusion, dtype: torch.dtype) -> LatentDiffusion:
    return copy.deepcopy(model).to(dtype)


def calls_of(module: nn.Module) -> list[torch.dtype]:
    """The type of every output of a module, and of its copies, from now on."""
    seen: list[torch.dtype] = []
    module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    return seen


def test_what_overflows_float16_is_computed_in_bfloat16_for_the_rest_of_the_run(half: LatentDiffusion) -> None:
    enlarge(half.unet.input_blocks[0][0], 8e4)  # its output, beyond 65504, is what the norms after it take back
    expected = [predict_x0(as_(half, torch.bfloat16), X, sigma, CONDS[0]) for sigma in (3.0, 2.0)]
    seen = calls_of(half.unet.input_blocks[0][0])
    denoise = guided(half, CONDS, cfg(0.0))
    out, (message,) = caught(lambda: [denoise(X, 3.0), denoise(X, 2.0)])
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert (
        message
        == "UNet: NaN or infinity at sigma 3 in float16, first at input_blocks.0.0; computed in bfloat16 from here on"
    )
    assert seen[-2:] == [torch.bfloat16, torch.bfloat16]
    assert seen.count(torch.bfloat16) == 2
    assert half.dtype == torch.float16
    assert {p.dtype for p in half.unet.parameters()} == {torch.float16}


def test_one_call_alone_is_done_again_too(half: LatentDiffusion) -> None:
    enlarge(half.unet.input_blocks[0][0], 8e4)
    out, (message,) = caught(lambda: predict_x0(half, X, 1.0, CONDS[0]))
    assert torch.equal(out, predict_x0(as_(half, torch.bfloat16), X, 1.0, CONDS[0]))
    assert "computed in bfloat16" in message


def test_the_context_is_converted_once_and_anew_for_a_wider_copy(half: LatentDiffusion) -> None:
    """Fast networks keep the keys and values of a context, which they know again by its place in memory."""
    seen: list[Tensor] = []
    half.unet.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    denoise = guided(half, CONDS, cfg(5.0))
    for sigma in (3.0, 2.0):
        denoise(X, sigma)
    assert seen[0].data_ptr() == seen[1].data_ptr()
    enlarge(half.unet.input_blocks[0][0], 8e4)
    caught(lambda: [denoise(X, 3.0), denoise(X, 2.0)])
    assert [context.dtype for context in seen[-2:]] == [torch.bfloat16] * 2
    assert seen[-1].data_ptr() == seen[-2].data_ptr()
    assert torch.equal(seen[-1], torch.cat([cond.context for cond in CONDS]).to(torch.bfloat16))


class Naive(nn.Module):
    """Attention whose products of q and k are numbers of q's type, as in kernels that overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append(q.dtype)
        return ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def test_where_attention_overflows_it_alone_is_computed_in_float32(half: LatentDiffusion) -> None:
    attention = half.unet.input_blocks[1][1].transformer_blocks[0].attn1
    attention.attend = naive = Naive()
    enlarge(attention.to_q, 5e3)  # times 100 in each of the 4 channels of a head: beyond 65504
    enlarge(attention.to_k, 1e2)
    denoise = guided(half, CONDS, cfg(0.0))
    (first, second), (message,) = caught(lambda: (denoise(X, 3.0), denoise(X, 2.0)))
    assert (
        message
        == "UNet: NaN or infinity at sigma 3 in float16, first at input_blocks.1.1.transformer_blocks.0.attn1.attend; "
        "computed with attention in float32 from here on"
    )
    assert naive.seen[-2:] == [torch.float32, torch.float32]  # the very module that was swapped in
    assert attention.attend is naive
    for sigma, out in ((3.0, first), (2.0, second)):
        exact = predict_x0(as_(half, torch.float32), X, sigma, CONDS[0])
        assert (out - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()


def test_what_overflows_bfloat16_is_computed_in_float32(half: LatentDiffusion) -> None:
    layer = half.unet.middle_block[0]
    model = half.to(torch.bfloat16)
    expected = predict_x0(as_(model, torch.float32), X, 1.0, CONDS[0])
    layer.register_forward_hook(lambda module, args, out: out if out.dtype == torch.float32 else out * math.inf)
    out, (message,) = caught(lambda: predict_x0(model, X, 1.0, CONDS[0]))
    assert torch.equal(out, expected)
    assert (
        message
        == "UNet: NaN or infinity at sigma 1 in bfloat16, first at middle_block.0; computed in float32 from here on"
    )


def test_what_overflows_float32_is_an_error_that_names_sigma_and_module(half: LatentDiffusion) -> None:
    model = half.float()
    enlarge(model.unet.input_blocks[0][0], 1e38)
    enlarge(model.unet.input_blocks[0][0], 3e1)
    with pytest.raises(
        NonFinite,
        match=r"UNet: NaN or infinity at sigma 14.61 in float32, first at input_blocks.0.0(; weights not finite: .*)?; "
        "use other weights",
    ):
        predict_x0(model, X, 14.6146, CONDS[0])


def test_what_no_type_can_compute_is_an_error(half: LatentDiffusion) -> None:
    half.unet.out[2].register_forward_hook(lambda module, args, out: out / 0)
    with pytest.raises(
        NonFinite, match=r"UNet: NaN or infinity at sigma 1 even in float32, first at out.2; use other weights"
    ):
        predict_x0(half, X, 1.0, CONDS[0])


def test_weights_that_are_not_finite_are_named_and_nothing_is_tried_again(
    half: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        half.unet.middle_block[0].in_layers[2].weight[0] = math.nan
    monkeypatch.setattr(recover, "wider", lambda unet: pytest.fail("tried again"))
    name = "middle_block.0.in_layers.2"
    with pytest.raises(
        NonFinite,
        match=rf"at sigma 1 in float16, first at {name}; weights not finite: {name}.weight; use other weights",
    ):
        predict_x0(half, X, 1.0, CONDS[0])


@pytest.mark.parametrize("what", ["x", "the context"])
def test_what_is_broken_before_the_network_is_not_its_fault(half: LatentDiffusion, what: str) -> None:
    x, context = X.clone(), CONDS[0].context.clone()
    {"x": x, "the context": context}[what][0, 0, 0] = math.nan
    with pytest.raises(NonFinite, match=rf"UNet: at sigma 1, {what} has NaN or infinity before the UNet has seen it"):
        predict_x0(half, x, 1.0, Cond(context))


def test_what_is_broken_in_what_is_concatenated_is_named() -> None:
    model = fill(LatentDiffusion(replace(SMALL, unet=replace(SMALL.unet, in_channels=9))), lambda key: key)
    concat = normal("concat", (1, 5, 8, 8))
    concat[0, 4, 7, 7] = math.inf
    with pytest.raises(NonFinite, match="UNet: at sigma 1, what is concatenated has NaN or infinity before the UNet"):
        predict_x0(model, X, 1.0, replace(CONDS[0], concat=concat))


def short_of_memory(model: LatentDiffusion, most: int) -> list[int]:
    """Lets the UNet take so many at a time; the sizes it was asked for."""
    sizes: list[int] = []

    def refuse(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.unet.register_forward_pre_hook(refuse)
    return sizes


def test_without_memory_for_a_batch_it_is_computed_in_parts_from_then_on(half: LatentDiffusion) -> None:
    model, x = half.float(), normal("x", (3, 4, 8, 8))
    conds = [Cond(normal(name, (3, 77, 64))) for name in ("u", "c")]
    expected = guided(model, conds, cfg(5.0))(x, 2.0)
    sizes = short_of_memory(model, 2)
    denoise = guided(model, conds, cfg(5.0))
    (out, _), (message,) = caught(lambda: (denoise(x, 2.0), denoise(x, 1.0)))
    assert torch.allclose(out, expected, atol=1e-3)  # 5 times the rounding of two batch sizes at sigma 2
    assert sizes == [6, 3, 2, 2, 2, 2, 2, 2]
    assert message == "UNet: the GPU's memory does not suffice for a batch of 6: it is computed in parts from here on"


def test_without_memory_for_a_single_picture_it_is_an_error(half: LatentDiffusion) -> None:
    short_of_memory(half, 0)
    with pytest.raises(
        MemoryLimit,
        match=r"does not suffice for 80x64, one picture and condition at a time; use a smaller size, or --offload",
    ):
        caught(lambda: guided(half, CONDS, cfg(5.0))(normal("x", (1, 4, 8, 10)), 2.0))


# --- where NaN and infinity begin -----------------------------------------------------------------------------------


def test_the_first_module_is_the_innermost_that_ran_first() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    network = nn.Sequential(nn.Identity(), Doubled(), nn.Identity())
    assert first_not_finite(network, lambda: network(torch.tensor(3e38))) == "1"
    assert first_not_finite(network, lambda: network(torch.tensor(torch.inf))) == "0"
    assert first_not_finite(network, lambda: network(torch.tensor(1.0))) is None
    assert not any(module._forward_hooks for module in network.modules())


def test_a_converted_copy_leaves_the_original_alone() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network[1].weight = network[0].bias  # one tensor under two names stays one
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copied = converted(network, torch.bfloat16)
    assert {name: value.dtype for name, value in copied.state_dict().items()} == {
        name: torch.bfloat16 if value.is_floating_point() else value.dtype for name, value in before.items()
    }
    assert copied[1].weight is copied[0].bias
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.dtype == before[name].dtype for name, value in network.state_dict().items())
    assert weights_not_finite(copied) == []
