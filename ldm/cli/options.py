"""The options of every command that makes pictures, in groups."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from ldm.cli import terminal
from ldm.cli.arguments import added, corner, every, named_file, number, pixels, scaled_file, times, whole, wholes
from ldm.cli.files import Readers
from ldm.config import FAMILIES
from ldm.model import MAX_NOISE_LEVEL, NOISE_LEVEL
from ldm.networks.vision import PREPROCESSORS
from ldm.pictures.write import ANIMATIONS
from ldm.tasks.job import Sampling
from ldm.tasks.text import ENLARGERS
from samplers import DEFAULT_GRID, GRIDS, SAMPLERS, Schedule, calls

DEFAULT = Sampling()
PREVIEW_EVERY = 5  # steps
FOLLOWS = "that of --init, which is otherwise scaled and cut evenly; given one, the other follows"


Parser = argparse.ArgumentParser


# --- one function for each command ----------------------------------------------------------------------------------


def txt2img(parser: Parser) -> None:
    """Of `ldm txt2img`."""
    _prompt(parser, "what the picture shows")
    what = _what(parser, "the size the model was trained with")
    what.add_argument(
        "--hires",
        dest="scale",
        type=times,
        metavar="SCALE",
        help="enlarge the picture so many times, 2x for example, and redraw it at that size: large pictures without doubled things",
    )
    _hires(what, None)
    model = _common(parser)
    model.add_argument(
        "--refiner", metavar="FILE", help="a model that finishes what the first one begins: the SDXL refiner"
    )
    model.add_argument(
        "--refine-from",
        type=number,
        metavar="SHARE",
        help="of the noise schedule, after which it takes over (default: 0.8)",
    )
    model.add_argument(
        "--refine-strength",
        type=number,
        metavar="S",
        help="instead, let it redraw the finished picture with this strength",
    )


def hires(parser: Parser) -> None:
    """Of `ldm hires`."""
    _prompt(parser, "what the picture shows")
    what = _what(parser, "the size the model was trained with; the picture is SCALE times that")
    what.add_argument(
        "--scale",
        "--hires",
        dest="scale",
        type=times,
        default=2.0,
        metavar="SCALE",
        help="of both sides, above 1 to 8; written 2x or 2 (default: 2x)",
    )
    _hires(what, 0.6)
    _common(parser)
    parser.set_defaults(refiner=None, refine_from=None, refine_strength=None)


def img2img(parser: Parser) -> None:
    """Of `ldm img2img`."""
    _prompt(parser, "what the picture shows in the end", init=True)
    what = _what(parser, FOLLOWS)
    _strength(what, 0.75)
    _common(parser)


def inpaint(parser: Parser) -> None:
    """Of `ldm inpaint`."""
    parser.usage = "%(prog)s PROMPT --init IMAGE (--mask IMAGE | --mask-from alpha) [options]"
    _prompt(parser, "what the repainted part, and the picture with it, shows", init=True, usage=False)
    what = _what(parser, "that of --init, whatever it is; given one, the other follows")
    what.add_argument(
        "--mask", metavar="IMAGE", help="white is repainted, black stays to the last bit; of the shape of --init"
    )
    what.add_argument(
        "--mask-from",
        choices=("white", "alpha"),
        default="white",
        help="what of the mask is repainted: its white, or its transparent part; alpha without --mask reads --init itself (default: %(default)s)",
    )
    _inpainting(what)
    _common(parser)


def outpaint(parser: Parser) -> None:
    """Of `ldm outpaint`."""
    _prompt(parser, "what the larger picture shows", init=True, more=" --extend SIDE=PIXELS")
    what = _what(parser, "that of --init with what is added; given one, the other follows")
    what.add_argument(
        "--extend",
        type=added,
        action="append",
        required=True,
        metavar="SIDE=PIXELS",
        help="what to add: left=128, right=, top= or bottom=; may be given several times",
    )
    _inpainting(what)
    _common(parser)


def depth2img(parser: Parser) -> None:
    """Of `ldm depth2img`."""
    _prompt(parser, "what the picture shows in the end", init=True)
    what = _what(parser, FOLLOWS)
    what.add_argument(
        "--depth",
        metavar="MAP",
        help="a depth map of the shape of --init, light is near (default: the model looks at --init itself)",
    )
    _strength(what, 0.8)
    _common(parser)


def upscale(parser: Parser) -> None:
    """Of `ldm upscale`."""
    _prompt(parser, "what the picture shows; may be empty", init=True)
    what = _what(parser, None)
    what.add_argument(
        "--noise-level",
        type=whole,
        default=NOISE_LEVEL,
        metavar="N",
        help=f"how much of --init is doubted, 0 to {MAX_NOISE_LEVEL}: more invents more (default: %(default)s)",
    )
    what.add_argument(
        "--window",
        type=whole,
        metavar="PIXELS",
        help="side of the windows of --init in which large pictures are worked on; 0: all at once (default: 256 above 512x512)",
    )
    _common(parser)


def variations(parser: Parser) -> None:
    """Of `ldm variations`."""
    parser.usage = "%(prog)s --init IMAGE [options]"
    _init(parser)
    what = _what(parser, "the size the model was trained with", text=False)
    what.add_argument(
        "--preprocessing",
        choices=tuple(PREPROCESSORS),
        default="card",
        help="how --init is scaled for the model's eye: as its card asks, or as in its training (default: %(default)s)",
    )
    _common(parser, text=False)


def interpolate(parser: Parser) -> None:
    """Of `ldm interpolate`."""
    parser.usage = "%(prog)s PROMPT [PROMPT ...] [--seeds 1,2,...] [options]"
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="*", help="what the way leads past, in order; one stays the same all the way"
    )
    what = _what(parser, "the size the model was trained with", several=False)
    what.add_argument(
        "--seeds",
        type=wholes,
        metavar="N,N,...",
        help="one for all prompts, or one for each; several with one prompt lead from one to the next (default: one at random, printed)",
    )
    what.add_argument(
        "--frames",
        type=whole,
        default=16,
        metavar="N",
        help="pictures in all, the first and the last included (default: %(default)s)",
    )
    what.add_argument("--fps", type=number, default=8.0, metavar="N", help="of them in a second (default: %(default)g)")
    what.add_argument(
        "--animation",
        choices=ANIMATIONS,
        default="webp",
        help="the kind of file that shows them one after another (default: %(default)s)",
    )
    _common(parser, several=False)


def samplers(parser: Parser) -> None:
    """Of `ldm samplers`."""
    parser.add_argument(
        "--steps", type=whole, default=DEFAULT.steps, metavar="N", help="to list them for (default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


# --- what they share ------------------------------------------------------------------------------------------------


def _prompt(parser: Parser, help: str, *, init: bool = False, usage: bool = True, more: str = "") -> None:
    if usage:
        parser.usage = f"%(prog)s PROMPT{' --init IMAGE' if init else ''}{more} [options]"
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help=f"{help}. (word:1.3) weighs more, [word] less; BREAK begins a new part",
    )
    if init:
        _init(parser)


def _init(parser: Parser) -> None:
    parser.add_argument(
        "--init", metavar="IMAGE", required=True, help="the picture to begin with: PNG, JPEG, WebP or BMP"
    )


def _what(parser: Parser, size: str | None, *, text: bool = True, several: bool = True) -> argparse._ArgumentGroup:
    """What to draw. size: what width and height are by default; None: they cannot be chosen."""
    what = parser.add_argument_group("what to draw")
    if text:
        what.add_argument(
            "--negative",
            metavar="PROMPT",
            help="what the picture must not show (default: what the model was trained to avoid when nothing is said)",
        )
        what.add_argument(
            "--prompts",
            metavar="FILE",
            help="read the prompts from a text file, one a line, instead; blank lines and lines that begin with # are left out",
        )
    if several:
        what.add_argument(
            "--seed",
            type=whole,
            metavar="N",
            help="of the first picture; the next has N + 1. 0 to 2^64 - 1, of which torch uses the low 32 bits (default: random, printed)",
        )
        what.add_argument(
            "--n", type=whole, default=1, metavar="N", help="number of pictures, of every prompt (default: %(default)s)"
        )
    what.add_argument(
        "--batch",
        type=whole,
        default=1,
        metavar="N",
        help="pictures made at once: faster on a GPU, takes more memory (default: %(default)s)",
    )
    if size is not None:
        what.add_argument("--width", type=whole, metavar="PIXELS", help=f"rounded to a multiple of 8 (default: {size})")
        what.add_argument("--height", type=whole, metavar="PIXELS", help="likewise")
    return what


def _strength(group: argparse._ArgumentGroup, default: float) -> None:
    group.add_argument(
        "--strength",
        type=number,
        default=default,
        metavar="S",
        help="how much of --init may change, 0 (nothing) to 1 (all) (default: %(default)s)",
    )


def _hires(group: argparse._ArgumentGroup, strength: float | None) -> None:
    group.add_argument(
        "--enlarge",
        choices=ENLARGERS,
        default=strength and "pixel",
        help="what is enlarged, the picture or its latent; the latent needs a strength of 0.6 or more (default: pixel)",
    )
    group.add_argument(
        "--strength",
        type=number,
        default=strength,
        metavar="S",
        help="how much the enlarged picture is redrawn, above 0 to 1 (default: 0.6)",
    )


def _inpainting(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--strength",
        type=number,
        default=1.0,
        metavar="S",
        help="how much of what is repainted may change, above 0 to 1 (all of it) (default: %(default)s)",
    )
    group.add_argument(
        "--feather",
        type=whole,
        default=0,
        metavar="PIXELS",
        help="over which the new fades in, from the border of the mask inwards (default: %(default)s)",
    )


def _common(parser: Parser, *, text: bool = True, several: bool = True) -> argparse._ArgumentGroup:
    """What all have in common; the group of models, for more of them."""
    _how(parser, text)
    model = _model(parser, text)
    if text:
        _sdxl(parser)
    _machine(parser)
    _where(parser, several)
    return model


def _how(parser: Parser, text: bool) -> None:
    how = parser.add_argument_group("how to sample it")
    how.add_argument(
        "--sampler", default=DEFAULT.sampler, metavar="NAME", help="see 'ldm samplers' (default: %(default)s)"
    )
    how.add_argument(
        "--grid",
        metavar="NAME",
        help="noise levels to visit; see 'ldm samplers' (default: the sampler's own; trailing for a model with zero terminal SNR)",
    )
    how.add_argument("--steps", type=whole, default=DEFAULT.steps, metavar="N", help="1 to 1000 (default: %(default)s)")
    how.add_argument(
        "--cfg",
        type=number,
        default=DEFAULT.cfg if text else 3.0,
        metavar="SCALE",
        help="guidance: how closely to follow "
        + ("the prompt" if text else "--init")
        + "; 1 is none, at half the cost (default: %(default)s)",
    )
    how.add_argument(
        "--cfg-rescale",
        dest="rescale",
        type=number,
        default=DEFAULT.rescale,
        metavar="SHARE",
        help="take back the contrast that guidance adds, 0 to 1 (default: %(default)s)",
    )
    how.add_argument(
        "--cfg-interval",
        dest="interval",
        type=number,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only between these sigmas (default: everywhere)",
    )
    how.add_argument(
        "--eta",
        type=number,
        metavar="SHARE",
        help="fresh noise, 0 none, 1 as in DDPM, for samplers that have it (default: the sampler's own)",
    )
    if text:
        how.add_argument(
            "--clip-skip",
            type=whole,
            default=DEFAULT.clip_skip,
            metavar="N",
            help="text layer to read, counted from the one the model was trained with (default: %(default)s)",
        )
        how.add_argument(
            "--no-weighting", dest="weighting", action="store_false", help="read ( ) and [ ] in prompts as they stand"
        )
        how.add_argument(
            "--truncate",
            action="store_true",
            help="cut long prompts where the text tower ends, instead of reading them in pieces",
        )


def _model(parser: Parser, text: bool) -> argparse._ArgumentGroup:
    model = parser.add_argument_group("with which model")
    model.add_argument(
        "--ckpt",
        metavar="FILE",
        help=".safetensors, .ckpt or diffusers folder"
        + (
            " (default: the small model that ships, which draws coloured solids)"
            if text
            else ", of an image-variations model"
        ),
    )
    model.add_argument(
        "--config", metavar="FAMILY", help="what the checkpoint is, where the file cannot tell: " + ", ".join(FAMILIES)
    )
    model.add_argument(
        "--prediction", choices=("eps", "v"), help="what its network predicts, where the file cannot tell"
    )
    model.add_argument("--ema", action="store_true", help="take the averaged weights where the file holds both")
    model.add_argument(
        "--variant",
        metavar="NAME",
        help="of a diffusers folder's weights, fp16 or non_ema for example (default: the plain ones, else those with the most digits)",
    )
    model.add_argument("--vae", metavar="FILE", help="use this autoencoder instead of the checkpoint's")
    model.add_argument(
        "--lora",
        type=scaled_file,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="add a LoRA, style.safetensors:0.8 for example; may be given several times",
    )
    model.add_argument(
        "--allow-unmatched", action="store_true", help="use a LoRA even where the model has no place for parts of it"
    )
    if text:
        model.add_argument(
            "--embedding",
            type=named_file,
            action="append",
            default=[],
            metavar="[NAME=]FILE",
            help="a textual inversion, used in prompts by its name, else the file's; may be given several times",
        )
    model.add_argument(
        "--safety", metavar="FILE", help="a safety checker: pictures that it flags are blacked, reported and marked"
    )
    model.add_argument("--keep-flagged", action="store_true", help="report and mark them only")
    return model


def _sdxl(parser: Parser) -> None:
    sdxl = parser.add_argument_group("what SDXL models are told of the picture besides the prompt")
    sdxl.add_argument(
        "--original-size",
        dest="original",
        type=pixels,
        metavar="WxH",
        help="its size before it was scaled; small ones make blurred pictures (default: its size)",
    )
    sdxl.add_argument(
        "--crop",
        type=corner,
        metavar="TOP,LEFT",
        help="the corner from which it was cut (default: 0,0, which keeps things in the middle)",
    )
    sdxl.add_argument(
        "--target-size",
        dest="target",
        type=pixels,
        metavar="WxH",
        help="the size to which it was cut (default: its size)",
    )
    sdxl.add_argument("--aesthetic", type=number, metavar="SCORE", help="its beauty, for the refiner (default: 6)")
    sdxl.add_argument(
        "--negative-aesthetic",
        type=number,
        metavar="SCORE",
        help="the beauty of what it must not be like, for the refiner (default: 2.5)",
    )


def _machine(parser: Parser) -> None:
    on = parser.add_argument_group("on what")
    on.add_argument(
        "--device", default="auto", help="auto (CUDA if there is a device), cpu, cuda or cuda:N (default: %(default)s)"
    )
    on.add_argument(
        "--dtype",
        default="auto",
        help="auto (float16 on CUDA; bfloat16 or float32 on the CPU, by what it is good at), float32, float16 or bfloat16 (default: %(default)s)",
    )
    on.add_argument(
        "--offload",
        action="store_true",
        help="keep only the network that is running on the GPU: slower, needs far less of its memory",
    )
    on.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        help="the same functions in faster code (ldm.fast), which round otherwise (default: where that is known to pay: float32 on a CPU with a C++ compiler)",
    )
    on.add_argument(
        "--tile",
        type=whole,
        metavar="PIXELS",
        help="side of the tiles in which the autoencoder works; 0: never in tiles (default: in tiles above 1024x1024)",
    )


def _where(parser: Parser, several: bool) -> None:
    where = parser.add_argument_group("where to write it")
    where.add_argument(
        "--out",
        metavar="PATH",
        help="a directory, whose files are numbered, or the name of a .png; a name that is taken gets a number (default: outputs/, made if missing)",
    )
    where.add_argument("--mkdir", action="store_true", help="make the directory if it is missing")
    where.add_argument("--overwrite", action="store_true", help="replace the .png that --out names")
    if several:
        where.add_argument("--sheet", action="store_true", help="also write all pictures on one, with their seeds")
        where.add_argument(
            "--grid-of",
            action="append",
            metavar="OPTION=A,B,...",
            help="compare: make every picture with each of these values and write a sheet with labelled axes; once or twice, cfg=1.5,3,5,8 or sampler=ddim,plms for example",
        )
    where.add_argument(
        "--preview",
        type=every,
        nargs="?",
        const=PREVIEW_EVERY,
        metavar="EVERY",
        help="every few steps (default: %(const)s) write what the picture would be by now to ...-preview.png, replacing it each time",
    )
    where.add_argument("--debug", action="store_true", help="show where an error comes from")


def show(args: argparse.Namespace, readers: Readers) -> None:
    """Print every sampler and every grid as they are with this many steps of the schedule that all families but the upscaler share."""
    schedule, steps = Schedule(), Sampling(steps=args.steps).steps
    width = shutil.get_terminal_size((120, 24)).columns

    def entry(text: str, indent: int) -> None:
        terminal.show(textwrap.fill(text, max(width, 60), subsequent_indent=" " * indent, break_on_hyphens=False))

    terminal.show(f"Samplers, each with its own grid and the network calls that {steps} steps of it take:\n")
    for name, sampler in SAMPLERS.items():
        count = calls(name, GRIDS[DEFAULT_GRID[name]](schedule, steps))
        entry(f"{name:20}{DEFAULT_GRID[name]:10}{count:5}  {_first_line(sampler)}", 37)
    terminal.show(f"\nGrids of {steps} steps, as timesteps and as sigmas:")
    for name, grid in GRIDS.items():
        terminal.show("")
        entry(f"{name:20}{_first_line(grid)}", 20)
        try:
            sigmas = grid(schedule, steps)
        except ValueError as error:
            entry(f"  {error}", 2)
            continue
        entry("  t      " + " ".join(f"{round(schedule.timestep(sigma), 2):g}" for sigma in sigmas[:-1]) + " end", 9)
        entry("  sigma  " + " ".join(f"{sigma:.4g}" for sigma in sigmas), 9)


def _first_line(function: Callable[..., Any]) -> str:
    """What a function does and where it comes from, by its docstring."""
    return (function.__doc__ or "").strip().partition("\n")[0]
