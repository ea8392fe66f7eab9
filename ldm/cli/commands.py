"""What each command of pictures draws: its own options checked, and a function from a model to pictures."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm import images, tasks
from ldm.cli import settings
from ldm.cli.files import Inputs, file_hash
from ldm.errors import ArgumentError
from ldm.model import MAX_NOISE_LEVEL, LatentDiffusion
from ldm.pictures import masks
from ldm.tasks.image import given_depth
from ldm.tasks.job import Sampling, require_number, require_strength, require_whole
from ldm.tasks.upscale import UNIT

Draw = Callable[..., list[Image.Image]]  # (model, prompts, seeds=, negative=, on_step=, **sampling) -> pictures


@dataclass(frozen=True)
class Drawing:
    """One way to draw pictures, checked as far as it can be without a model."""

    draw: Draw
    size: tuple[int | None, int | None]  # (width, height) of the picture, before it is enlarged; None: the model's own
    scale: float = 1  # by which it is enlarged
    anew: bool = True  # all of it is drawn at once from what the prompt says, so that a size beyond the training shows
    facts: Mapping[str, str] = field(default_factory=dict)  # for the metadata of the pictures


def txt2img(args: argparse.Namespace, inputs: Inputs, sampling: Sampling) -> Drawing:
    """Write pictures of what the prompt says."""
    width, height = settings.size(args)
    if args.scale is None:
        for option in ("enlarge", "strength"):
            if getattr(args, option) is not None:
                raise ArgumentError(
                    f"--{option}: says how --hires redraws, which is not given; add --hires 2x, or leave it out"
                )
    if args.refiner is None:
        for option in ("refine_from", "refine_strength"):
            if getattr(args, option) is not None:
                raise ArgumentError(
                    f"--{option.replace('_', '-')}: says when --refiner takes over, which is not given; leave it out"
                )
    elif args.scale is not None:
        raise ArgumentError("--refiner: does not go together with --hires; use one of them")
    if args.scale is not None:
        return _hires(args, sampling, width, height)
    handing = {} if args.refine_from is None else {"refine_from": args.refine_from}
    if args.refine_from is not None and args.refine_strength is not None:
        raise ArgumentError(
            "--refine-strength: the refiner redraws the finished picture, or takes over at --refine-from; give one of them"
        )
    if args.refine_from is not None:
        require_number("refine_from", args.refine_from, 0, 1)
    if args.refine_strength is not None:
        _require_strength(args.refine_strength, sampling, "refine_strength")
        handing = {"refine_strength": args.refine_strength}

    def draw(model: LatentDiffusion, prompts: list[str], **common: Any) -> list[Image.Image]:
        return tasks.txt2img(model, prompts, width=width, height=height, **handing, **common)

    return Drawing(draw, (width, height), facts=_facts(args, "refine_from", "refine_strength"))


def _hires(args: argparse.Namespace, sampling: Sampling, width: int | None, height: int | None) -> Drawing:
    """Write large pictures: made small, enlarged, and redrawn at their size."""
    strength, enlarge = 0.6 if args.strength is None else args.strength, args.enlarge or "pixel"
    if not 1 < args.scale <= 8:
        raise ArgumentError(
            f"--{'hires' if args.command == 'txt2img' else 'scale'}: {args.scale:g}; give more than 1 and at most 8"
        )
    _require_some(strength, sampling, "would only enlarge")

    def draw(model: LatentDiffusion, prompts: list[str], **common: Any) -> list[Image.Image]:
        return tasks.hires(
            model, prompts, scale=args.scale, enlarge=enlarge, strength=strength, width=width, height=height, **common
        )

    return Drawing(
        draw, (width, height), args.scale, {"scale": repr(args.scale), "enlarge": enlarge, "strength": repr(strength)}
    )


def img2img(args: argparse.Namespace, inputs: Inputs, sampling: Sampling) -> Drawing:
    """Write pictures that begin as another one."""
    require_strength(args.strength, sampling)
    width, height = _following(args, inputs.init)

    def draw(model: LatentDiffusion, prompts: list[str], **common: Any) -> list[Image.Image]:
        return tasks.img2img(model, inputs.init, prompts, strength=args.strength, width=width, height=height, **common)

    return Drawing(draw, (width, height), facts=_facts(args, "strength", "init"))


def inpaint(args: argparse.Namespace, inputs: Inputs, sampling: Sampling) -> Drawing:
    """Write a picture in which what a mask covers is painted anew; all its other pixels stay as they are."""
    if inputs.mask is None:
        raise ArgumentError(
            "--mask: none given; name a picture that is white where to repaint, or say --mask-from alpha"
        )
    mask = masks.mask_of(inputs.mask, inputs.init.size, args.mask_from)
    keywords, size = _inpainting(args, sampling, inputs.init)

    def draw(model: LatentDiffusion, prompts: list[str], **common: Any) -> list[Image.Image]:
        return tasks.inpaint(model, inputs.init, mask, prompts, **keywords, **common)

    return Drawing(
        draw, size, facts=_facts(args, "strength", "feather", "init", "mask") | {"mask_from": args.mask_from}
    )


def outpaint(args: argparse.Namespace, inputs: Inputs, sampling: Sampling) -> Drawing:
    """Write a picture that goes on beyond the borders of another, whose pixels stay as they are."""
    sides = dict(args.extend)
    if len(sides) != len(args.extend):
        raise ArgumentError("--extend: one side is given twice; give each side once")
    canvas, _ = masks.extended(inputs.init, sides)
    keywords, size = _inpainting(args, sampling, canvas)

    def draw(model: LatentDiffusion, prompts: list[str], **common: Any) -> list[Image.Image]:
        return tasks.outpaint(model, inputs.init, sides, prompts, **keywords, **common)

    return Drawing(
        draw,
        size,
        facts=_facts(args, "strength", "feather", "init")
        | {"extend": " ".join(f"{side}={count}" for side, count in sides.items())},
    )


def depth2img(args: argparse.Namespace, inputs: Inputs, sampling: Sampling) -> Drawing:
    """Write pictures with the shapes of another one, by its depth."""
    require_strength(args.strength, sampling)
    width, height = _following(args, inputs.init)
    if inputs.depth is not None:
        given_depth(inputs.depth, torch.empty(1, 3, height, width, device="meta"), [height // 8, width // 8])

    def draw(model: LatentDiffusion, prompts: list[str], **common: Any) -> list[Image.Image]:
        return tasks.depth2img(
            model,
            inputs.init,
            prompts,
            depth=inputs.depth,
            strength=args.strength,
            width=width,
            height=height,
            **common,
        )

    return Drawing(draw, (width, height), facts=_facts(args, "strength", "init", "depth"))


def upscale(args: argparse.Namespace, inputs: Inputs, sampling: Sampling) -> Drawing:
    """Write a picture four times as wide and high, with detail as the prompt says."""
    require_whole("noise_level", args.noise_level, 0, MAX_NOISE_LEVEL)
    if args.window:
        require_whole("window", args.window, UNIT, settings.MAX_SIDE)
    elif args.window is not None:
        require_whole("window", args.window, 0, settings.MAX_SIDE)

    def draw(model: LatentDiffusion, prompts: list[str], **common: Any) -> list[Image.Image]:
        return tasks.upscale(model, inputs.init, prompts, noise_level=args.noise_level, window=args.window, **common)

    return Drawing(
        draw,
        (4 * inputs.init.width, 4 * inputs.init.height),
        anew=False,
        facts=_facts(args, "noise_level", "window", "init"),
    )


def variations(args: argparse.Namespace, inputs: Inputs, sampling: Sampling) -> Drawing:
    """Write pictures like another one, without a prompt."""
    width, height = settings.size(args)

    def draw(model: LatentDiffusion, prompts: list[str], **common: Any) -> list[Image.Image]:
        return tasks.variations(
            model, inputs.init, preprocessing=args.preprocessing, width=width, height=height, **common
        )

    return Drawing(draw, (width, height), facts=_facts(args, "preprocessing", "init"))


# --- what several have in common ------------------------------------------------------------------------------------


def _following(args: argparse.Namespace, init: Image.Image) -> tuple[int, int]:
    """The size of what is made of --init, with a warning where it differs from its own."""
    width, height = images.size_for(init, *settings.size(args))
    if args.width is args.height is None and (width, height) != init.size:
        warnings.warn(f"--init: {init.width}x{init.height} becomes {width}x{height}, multiples of 8", stacklevel=2)
    return width, height


def _inpainting(
    args: argparse.Namespace, sampling: Sampling, image: Image.Image
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The keywords that inpaint and outpaint have in common, and the size of the picture."""
    _require_some(args.strength, sampling, "would paint nothing")
    require_whole("feather", args.feather, 0, masks.MAX_FEATHER)
    width, height = settings.size(args)
    size = image.size if width is height is None else images.size_for(image, width, height)
    return {"strength": args.strength, "feather": args.feather, "width": width, "height": height}, size


def _require_some(strength: float, sampling: Sampling, why: str) -> None:
    require_strength(strength, sampling)
    if strength == 0:
        raise ArgumentError(f"strength: 0 {why}; give more", key="strength")


def _require_strength(strength: float, sampling: Sampling, name: str) -> None:
    """`require_strength` of an option with another name."""
    try:
        require_strength(strength, sampling)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {str(error).removeprefix('strength: ')}", key=name) from None


def _facts(args: argparse.Namespace, *names: str) -> dict[str, str]:
    """Options by name as metadata; of a file its name and hash. What was not given is left out."""
    facts = {}
    for name in names:
        value = getattr(args, name)
        if value is None:
            continue
        if name in ("init", "mask", "depth"):
            facts |= {name: Path(value).name, f"{name}_hash": file_hash(Path(value))}
        else:
            facts[name] = value if isinstance(value, str) else repr(value)
    return facts
