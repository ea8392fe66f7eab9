"""The tiny networks behind the golden outputs, with seeded weights under the names of the files they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.models.published import from_openclip
from benchmarks.models.seeded import golden, normal, weight
from ldm.config import SD1, SD2, SDXL, SSD1B, X4, DepthConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from ldm.networks.clip import CLIPText
from ldm.networks.dpt import DPT
from ldm.networks.safety import SafetyChecker
from ldm.networks.unet import UNet
from ldm.networks.vae import VAE
from ldm.networks.vision import CLIPVision
from weights.names.diffusers import diffusers_unet

Network = TypeVar("Network", bound=nn.Module)

TINY_UNETS: dict[str, UNetConfig] = {
    "sd1-tiny": replace(SD1, model_channels=32, context_dim=64),
    "sd2-tiny": replace(SD2, model_channels=32, context_dim=64, head_dim=16),
    "sd2-depth-tiny": replace(SD2, model_channels=32, context_dim=64, head_dim=16, in_channels=5),
    "x4-upscaler-tiny": replace(X4, model_channels=32, context_dim=64),
    "sdxl-tiny": replace(SDXL, model_channels=32, context_dim=64, head_dim=16, vector_dim=112),
    "ssd-1b-tiny": replace(SSD1B, model_channels=32, context_dim=64, head_dim=16, vector_dim=112),
}
TINY_VAES = {
    "vae-f8-tiny": VAEConfig(channels=32, scale=1.0),
    "vae-f4-tiny": VAEConfig(channels=32, channel_mult=(1, 2, 4), scale=1.0),
}
CLIP_L_TINY = TextConfig(width=64, layers=3, heads=4, mlp=256)
OPENCLIP_TINY = replace(CLIP_L_TINY, activation="gelu", projection=48, pad=0)
VISION_TINY = VisionConfig(image=28, patch=7, width=64, layers=3, heads=4, mlp=256, projection=48)
DEPTH_TINY = DepthConfig(
    image=64, stem=32, blocks=(2, 1, 2), width=64, layers=4, heads=4, mlp=128, hooks=(1, 3), features=32
)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, in units of the reference's root mean square."""
    return ((ours - theirs).abs().max() / theirs.square().mean().sqrt()).item()


def as_stored(ours: Tensor, half: Tensor) -> Tensor:
    """What a reference kept in float16 may have been, as near to ours as possible."""
    reference = half.float()
    moved = (reference.abs() * 2**-11).clamp(min=2**-25)  # at most, by rounding
    return torch.minimum(torch.maximum(ours, reference - moved), reference + moved)


def fill(network: Network, key: Callable[[str], str]) -> Network:
    """`network` with the seeded weight of the checkpoint key that `key` gives for each of its names; ready to run."""
    state = {name: weight(key(name), p.shape) for name, p in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def tiny_unet(name: str) -> UNet:
    """A UNet of TINY_UNETS with the weights of its golden run."""
    theirs = diffusers_unet(TINY_UNETS[name]) if name == "ssd-1b-tiny" else None
    return fill(
        UNet(TINY_UNETS[name]), lambda key: f"{name}/{theirs[key]}" if theirs else f"model.diffusion_model.{key}"
    )


def tiny_vae(name: str) -> VAE:
    """A VAE of TINY_VAES with the weights of its golden run."""
    return fill(VAE(TINY_VAES[name]), lambda key: f"first_stage_model.{key}")


def tiny_clip_l() -> CLIPText:
    """The text tower with Hugging Face's names and the weights of its golden run."""
    return fill(CLIPText(CLIP_L_TINY), lambda key: f"cond_stage_model.transformer.{key}")


def tiny_openclip() -> CLIPText:
    """The text tower with OpenCLIP's names and the weights of its golden run."""
    w, h = OPENCLIP_TINY.width, OPENCLIP_TINY.mlp
    shapes: dict[str, tuple[int, ...]] = {"positional_embedding": (77, w), "text_projection": (w, 48)}
    shapes |= {"token_embedding.weight": (49408, w), "ln_final.weight": (w,), "ln_final.bias": (w,)}
    block: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (w,), "ln_1.bias": (w,), "attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,),
        "attn.out_proj.weight": (w, w), "attn.out_proj.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,),
        "mlp.c_fc.weight": (h, w), "mlp.c_fc.bias": (h,), "mlp.c_proj.weight": (w, h), "mlp.c_proj.bias": (w,),
    }  # fmt: skip
    for i in range(OPENCLIP_TINY.layers):
        shapes |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    tower = CLIPText(OPENCLIP_TINY)
    state = {name: weight(f"cond_stage_model.model.{name}", shape) for name, shape in shapes.items()}
    tower.load_state_dict(from_openclip(state))
    return tower.eval().requires_grad_(False)


def run_unet(name: str) -> Tensor:
    """The output of a tiny UNet on the inputs of its golden run."""
    config = TINY_UNETS[name]
    x, context = normal(f"{name}/x", (2, config.in_channels, 16, 16)), normal(f"{name}/context", (2, 77, 64))
    y = None
    if config.noise_levels:
        y = torch.tensor([20, 350])
    elif name == "sdxl-tiny":
        y = normal(f"{name}/y", (2, 112))
    elif name == "ssd-1b-tiny":
        from ldm.networks.unet import timestep_embedding

        ids = golden("unet")["ssd-1b-tiny/time_ids"]
        sizes = torch.cat([timestep_embedding(column, 8) for column in ids.unbind(1)], dim=1)
        y = torch.cat([normal("ssd-1b-tiny/pooled", (2, 64)), sizes], dim=1)
    with torch.no_grad():
        return tiny_unet(name)(x, torch.tensor([500.0, 37.0]), context, y)


def tiny_vision() -> CLIPVision:
    """The vision tower with the weights of its golden run."""
    return fill(CLIPVision(VISION_TINY), lambda key: f"image_encoder.{key}")


def dpt(config: DepthConfig) -> DPT:
    """A depth network with seeded weights; with the published sizes, that of the golden run."""
    with torch.device("meta"):  # giving 123 M parameters values that are then replaced takes as long as running them
        network = DPT(config)
    return fill(network, lambda key: f"depth_model.model.{key}")


def tiny_safety() -> SafetyChecker:
    """The safety checker with the weights of its golden run: thresholds around 0.21."""

    def key(name: str) -> str:  # the prefix not doubled, as transformers 5 has it
        return f"safety_checker.{name.replace('vision_model.vision_model.', 'vision_model.')}"

    checker = fill(SafetyChecker(VISION_TINY), key)
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        threshold = getattr(checker, name)
        threshold.copy_(0.21 + 0.05 * normal(f"safety_checker.{name}", threshold.shape))
    return checker
