"""From predictions of eps and v to x0, and guidance in one batched call."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.golden import CLIP_L_TINY, fill
from benchmarks.models.seeded import normal
from ldm.conditioning.cond import Cond
from ldm.config import CLIP_L, SD1, ModelConfig, VAEConfig
from ldm.denoiser import guided, predict_x0, to_x0
from ldm.errors import ArgumentError, MemoryLimit, NonFinite
from ldm.limits import recover
from ldm.model import LatentDiffusion
from samplers import cfg
from tests.made.warned import caught

TINY = ModelConfig(
    "tiny",
    unet=replace(SD1, model_channels=32, context_dim=64),
    vae=VAEConfig(channels=32),
    text=(CLIP_L_TINY,),
    size=64,
)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return fill(LatentDiffusion(TINY), lambda key: key)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_a_perfect_prediction_gives_x0_back(sigma: float) -> None:
    x0, eps = normal("x0", (1, 4, 8, 8)).double(), normal("eps", (1, 4, 8, 8)).double()
    alpha = 1 / math.sqrt(1 + sigma**2)
    v = alpha * eps - sigma * alpha * x0
    x = x0 + sigma * eps
    assert torch.allclose(to_x0("eps", x, eps, sigma), x0)
    assert torch.allclose(to_x0("v", x, v, sigma), x0)


def test_the_network_is_asked_at_unit_variance_and_its_own_timestep(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(model.unet, "forward", lambda x, t, context, y: asked.append((x, t)) or torch.zeros_like(x))
    x, sigma = normal("x", (2, 4, 8, 8)), model.schedule.sigmas[700]
    assert torch.equal(predict_x0(model, x, sigma, Cond(normal("c", (2, 77, 64)))), x)
    ((seen, t),) = asked
    assert torch.allclose(seen, x / math.sqrt(1 + sigma**2))
    assert t.tolist() == [700.0, 700.0]


def counted(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    forward = model.unet.forward

    def spy(x: Tensor, *args: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(x, *args)

    monkeypatch.setattr(model.unet, "forward", spy)
    return sizes


def test_guidance_asks_once_for_both_conditions(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = counted(model, monkeypatch)
    x, (uncond, cond) = normal("x", (1, 4, 8, 8)), (Cond(normal(name, (1, 77, 64))) for name in ("u", "c"))
    both = guided(model, [uncond, cond], cfg(5.0))(x, 2.0)
    assert sizes == [2]
    a, b = predict_x0(model, x, 2.0, uncond), predict_x0(model, x, 2.0, cond)
    assert torch.allclose(both, a + 5 * (b - a), atol=1e-3)  # 5 times the rounding of two batch sizes at sigma 2


@pytest.mark.parametrize(("scale", "which"), [(1.0, 1), (0.0, 0)])
def test_scale_one_and_zero_are_a_single_pass_bit_for_bit(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, scale: float, which: int
) -> None:
    sizes = counted(model, monkeypatch)
    x, conds = normal("x", (1, 4, 8, 8)), [Cond(normal(name, (1, 77, 64))) for name in ("u", "c")]
    assert torch.equal(guided(model, conds, cfg(scale))(x, 2.0), predict_x0(model, x, 2.0, conds[which]))
    assert sizes == [1, 1]


def test_what_is_concatenated_joins_the_input_unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, unet=replace(TINY.unet, in_channels=9))
    model = fill(LatentDiffusion(config), lambda key: key)
    seen = []
    monkeypatch.setattr(model.unet, "forward", lambda x, t, context, y: seen.append(x) or x[:, :4])
    concat = normal("concat", (1, 5, 8, 8))
    predict_x0(model, normal("x", (1, 4, 8, 8)), 3.0, Cond(normal("c", (1, 77, 64)), concat=concat))
    assert torch.equal(seen[0][:, 4:], concat)


def test_half_precision_stays_inside_the_network(model: LatentDiffusion) -> None:
    half = fill(LatentDiffusion(TINY), lambda key: key).to(torch.bfloat16)
    x, cond = normal("x", (1, 4, 8, 8)), Cond(normal("c", (1, 77, 64)))
    out = predict_x0(half, x, 1.0, cond)
    assert out.dtype == torch.float32
    exact = predict_x0(model, x, 1.0, cond)
    assert (
        out - exact
    ).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()  # bfloat16 has 3 digits, for about 100 layers
    assert not torch.equal(out, exact)


def test_conditions_that_differ_in_kind_are_no_batch() -> None:
    context = torch.zeros(1, 77, 64)
    with pytest.raises(ArgumentError, match="all have y, or none"):
        Cond.cat([Cond(context), Cond(context, y=torch.zeros(1, 8))])


def test_conditions_of_one_kind_are_joined_in_order() -> None:
    joined = Cond.cat(
        [Cond(torch.zeros(1, 2, 3), y=torch.tensor([1])), Cond(torch.ones(2, 2, 3), y=torch.tensor([2, 3]))]
    )
    assert joined.context.shape == (3, 2, 3)
    assert joined.y.tolist() == [1, 2, 3]
    assert joined.concat is None


def test_the_model_conditions_on_prompts(model: LatentDiffusion) -> None:
    cond = model.condition(["a cat", ""], size=(64, 64))
    assert cond.context.shape == (2, CLIP_L.length, 64)
    assert model.latent_shape(2, 64, 72) == (2, 4, 8, 9)
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("size", [(64, 63), (0, 64), (-8, 64), (4, 64)])
def test_a_size_without_latents_is_refused(model: LatentDiffusion, size: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="multiples of 8"):
        model.condition(["a cat"], size=size)


# --- half precision that overflows, and memory that is short --------------------------------------------------------


@pytest.fixture
def half() -> LatentDiffusion:
    return fill(LatentDiffusion(SMALL), lambda key: key).half()


SMALL = replace(
    TINY,
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
