"""Pictures to latents and back where half precision overflows, weights are broken or memory is short."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.golden import fill
from benchmarks.models.seeded import normal
from ldm.cli import models
from ldm.config import SD1, ModelConfig, VAEConfig
from ldm.errors import MemoryLimit, NonFinite
from ldm.limits import precision, recover, tiles
from ldm.limits.recover import converted
from ldm.model import LatentDiffusion
from ldm.networks.vae import VAE
from tests.made.warned import caught

SMALL = VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, scale=0.5)
CONFIG = ModelConfig("tiny", unet=replace(SD1, model_channels=32, context_dim=64), vae=SMALL, text=(), size=64)
LATENT, IMAGE, NOISE = (
    normal("z", (2, 4, 8, 8)),
    normal("image", (2, 3, 16, 16)).clamp(-1, 1),
    normal("noise", (2, 4, 8, 8)),
)
WAYS: dict[str, Callable[..., Tensor]] = {
    "decode": lambda model, **options: precision.decode(model, LATENT, **options),
    "encode": lambda model, **options: precision.encode(model, IMAGE, NOISE, **options),
}
FIRST = {
    "decode": "decoder.conv_in",
    "encode": "encoder.conv_in",
}  # its output, made large, is taken back by the norms after it


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model() -> LatentDiffusion:
    """All but its VAE is without memory: nothing else may be touched."""
    with torch.device("meta"):
        model = LatentDiffusion(CONFIG)
    model.vae = fill(VAE(SMALL), lambda key: key)
    return model


def overflowing(
    model: LatentDiffusion, way: str, dtype: torch.dtype = torch.float16, by: float = 3e4
) -> LatentDiffusion:
    """The model with a first layer that is `by` times as large, in another type. 65504 is the largest float16."""
    layer = model.vae.get_submodule(FIRST[way])
    with torch.no_grad():
        layer.weight.copy_(layer.weight * by)
        layer.bias.copy_(layer.bias * by)
    model.vae.to(dtype)
    return model


def test_what_is_finite_is_what_the_vae_gives(model: LatentDiffusion) -> None:
    (decoded, latent), seen = caught(lambda: (WAYS["decode"](model), WAYS["encode"](model)))
    with torch.no_grad():
        assert torch.equal(decoded, model.vae.decode(LATENT))
        assert torch.equal(latent, model.vae.encode(IMAGE, NOISE))
        assert torch.equal(precision.encode(model, IMAGE), model.vae.encode(IMAGE))
    assert not seen
    assert not decoded.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_inside(model: LatentDiffusion, way: str, dtype: torch.dtype) -> None:
    exact = WAYS[way](model)
    model.vae.to(dtype)
    out, seen = caught(lambda: WAYS[way](model))
    assert out.dtype == torch.float32
    assert not seen
    assert (
        out - exact
    ).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()  # bfloat16 has 3 digits, for about 20 layers


def test_autocast_does_not_narrow_it(model: LatentDiffusion, way: str) -> None:
    model = overflowing(model, way, torch.float32)
    plain = WAYS[way](model)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(WAYS[way](model), plain)


def test_one_image_can_be_sampled_several_times(model: LatentDiffusion) -> None:
    latent = precision.encode(model, IMAGE[:1], NOISE)
    assert torch.allclose(latent, precision.encode(model, IMAGE[:1].expand(2, -1, -1, -1), NOISE), atol=1e-5)


def test_what_overflows_float16_is_done_again_in_bfloat16_with_one_warning(model: LatentDiffusion, way: str) -> None:
    broken = overflowing(model, way)
    with torch.no_grad():
        assert not torch.isfinite(
            broken.vae.decode(LATENT.half()) if way == "decode" else broken.vae.moments(IMAGE.half())
        ).all()
    out, seen = caught(lambda: WAYS[way](broken))
    wide = copy.copy(broken)
    wide._modules = {**broken._modules, "vae": converted(broken.vae, torch.bfloat16)}
    assert torch.equal(out, WAYS[way](wide))
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    (message,) = seen
    assert (
        message == f"VAE: cannot {way} 16x16 in float16, NaN or infinity first at {FIRST[way]}; done again in bfloat16"
    )
    assert {p.dtype for p in broken.vae.parameters()} == {torch.float16}


class OnlyFloat32(nn.Module):
    """A layer that overflows in all but float32."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.dtype == torch.float32 else self.layer(x) * torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_overflows_bfloat16_too_is_done_again_in_float32(model: LatentDiffusion, dtype: torch.dtype) -> None:
    model.vae.to(dtype)
    exact = copy.copy(model)
    exact._modules = {**model._modules, "vae": converted(model.vae, torch.float32)}
    expected = WAYS["decode"](exact)
    model.vae.decoder.mid.block_1 = OnlyFloat32(model.vae.decoder.mid.block_1)
    out, seen = caught(lambda: WAYS["decode"](model))
    assert torch.equal(out, expected)
    (message,) = seen
    assert (
        message
        == f"VAE: cannot decode 16x16 in {str(dtype)[6:]}, NaN or infinity first at decoder.mid.block_1; done again in "
        "float32"
    )


