"""Pictures to latents and back that are never NaN, in as little memory as it takes: tasks call this, not the VAE."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.errors import MemoryLimit, NonFinite
from ldm.limits import tiles
from ldm.limits.recover import again
from ldm.model import LatentDiffusion
from ldm.networks.vae import VAE

WHOLE = 1024  # side of the largest square that is done in one piece unless asked otherwise


def side_for(tile: int | None, height: int, width: int) -> int | None:
    """The side of the tiles in which a picture of height x width pixels is done; None: in one piece.

    tile  a side in pixels above which there are tiles; 0: never; None: 512 above 1024 x 1024
    """
    if tile is None:
        return tiles.TILE if height * width > WHOLE**2 else None
    return tile if 0 < tile**2 < height * width else None


@torch.no_grad()
def decode(model: LatentDiffusion, latent: Tensor, *, tile: int | None = None) -> Tensor:
    """Scaled latents [b, c, h, w] -> pictures [b, 3, H, W] float32, about in [-1, 1], finite.

    tile  side in pixels above which it works in strips as large as tile x tile; 0: never; None: by `side_for`
    The VAE computes in the type of its weights, under autocast too. Where it overflows in half precision it computes
    again in bfloat16, then in float32, with a warning; the model stays as it is. Where the GPU's memory does not
    suffice it computes again in strips that rest in the CPU's, with a warning.
    Raises NonFinite for latents that are not finite, or a VAE that overflows even in float32; MemoryLimit.
    """
    _require_finite(latent, "latents", "; sample again in bfloat16 or float32, or check the weights")
    height, width = (side * model.config.vae.factor for side in latent.shape[2:])

    def run(vae: VAE, side: int | None, rest: torch.device | None) -> Tensor:
        z = latent.to(vae.quant_conv.weight.dtype)
        return vae.decode(z) if side is None else tiles.decode(vae, z, side, rest)

    return _surely(model.vae, run, side_for(tile, height, width), f"decode {width}x{height}")


@torch.no_grad()
def encode(model: LatentDiffusion, image: Tensor, noise: Tensor | None = None, *, tile: int | None = None) -> Tensor:
    """Pictures [b, 3, H, W] in [-1, 1] -> scaled latents [b, c, h, w] float32, finite. The rest is as for `decode`.

    noise  N(0, 1), for a sample; None: the mean
    """
    _require_finite(image, "pictures to encode", "")
    height, width = image.shape[2:]

    def run(vae: VAE, side: int | None, rest: torch.device | None) -> Tensor:
        x = image.to(vae.quant_conv.weight.dtype)
        return vae.moments(x) if side is None else tiles.moments(vae, x, side, rest)

    moments = _surely(model.vae, run, side_for(tile, height, width), f"encode {width}x{height}")
    return model.vae.latent(moments, noise)


def _require_finite(x: Tensor, what: str, remedy: str) -> None:
    wrong = [i + 1 for i, each in enumerate(x) if not torch.isfinite(each).all()]
    if wrong:
        raise NonFinite(f"{what}: NaN or infinity in number {wrong[0]} of {len(x)} before the VAE has seen it{remedy}")


def _surely(
    vae: VAE, run: Callable[[VAE, int | None, torch.device | None], Tensor], side: int | None, doing: str
) -> Tensor:
    """The result of `run(vae, side, rest)` in float32, computed in wider types and in less memory where it must be."""

    @torch.autocast(vae.quant_conv.weight.device.type, enabled=False)
    def fitting(vae: VAE) -> Tensor:
        try:
            return run(vae, side, None)
        except torch.OutOfMemoryError:
            pass  # what the failed run holds is free only outside of this
        torch.cuda.empty_cache()
        short = f"VAE: the GPU's memory does not suffice to {doing}"
        warnings.warn(f"{short} at once: done in strips that rest in the CPU's memory", stacklevel=5)
        try:
            return run(vae, side or tiles.TILE, torch.device("cpu"))
        except torch.OutOfMemoryError:
            raise MemoryLimit(f"{short}, even in strips; use a smaller size or batch, or --offload") from None

    out = fitting(vae)
    if torch.isfinite(out).all():
        return out.float()
    out, _, wrong, how = again(vae, fitting, lambda how, where: f"VAE: cannot {doing} {how}, NaN or infinity {where}")
    warnings.warn(f"{wrong}; done again {how}", stacklevel=4)
    return out.float()
