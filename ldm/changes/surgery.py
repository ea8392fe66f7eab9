"""Models cut from models: more inputs, another conditioner, fewer blocks; parts that stay are the same bit by bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ldm.config import FAMILIES, SDXL, SSD1B, ModelConfig, UNetConfig
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.networks.unet import UNet
from ldm.networks.vision import CLIPVision

WIDENINGS = ("mask", "masked_image", "depth")  # inputs for which conv_in can be widened, in published models' order
GROUPS = 32  # of every GroupNorm in a UNet


def _assembled(model: LatentDiffusion, config: ModelConfig, changed: Mapping[str, Tensor]) -> LatentDiffusion:
    """A model of this config from `changed` parameters, by name, and for the rest from those of `model`, now shared."""
    with torch.device("meta"):
        made = LatentDiffusion(config)
    parameters = {**model.state_dict(), **changed}
    made.load_state_dict({name: parameters[name] for name in made.state_dict()}, assign=True)
    made.schedule = model.schedule
    return made.eval().requires_grad_(False)


def widen(model: LatentDiffusion, concat: tuple[str, ...]) -> LatentDiffusion:
    """The model with room at its UNet's input for `concat` beside the latent; its predictions do not change.

    concat  of WIDENINGS, in their order: ("mask", "masked_image") takes conv_in from 4 to 9 channels, ("depth",) to 5
    The new channels come after the latent's, with weights 0, as in the beginning of the published inpainting and depth
    models. Where the family that results is a published one, its name is taken. No depth network comes with ("depth",).
    Parameters other than conv_in's weight are shared with `model`.
    Raises ArgumentError for an unknown or repeated input, another order, or a model that has such inputs already.
    """
    old = model.config
    if not concat or list(concat) != [name for name in WIDENINGS if name in concat]:
        given = ", ".join(map(str, concat))[:60] or "nothing"
        raise ArgumentError(f"widen: {given}; give some of {', '.join(WIDENINGS)}, in this order", key="widen")
    if old.concat:
        what = f"widen: this model ({old.name}) takes {', '.join(old.concat)} already"
        raise ArgumentError(f"{what}; widen one that takes text alone", key="widen")
    channels = {"mask": 1, "masked_image": old.vae.z_channels, "depth": 1}
    weight = model.unet.get_parameter("input_blocks.0.0.weight").detach()
    room = weight.new_zeros(len(weight), sum(channels[name] for name in concat), *weight.shape[2:])
    wide = torch.cat([weight, room], dim=1)
    kind = {("mask", "masked_image"): "inpainting", ("depth",): "depth"}.get(concat)
    family = f"{old.name.removesuffix('-base')}-{kind}"
    published = family in FAMILIES and FAMILIES[family].prediction == old.prediction
    config = replace(
        old, name=family if published else old.name, unet=replace(old.unet, in_channels=wide.shape[1]), concat=concat
    )
    return _assembled(model, config, {"unet.input_blocks.0.0.weight": wide})


def swap_conditioner(model: LatentDiffusion, vision: CLIPVision) -> LatentDiffusion:
    """The model with a vision tower in place of its text towers: its context is then one token, the image embedding.

    As justinpinkney/stable-diffusion made image variations from SD 1. The UNet is the same, and predicts the same of a
    given context. Parameters are shared with `model` and `vision`.
    Raises ArgumentError where the embedding is not as wide as the context, or where the UNet has other inputs too.
    """
    old = model.config
    if old.unet.vector_dim is not None or old.unet.noise_levels is not None:
        what = f"vision: a model of family {old.name} takes more than a context"
        raise ArgumentError(f"{what}; swap the conditioner of an SD 1 or SD 2 model", key="vision")
    if vision.config.projection != old.unet.context_dim:
        given, wanted = vision.config.projection, old.unet.context_dim
        what = f"vision: its embedding has {given} numbers, the UNet's context {wanted}; use a tower that fits"
        raise ArgumentError(what, key="vision")
    name = "sd-image-variations" if old.name == "sd1" else old.name
    config = replace(old, name=name, text=(), vision=vision.config, zero_empty=False)
    return _assembled(model, config, {f"vision.{name}": tensor for name, tensor in vision.state_dict().items()})


def prune(model: LatentDiffusion, plan: str) -> LatentDiffusion:
    """A smaller model, to be distilled: its UNet has fewer blocks, each a copy of one of the model's.

    plan  a key of PLANS
    The UNet's parameters are copies, so that the model can be the teacher; the others are shared with it.
    Raises ArgumentError for an unknown plan, or a UNet that it does not fit.
    """
    if plan not in PLANS:
        raise ArgumentError(f"plan: {str(plan)[:40]!r} is unknown; there are {', '.join(PLANS)}", key="plan")
    config = PLANS[plan](model.config)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in UNet(config.unet).state_dict().items()}
    large, small, state = model.config.unet, config.unet, model.unet.state_dict()
    changed = {
        f"unet.{name}": _kept(name, state[_source(name, large, small)], shape, large, small)
        for name, shape in wanted.items()
    }
    return _assembled(model, config, changed)


def ssd_1b(config: ModelConfig) -> ModelConfig:
    """SSD-1B from SDXL: 36 of its 70 transformer blocks less, and a middle of one ResBlock.

    SSD-1B's config shows which depths are left, but not from which blocks they were made. For that: the README of
    furusu/SSD-1B-anime, whose author compared the attention weights of both models by cosine similarity. Of two blocks
    the first is kept; of ten the first, second, third and seventh. That the middle keeps its first ResBlock follows
    from Segmind's distill_sdxl.py, which compares a teacher's middle with it. The ten blocks of output_blocks.2 are as
    many as SDXL's but, by the same README, not clearly similar; here they begin as SDXL's.
    Raises ArgumentError for another UNet than SDXL base's.
    """
    unet = config.unet
    depths, wanted = ((of.down_depth, of.up_depth, of.mid_depth) for of in (unet, SDXL))
    if config.concat or depths != wanted:
        what = f"plan: 'ssd-1b' is for SDXL base, this is a model of family {config.name}; use 'half'"
        raise ArgumentError(what, key="plan")
    smaller = replace(unet, mid_depth=SSD1B.mid_depth, down_depth=SSD1B.down_depth, up_depth=SSD1B.up_depth)
    return replace(config, name="ssd-1b", unet=smaller)


def half(config: ModelConfig) -> ModelConfig:
    """About half of a UNet's parameters: the middle keeps one ResBlock, and the most numerous parts are halved.

    SDXL     49 %: every second block of its transformers stays, as in DistilBERT (Sanh et al. 2019, section 3)
    SD 1, 2  60 %: half of a level's ResBlocks stay, the first going down; coming up the first and as many at the end,
             so that a skip has the width that its block was trained with (BK-SDM: Kim et al. 2023, section 3.1)
    others   the coarsest level gets the width of the one above it: whole attention heads go, and equally many channels
             of each group of a GroupNorm; the model that ships keeps 55 %
    Raises ArgumentError where a UNet has none of these.
    """
    unet = config.unet
    depths = (*unet.down_depth, *unet.up_depth, (unet.mid_depth or 0,))
    if max(map(max, depths)) > 1:

        def halved(levels: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple((depth + 1) // 2 for depth in level) for level in levels)

        smaller = replace(unet, down_depth=halved(unet.down_depth), up_depth=halved(unet.up_depth))
    elif unet.num_res_blocks > 1:
        n = unet.num_res_blocks // 2
        down = tuple(level[:n] for level in unet.down_depth)
        up = tuple(tuple(level[i] for i in _kept_ups(unet.num_res_blocks, n)) for level in unet.up_depth)
        smaller = replace(unet, num_res_blocks=n, down_depth=down, up_depth=up)
    elif len(unet.channel_mult) > 1 and unet.channel_mult[-1] > unet.channel_mult[-2]:
        smaller = replace(unet, channel_mult=(*unet.channel_mult[:-1], unet.channel_mult[-2]))
    else:
        what = f"plan: 'half' finds nothing to halve in a UNet of one block a level and widths {unet.channel_mult}"
        raise ArgumentError(f"{what}; train a smaller one", key="plan")
    return replace(config, unet=replace(smaller, mid_depth=None))


# config of the model -> that of the smaller one
PLANS: Mapping[str, Callable[[ModelConfig], ModelConfig]] = {"ssd-1b": ssd_1b, "half": half}


def kept_channels(large: int, small: int, groups: int = GROUPS) -> Tensor:
    """Which of `large` channels a layer of `small` begins with: the first of each group, of each the same number."""
    return (torch.arange(groups)[:, None] * (large // groups) + torch.arange(small // groups)).flatten()


def _kept_ups(large: int, small: int) -> list[int]:
    """Which of a level's blocks are kept coming up, where going down the first `small` of `large` are."""
    return [0, *range(large + 1 - small, large + 1)]