def test_what_overflows_float32_is_an_error_that_names_the_module(model: LatentDiffusion, way: str) -> None:
    with pytest.raises(
        NonFinite, match=rf"cannot {way} 16x16 in float32, NaN or infinity first at {FIRST[way]}; use other weights"
    ):
        WAYS[way](overflowing(model, way, torch.float32, 3e38))


def test_what_no_type_can_do_is_an_error(model: LatentDiffusion) -> None:
    model.vae.decoder.conv_out.register_forward_hook(lambda module, args, out: out / 0)
    model.vae.half()
    with pytest.raises(
        NonFinite,
        match=r"cannot decode 16x16 even in float32, NaN or infinity first at decoder.conv_out; use other weights",
    ):
        caught(lambda: WAYS["decode"](model))


def test_weights_that_are_not_finite_are_named_and_nothing_is_tried_again(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.vae.half()
    with torch.no_grad():
        model.vae.decoder.mid.attn_1.q.weight[0] = torch.inf
        model.vae.decoder.conv_out.bias[0] = torch.nan
    monkeypatch.setattr(recover, "wider", lambda vae: pytest.fail("tried again"))
    with pytest.raises(
        NonFinite,
        match=r"first at decoder.mid.attn_1.q; weights not finite: decoder.mid.attn_1.q.weight and 1 more; use other "
        "weights",
    ):
        WAYS["decode"](model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_broken_before_the_vae_is_not_its_fault(model: LatentDiffusion, value: float) -> None:
    latent, image = LATENT.clone(), IMAGE.clone()
    latent[1, 2, 3, 4] = image[0, 1, 2, 3] = value
    with pytest.raises(
        NonFinite, match=r"latents: NaN or infinity in number 2 of 2 before the VAE has seen it; sample again"
    ):
        precision.decode(model, latent)
    with pytest.raises(NonFinite, match=r"pictures to encode: NaN or infinity in number 1 of 2"):
        precision.encode(model, image)


@pytest.mark.parametrize(("tile", "expected"), [(None, None), (0, None), (16, None), (8, 8)])
def test_tiles_are_used_above_their_size(
    model: LatentDiffusion, way: str, tile: int | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []
    for name in ("decode", "moments"):
        real = getattr(tiles, name)
        monkeypatch.setattr(
            tiles, name, lambda vae, x, side, rest=None, real=real: sides.append(side) or real(vae, x, side, rest)
        )
    out = WAYS[way](model, tile=tile)
    assert sides == ([] if expected is None else [expected])
    assert torch.allclose(out, WAYS[way](model, tile=0), atol=1e-4)


def test_overflow_in_tiles_is_found_and_done_again_too(model: LatentDiffusion, way: str) -> None:
    broken = overflowing(model, way)
    out, (message,) = caught(lambda: WAYS[way](broken, tile=8))
    assert torch.isfinite(out).all()
    assert f"first at {FIRST[way]}; done again in bfloat16" in message


def no_memory(*_: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_without_memory_it_is_done_in_strips_that_rest_on_the_cpu(
    model: LatentDiffusion, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, name = WAYS[way](model), {"decode": "decode", "encode": "moments"}[way]
    real, asked = getattr(tiles, name), []
    monkeypatch.setattr(VAE, name, no_memory)
    monkeypatch.setattr(tiles, name, lambda vae, x, side, rest: asked.append((side, rest)) or real(vae, x, side, rest))
    out, (message,) = caught(lambda: WAYS[way](model))
    assert torch.allclose(out, expected, atol=1e-4)
    assert asked == [(tiles.TILE, torch.device("cpu"))]
    assert (
        message
        == f"VAE: the GPU's memory does not suffice to {way} 16x16 at once: done in strips that rest in the CPU's "
        "memory"
    )


def test_without_memory_for_strips_it_is_an_error(
    model: LatentDiffusion, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (VAE, tiles):
        for name in ("decode", "moments"):
            monkeypatch.setattr(place, name, no_memory)
    with pytest.raises(
        MemoryLimit,
        match=rf"does not suffice to {way} 16x16, even in strips; use a smaller size or batch, or --offload",
    ):
        caught(lambda: WAYS[way](model, tile=8))


# --- the type that the command line takes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\nflags\t\t: fpu\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f\nbugs\t\t: bf16\n", False),
        ("no such line", False),
        (None, False),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_multiplies_it(
    text: str | None, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        assert path == Path("/proc/cpuinfo")
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert models.has_bfloat16() is has
    assert models.dtype_of("auto", torch.device("cpu")) == (torch.bfloat16 if has else torch.float32)
    assert models.dtype_of("float32", torch.device("cpu")) == torch.float32
    assert models.dtype_of("auto", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize(
    ("tile", "size", "side"),
    [
        (None, (1024, 1024), None),
        (None, (1024, 1032), 512),
        (None, (512, 2048), None),
        (0, (4096, 4096), None),
        (256, (256, 256), None),
        (256, (256, 264), 256),
    ],
)
def test_tiles_begin_above_what_was_asked_for(tile: int | None, size: tuple[int, int], side: int | None) -> None:
    assert precision.side_for(tile, *size) == side
