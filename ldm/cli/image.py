"""The commands that begin with a picture: img2img, inpaint, outpaint, depth2img, upscale and variations."""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

import ldm.tasks as tasks
from ldm.cli import settings
from ldm.cli.making import Drawing, make
from ldm.errors import ArgumentError, require_whole
from ldm.images import size_for
from ldm.model import MAX_NOISE_LEVEL
from ldm.pictures import masks, read
from ldm.tasks.image import given_depth
from ldm.tasks.job import Sampling, require_strength
from ldm.tasks.upscale import UNIT

Open = Callable[..., Image.Image]  # `_opened`, which opens each file once for all cells of a grid
PicturePlan = Callable[[argparse.Namespace, Sampling, Image.Image, Open], Drawing]  # the picture is that of --init


def _opened(path: str, alpha: bool = False) -> Image.Image:
    return read.open_with_alpha(path) if alpha else read.open_image(path)


def _begins(plan: PicturePlan) -> Callable[[argparse.Namespace], None]:
    """A command that makes pictures as `plan` says, of --init, which is opened once other options are checked."""

    @functools.wraps(plan)
    def run(args: argparse.Namespace) -> None:
        opened = functools.cache(_opened)
        make(args, lambda cell, sampling: plan(cell, sampling, opened(cell.init), opened))

    return run


@_begins
def img2img(args: argparse.Namespace, sampling: Sampling, init: Image.Image, opened: Open) -> Drawing:
    """Write pictures that begin as another one."""
    require_strength(args.strength, sampling)
    size = _following(args, init)
    return Drawing(tasks.img2img, {"strength": args.strength} | _sides(size), size, (init,))


@_begins
def inpaint(args: argparse.Namespace, sampling: Sampling, init: Image.Image, opened: Open) -> Drawing:
    """Write a picture in which what a mask covers is painted anew; all its other pixels stay as they are."""
    alpha = args.mask_from == "alpha"
    path = args.mask or (args.init if alpha else None)
    if path is None:
        raise ArgumentError(
            "--mask: none given; name a picture that is white where to repaint, or say --mask-from alpha"
        )
    mask = masks.mask_of(opened(path, alpha), init.size, args.mask_from)
    keywords, size = _painting(args, sampling, init)
    return Drawing(tasks.inpaint, keywords, size, (init, mask))


@_begins
def outpaint(args: argparse.Namespace, sampling: Sampling, init: Image.Image, opened: Open) -> Drawing:
    """Write a picture that goes on beyond the borders of another, whose pixels stay as they are."""
    sides = dict(args.extend)
    if len(sides) != len(args.extend):
        raise ArgumentError("--extend: one side is given twice; give each side once")
    canvas, _ = masks.extended(init, sides)
    keywords, size = _painting(args, sampling, canvas)
    return Drawing(tasks.outpaint, keywords, size, (init, sides))


@_begins
def depth2img(args: argparse.Namespace, sampling: Sampling, init: Image.Image, opened: Open) -> Drawing:
    """Write pictures with the shapes of another one, by its depth."""
    require_strength(args.strength, sampling)
    size = width, height = _following(args, init)
    depth = None if args.depth is None else opened(args.depth)
    if depth is not None:
        given_depth(depth, torch.empty(1, 3, height, width, device="meta"), (height // 8, width // 8))
    return Drawing(tasks.depth2img, {"depth": depth, "strength": args.strength} | _sides(size), size, (init,))


@_begins
def upscale(args: argparse.Namespace, sampling: Sampling, init: Image.Image, opened: Open) -> Drawing:
    """Write a picture four times as wide and high, with detail as the prompt says."""
    require_whole("noise_level", args.noise_level, 0, MAX_NOISE_LEVEL)
    if args.window is not None:
        require_whole("window", args.window, UNIT if args.window else 0, settings.MAX_SIDE)
    keywords = {"noise_level": args.noise_level, "window": args.window}
    return Drawing(tasks.upscale, keywords, (4 * init.width, 4 * init.height), (init,), anew=False)


@_begins
def variations(args: argparse.Namespace, sampling: Sampling, init: Image.Image, opened: Open) -> Drawing:
    """Write pictures like another one, without a prompt."""
    width, height = settings.size(args)
    keywords = {"preprocessing": args.preprocessing, "width": width, "height": height}

    def draw(model: Any, image: Image.Image, prompts: list[str], **how: Any) -> list[Image.Image]:
        return tasks.variations(model, image, **how)

    return Drawing(draw, keywords, (width, height), (init,))


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return {"width": size[0], "height": size[1]}


def _following(args: argparse.Namespace, init: Image.Image) -> tuple[int, int]:
    """The size of what is made of --init, with a warning where it differs from its own."""
    width, height = size_for(init, *settings.size(args))
    if args.width is args.height is None and (width, height) != init.size:
        warnings.warn(f"--init: {init.width}x{init.height} becomes {width}x{height}, multiples of 8", stacklevel=2)
    return width, height


def _painting(
    args: argparse.Namespace, sampling: Sampling, image: Image.Image
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The keywords that inpaint and outpaint have in common, and the size of the picture."""
    settings.require_some(args.strength, sampling, "would paint nothing")
    require_whole("feather", args.feather, 0, masks.MAX_FEATHER)
    width, height = settings.size(args)
    size = image.size if width is height is None else size_for(image, width, height)
    return {"strength": args.strength, "feather": args.feather, "width": width, "height": height}, size
