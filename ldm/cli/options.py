"""The options of commands that make pictures, in one table."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.cli.arguments import number, scaled_file, whole
from ldm.config import FAMILIES
from ldm.model import MAX_NOISE_LEVEL, NOISE_LEVEL
from ldm.networks.vision import PREPROCESSORS
from ldm.pictures.animations import ANIMATIONS
from ldm.tasks.hires import ENLARGERS
from ldm.tasks.job import Sampling

ALL = "txt2img hires img2img inpaint outpaint depth2img upscale variations interpolate"
WORDS = ALL.replace(" variations", "")  # that read a prompt
MANY = ALL.replace(" interpolate", "")  # that make pictures which do not depend on each other
BEGUN = "img2img inpaint outpaint depth2img upscale variations"  # with a picture
MASKED = "inpaint outpaint"

DEFAULT = Sampling()
PREVIEW_EVERY = 5  # steps
WITHOUT_HIRES = "says how --hires redraws, which is not given; add --hires 2x, or leave it out"
WITHOUT_REFINER = "says when --refiner takes over, which is not given; leave it out"


@dataclass(frozen=True)
class Option:
    """An option of some commands: a row of the table."""

    name: str  # the keyword in Python, under which the parsed arguments have it
    kind: Callable[[str], Any] | tuple[str, ...] | None  # what reads a value, or the values to choose from; None: text
    default: Any  # False, or True: an option that takes no value and turns this round; []: one that can be repeated
    help: str
    commands: str = ALL  # that have it
    metavar: str | tuple[str, ...] | None = None
    flags: tuple[str, ...] = ()  # as it is typed; (): its name, with dashes
    key: str | None = None  # in the metadata of a picture; None: it is not there
    kept: bool = False  # in the metadata where it has its default, too
    write: Callable[..., str] | None = None  # its value for the metadata, where that is not written as in Python
    file: bool = (
        False  # a file: the metadata have its name and its hash, or for each of several what `write` makes of it
    )
    varies: bool = False  # with --grid-of
    needs: tuple[str, str] | None = None  # an option without which this one means nothing, and what is wrong then
    more: Mapping[str, Any] = field(default_factory=dict)  # for argparse


def every(text: str) -> int:
    """What --preview takes: a prompt right behind it is taken for a number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a whole number; write the prompt before --preview"
        ) from None


def times(text: str) -> float:
    """2x or 2 -> 2.0."""
    return number(text.removesuffix("x"))


def wholes(text: str) -> tuple[int, ...]:
    """1,2,3 -> (1, 2, 3)."""
    return tuple(whole(part) for part in text.split(","))


def pixels(text: str) -> tuple[int, int]:
    """1024x768 -> (768, 1024): typed with the width first, for models with the height first."""
    match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size; write WIDTHxHEIGHT, 1024x768 for example")
    return int(match[2]), int(match[1])


def corner(text: str) -> tuple[int, int]:
    """0,64 -> (0, 64): top and left."""
    match = re.fullmatch(r"(\d{1,7}),(\d{1,7})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no corner; write TOP,LEFT in pixels, 0,64 for example")
    return int(match[1]), int(match[2])


def added(text: str) -> tuple[str, int]:
    """left=128 -> ("left", 128)."""
    side, equals, count = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no side; write left=128, for example")
    return side, whole(count)


def named_file(text: str) -> tuple[str | None, str]:
    """cat=my.pt -> ("cat", "my.pt"); a file alone is called by its own name."""
    match = re.fullmatch(r"([\w-]+)=(.+)", text, re.DOTALL)
    return (match[1], match[2]) if match else (None, text)


PROMPTS = {  # {commands: what a prompt is for them}
    "txt2img hires": "what the picture shows",
    "img2img depth2img": "what the picture shows in the end",
    "inpaint": "what the repainted part, and the picture with it, shows",
    "outpaint": "what the larger picture shows",
    "upscale": "what the picture shows; may be empty",
}
SIZES = {  # {commands: the width and height that they have by default}
    "txt2img variations interpolate": "the size the model was trained with",
    "hires": "the size the model was trained with; the picture is SCALE times that",
    "img2img depth2img": "that of --init, which is otherwise scaled and cut evenly; given one, the other follows",
    "inpaint": "that of --init, whatever it is; given one, the other follows",
    "outpaint": "that of --init with what is added; given one, the other follows",
}
CHANGE = "how much of --init may change, 0 (nothing) to 1 (all) (default: %(default)s)"
REPAINT = "how much of what is repainted may change, above 0 to 1 (all of it) (default: %(default)s)"
REDRAW = "how much the enlarged picture is redrawn, above 0 to 1 (default: 0.6)"
ENLARGE = "what is enlarged, the picture or its latent; the latent needs a strength of 0.6 or more (default: pixel)"
CFG = "guidance: how closely to follow {}; 1 is none, at half the cost (default: %(default)s)"
LARGE = ("enlarge the picture so many times, 2x for example, and redraw it at that size: "
         "large pictures without doubled things")  # fmt: skip

