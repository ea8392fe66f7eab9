"""From predictions of eps and v to x0, and guidance in one batched call."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.models.golden import CLIP_L_TINY, fill
from benchmarks.models.seeded import normal
from ldm.conditioning.cond import Cond
from ldm.config import CLIP_L, SD1, ModelConfig, VAEConfig
from ldm.denoiser import guided, predict_x0, to_x0
from ldm.errors import ArgumentError
from ldm.limits.recover import Recovery
from ldm.model import LatentDiffusion
from samplers import cfg

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_that_was_written_in_place_is_read_anew(model: LatentDiffusion, dtype: torch.dtype) -> None:
    model, x, recovery = copy.deepcopy(model).to(dtype), normal("x", (1, 4, 8, 8)), Recovery()
    cond = Cond(normal("c", (1, 77, 64)).clone())
    before = predict_x0(model, x, 1.0, cond, recovery)
    cond.context.mul_(2)
    after = predict_x0(model, x, 1.0, cond, recovery)
    assert torch.equal(after, predict_x0(model, x, 1.0, Cond(2 * normal("c", (1, 77, 64)))))
    assert not torch.equal(after, before)


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