def _source(name: str, large: UNetConfig, small: UNetConfig) -> str:
    """The parameter of the large UNet that one of the small UNet begins as."""
    part, *rest = name.split(".")
    if part not in ("input_blocks", "middle_block", "output_blocks") or name.startswith("input_blocks.0."):
        return name
    before, after = large.mid_depth or 0, small.mid_depth or 0
    if part != "middle_block":
        n, m = large.num_res_blocks, small.num_res_blocks
        first = int(part == "input_blocks")  # conv_in is block 0 going down
        level, i = divmod(int(rest[0]) - first, m + 1)
        kept = ([*range(m), n] if first else _kept_ups(n, m))[i]  # a level ends in its Downsample going down
        rest[0] = str(first + level * (n + 1) + kept)
        if "transformer_blocks" in rest:
            depths = (large.down_depth, small.down_depth) if first else (large.up_depth, small.up_depth)
            before, after = depths[0][level][kept], depths[1][level][i]
    if "transformer_blocks" in rest:
        place = rest.index("transformer_blocks") + 1
        every = range(0, before, 1 if before == after else 2)  # all are kept, or every second, or SSD-1B's of ten
        rest[place] = str(((0, 1, 2, 6) if (before, after) == (10, 4) else every)[int(rest[place])])
    return ".".join([part, *rest])