OPTIONS: dict[str, tuple[Option, ...]] = {  # {title of a group: its options, in the order of --help}
    "": (
        *(Option("prompt", None, None, f"{what}. (word:1.3) weighs more, [word] less; BREAK begins a new part",
               commands, "PROMPT", ("prompt",), more={"nargs": "?"}) for commands, what in PROMPTS.items()),
        Option("prompt", None, None, "what the way leads past, in order; one stays the same all the way", "interpolate",
               "PROMPT", ("prompt",), more={"nargs": "*"}),
        Option("init", None, None, "the picture to begin with: PNG, JPEG, WebP or BMP", BEGUN, "IMAGE",
               key="init", file=True, more={"required": True}),
    ),
    "what to draw": (
        Option("negative", None, None, "what the picture must not show (default: what the model was trained to avoid "
               "when nothing is said)", WORDS, "PROMPT", key="negative_prompt"),
        Option("prompts", None, None, "read the prompts from a text file, one a line, instead; blank lines and lines "
               "that begin with # are left out", WORDS, "FILE"),
        Option("seed", whole, None, "of the first picture; the next has N + 1. 0 to 2^64 - 1, of which torch uses the "
               "low 32 bits (default: random, printed)", MANY, "N", key="seed", varies=True),
        Option("n", whole, 1, "number of pictures, of every prompt (default: %(default)s)", MANY, "N"),
        Option("batch", whole, 1, "pictures made at once: faster on a GPU, takes more memory (default: %(default)s)",
               metavar="N"),
        *(option for commands, size in SIZES.items() for option in (
            Option("width", whole, None, f"rounded to a multiple of 8 (default: {size})", commands, "PIXELS",
                   key="size", varies=True),
            Option("height", whole, None, "likewise", commands, "PIXELS", key="size", varies=True),
        )),
        Option("scale", times, None, LARGE, "txt2img", "SCALE", ("--hires",), "scale", varies=True),
        Option("scale", times, 2.0, "of both sides, above 1 to 8; written 2x or 2 (default: 2x)", "hires", "SCALE",
               ("--scale", "--hires"), "scale", kept=True, varies=True),
        Option("enlarge", ENLARGERS, None, ENLARGE, "txt2img", key="enlarge", varies=True,
               needs=("scale", WITHOUT_HIRES)),
        Option("enlarge", ENLARGERS, "pixel", ENLARGE, "hires", key="enlarge", kept=True, varies=True),
        Option("mask", None, None, "white is repainted, black stays to the last bit; of the shape of --init", "inpaint",
               "IMAGE", key="mask", file=True),
        Option("mask_from", ("white", "alpha"), "white", "what of the mask is repainted: its white, or its transparent "
               "part; alpha without --mask reads --init itself (default: %(default)s)", "inpaint",
               key="mask_from", kept=True),
        Option("extend", added, [], "what to add: left=128, right=, top= or bottom=; may be given several times",
               "outpaint", "SIDE=PIXELS", key="extend", more={"required": True},
               write=lambda sides: " ".join(f"{side}={count}" for side, count in sides)),
        Option("depth", None, None, "a depth map of the shape of --init, light is near (default: the model looks at "
               "--init itself)", "depth2img", "MAP", key="depth", file=True),
        Option("strength", number, None, REDRAW, "txt2img", "S", key="strength", varies=True,
               needs=("scale", WITHOUT_HIRES)),
        Option("strength", number, 0.6, REDRAW, "hires", "S", key="strength", kept=True, varies=True),
        Option("strength", number, 0.75, CHANGE, "img2img", "S", key="strength", kept=True, varies=True),
        Option("strength", number, 0.8, CHANGE, "depth2img", "S", key="strength", kept=True, varies=True),
        Option("strength", number, 1.0, REPAINT, MASKED, "S", key="strength", kept=True, varies=True),
        Option("feather", whole, 0, "over which the new fades in, from the border of the mask inwards (default: "
               "%(default)s)", MASKED, "PIXELS", key="feather", kept=True, varies=True),
        Option("noise_level", whole, NOISE_LEVEL, f"how much of --init is doubted, 0 to {MAX_NOISE_LEVEL}: more "
               "invents more (default: %(default)s)", "upscale", "N", key="noise_level", kept=True, varies=True),
        Option("window", whole, None, "side of the windows of --init in which large pictures are worked on; 0: all at "
               "once (default: 256 above 512x512)", "upscale", "PIXELS", key="window"),
        Option("preprocessing", tuple(PREPROCESSORS), "card", "how --init is scaled for the model's eye: as its card "
               "asks, or as in its training (default: %(default)s)", "variations",
               key="preprocessing", kept=True, varies=True),
        Option("seeds", wholes, None, "one for all prompts, or one for each; several with one prompt lead from one to "
               "the next (default: one at random, printed)", "interpolate", "N,N,..."),
        Option("frames", whole, 16, "pictures in all, the first and the last included (default: %(default)s)",
               "interpolate", "N"),
        Option("fps", number, 8.0, "of them in a second (default: %(default)g)", "interpolate", "N"),
        Option("animation", ANIMATIONS, "webp", "the kind of file that shows them one after another (default: "
               "%(default)s)", "interpolate"),
    ),
    "how to sample it": (
        Option("sampler", None, DEFAULT.sampler, "see 'ldm samplers' (default: %(default)s)", metavar="NAME",
               key="sampler", kept=True, varies=True),
        Option("grid", None, None, "noise levels to visit; see 'ldm samplers' (default: the sampler's own; trailing "
               "for a model with zero terminal SNR)", metavar="NAME", key="grid", varies=True),
        Option("steps", whole, DEFAULT.steps, "1 to 1000 (default: %(default)s)", metavar="N",
               key="steps", kept=True, varies=True),
        Option("cfg", number, DEFAULT.cfg, CFG.format("the prompt"), WORDS, "SCALE", key="cfg", kept=True, varies=True),
        Option("cfg", number, 3.0, CFG.format("--init"), "variations", "SCALE", key="cfg", kept=True, varies=True),
        Option("rescale", number, DEFAULT.rescale, "take back the contrast that guidance adds, 0 to 1 (default: "
               "%(default)s)", metavar="SHARE", flags=("--cfg-rescale",), key="cfg_rescale", varies=True),
        Option("interval", number, None, "guide only between these sigmas (default: everywhere)",
               metavar=("LOW", "HIGH"), flags=("--cfg-interval",), key="cfg_interval",
               write=lambda ends: " ".join(map(repr, ends)),
               more={"nargs": 2}),
        Option("eta", number, None, "fresh noise, 0 none, 1 as in DDPM, for samplers that have it (default: the "
               "sampler's own)", metavar="SHARE", key="eta", varies=True),
        Option("clip_skip", whole, DEFAULT.clip_skip, "text layer to read, counted from the one the model was trained "
               "with (default: %(default)s)", WORDS, "N", key="clip_skip", varies=True),
        Option("weighting", None, True, "read ( ) and [ ] in prompts as they stand", WORDS, flags=("--no-weighting",),
               key="weighting", kept=True),
        Option("truncate", None, False, "cut long prompts where the text tower ends, instead of reading them in pieces",
               WORDS, key="truncate"),
    ),
    "with which model": (
        Option("ckpt", None, None, ".safetensors, .ckpt or diffusers folder (default: the small model that ships, "
               "which draws coloured solids)", WORDS, "FILE"),
        Option("ckpt", None, None, ".safetensors, .ckpt or diffusers folder, of an image-variations model",
               "variations", "FILE"),
        Option("config", None, None, "what the checkpoint is, where the file cannot tell: " + ", ".join(FAMILIES),
               metavar="FAMILY"),
        Option("prediction", ("eps", "v"), None, "what its network predicts, where the file cannot tell"),
        Option("ema", None, False, "take the averaged weights where the file holds both", key="ema"),
        Option("variant", None, None, "of a diffusers folder's weights, fp16 or non_ema for example (default: the "
               "plain ones, else those with the most digits)", metavar="NAME", key="variant"),
        Option("vae", None, None, "use this autoencoder instead of the checkpoint's", metavar="FILE", key="vae",
               file=True),
        Option("lora", scaled_file, [], "add a LoRA, style.safetensors:0.8 for example; may be given several times",
               metavar="FILE[:SCALE]", key="loras", file=True,
               write=lambda lora, digest: f"{Path(lora[0]).name}:{lora[1]:g}:{digest(Path(lora[0]))}"),
        Option("allow_unmatched", None, False, "use a LoRA even where the model has no place for parts of it",
               needs=("lora", "says something of --lora, which is not given; leave it out")),
        Option("embedding", named_file, [], "a textual inversion, used in prompts by its name, else the file's; may be "
               "given several times", WORDS, "[NAME=]FILE", key="embeddings", file=True,
               write=lambda word, digest: f"{word[0] or Path(word[1]).stem}={Path(word[1]).name}:"
                                          f"{digest(Path(word[1]))}"),
        Option("safety", None, None, "a safety checker: pictures that it flags are blacked, reported and marked",
               metavar="FILE", key="safety", file=True),
        Option("keep_flagged", None, False, "report and mark them only",
               needs=("safety", "says something of --safety, which is not given; leave it out")),
        Option("refiner", None, None, "a model that finishes what the first one begins: the SDXL refiner", "txt2img",
               "FILE", key="refiner", file=True),
        Option("refine_from", number, None, "of the noise schedule, after which it takes over (default: 0.8)",
               "txt2img", "SHARE", key="refine_from", varies=True, needs=("refiner", WITHOUT_REFINER)),
        Option("refine_strength", number, None, "instead, let it redraw the finished picture with this strength",
               "txt2img", "S", key="refine_strength", varies=True, needs=("refiner", WITHOUT_REFINER)),
    ),
    "what SDXL models take besides the prompt": (
        Option("original", pixels, None, "its size before it was scaled; small ones make blurred pictures (default: "
               "its size)", WORDS, "WxH", ("--original-size",), "original_size",
               write=lambda size: "{1}x{0}".format(*size)),
        Option("crop", corner, None,
               "the corner from which it was cut (default: 0,0, which keeps things in the middle)",
               WORDS, "TOP,LEFT", key="crop", write=lambda corner: "{},{}".format(*corner)),
        Option("target", pixels, None, "the size to which it was cut (default: its size)", WORDS, "WxH",
               ("--target-size",), "target_size", write=lambda size: "{1}x{0}".format(*size)),
        Option("aesthetic", number, None, "its beauty, for the refiner (default: 6)", WORDS, "SCORE",
               key="aesthetic", varies=True),
        Option("negative_aesthetic", number, None, "the beauty of what it must not be like, for the refiner (default: "
               "2.5)", WORDS, "SCORE", key="negative_aesthetic", varies=True),
    ),
    "on what": (
        Option("device", None, "auto", "auto (CUDA if there is a device), cpu, cuda or cuda:N (default: %(default)s)"),
        Option("dtype", None, "auto", "auto (float16 on CUDA; bfloat16 or float32 on the CPU, by what it is good at), "
               "float32, float16 or bfloat16 (default: %(default)s)"),
        Option("offload", None, False, "keep only the network that is running on the GPU: slower, needs far less of "
               "its memory"),
        Option("fast", None, None, "the same functions in faster code (ldm.fast), which round otherwise (default: "
               "where that is known to pay: float32 on a CPU with a C++ compiler)",
               more={"action": argparse.BooleanOptionalAction}),
        Option("tile", whole, None, "side of the tiles in which the autoencoder works; 0: never in tiles (default: in "
               "tiles above 1024x1024)", metavar="PIXELS", key="tile"),
    ),
    "where to write it": (
        Option("out", None, None, "a directory, whose files are numbered, or the name of a .png; a name that is taken "
               "gets a number (default: outputs/, made if missing)", metavar="PATH"),
        Option("mkdir", None, False, "make the directory if it is missing"),
        Option("overwrite", None, False, "replace the .png that --out names"),
        Option("sheet", None, False, "also write all pictures on one, with their seeds", MANY),
        Option("grid_of", None, [], "compare: make every picture with each of these values and write a sheet with "
               "labelled axes; once or twice, cfg=1.5,3,5,8 or sampler=ddim,plms for example", MANY, "OPTION=A,B,..."),
        Option("preview", every, None, "every few steps (default: %(const)s) write what the picture would be by now to "
               "...-preview.png, replacing it each time", metavar="EVERY", more={"nargs": "?", "const": PREVIEW_EVERY}),
        Option("debug", None, False, "show where an error comes from"),
    ),
}  # fmt: skip