def _kept(name: str, tensor: Tensor, shape: tuple[int, ...], large: UNetConfig, small: UNetConfig) -> Tensor:
    """A copy of a parameter, or where the small UNet's level is narrower of some of its rows and columns."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    for axis, (before, after) in enumerate(zip(tensor.shape, shape, strict=True)):
        if before != after:
            tensor = tensor.index_select(axis, _kept_places(name, axis, before, after, large, small).to(tensor.device))
    return tensor


def _kept_places(name: str, axis: int, before: int, after: int, large: UNetConfig, small: UNetConfig) -> Tensor:
    """Which rows or columns of a parameter of that name are kept."""
    if (axis == 0 and re.search(r"\.to_[qkv]\.weight$", name)) or (axis == 1 and name.endswith("to_out.0.weight")):
        # of heads of a fixed width the first ones are kept; of a fixed number of heads the first part of each
        return kept_channels(before, after, large.heads or 1)
    if ".ff.net.0.proj." in name and axis == 0:
        return kept_channels(before, after, 2)  # of the values, and of their gates
    if name.endswith("ff.net.2.weight") and axis == 1:
        return kept_channels(before, after, 1)
    joined = re.fullmatch(
        r"output_blocks\.(\d+)\.0\.(in_layers\.0\.(weight|bias)|in_layers\.2\.weight|skip_connection\.weight)", name
    )
    if joined and (axis == 1 or ".in_layers.0." in name):  # channels that come up, and those of the skip after them
        (up, skip), (new_up, new_skip) = _joined(large)[int(joined[1])], _joined(small)[int(joined[1])]
        return torch.cat([kept_channels(up, new_up), up + kept_channels(skip, new_skip)])
    return kept_channels(before, after)


def _joined(unet: UNetConfig) -> list[tuple[int, int]]:
    """Channels that come up to each output block, and channels of the skip that it meets."""
    widths = [unet.model_channels * m for m in unet.channel_mult]
    skips = [unet.model_channels]
    for level, width in enumerate(widths):
        skips += [width] * (unet.num_res_blocks + (level < len(widths) - 1))
    ups = [width for width in reversed(widths) for _ in range(unet.num_res_blocks + 1)]
    return list(zip([widths[-1], *ups[:-1]], reversed(skips), strict=True))
