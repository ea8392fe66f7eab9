"""The command line, `ldm` or `python -m ldm`: arguments in, pictures and exit codes out."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

import weights
from ldm import images, tasks
from ldm.cli import arguments, machine, terminal, training
from ldm.cli.arguments import Command
from ldm.cli.place import Place
from ldm.errors import printable
from ldm.model import LatentDiffusion
from samplers import DEFAULT_GRID, GRIDS, SAMPLERS, Schedule, calls
from weights.load import embedded

# --- the commands ---------------------------------------------------------------------------------------------------


def txt2img(args: argparse.Namespace) -> None:
    """Write pictures of what the prompt says."""
    width, height = arguments.side(args.width, "--width"), arguments.side(args.height, "--height")

    def draw(model: LatentDiffusion, **settings: Any) -> list[Image.Image]:
        return tasks.txt2img(model, args.prompt, width=width, height=height, **settings)

    make(args, draw, width=width, height=height)


def img2img(args: argparse.Namespace) -> None:
    """Write pictures that begin as another one."""
    tasks.require_strength(args.strength, arguments.sampling(args))
    init = images.open_image(args.init)
    width, height = images.size_for(init, arguments.side(args.width, "--width"), arguments.side(args.height, "--height"))
    if args.width is args.height is None and (width, height) != init.size:
        warnings.warn(f"--init: {init.width}x{init.height} becomes {width}x{height}, multiples of 8", stacklevel=2)

    def draw(model: LatentDiffusion, **settings: Any) -> list[Image.Image]:
        return tasks.img2img(model, init, args.prompt, strength=args.strength, width=width, height=height, **settings)

    facts = {"strength": repr(args.strength), "init": Path(args.init).name, "init_hash": file_hash(Path(args.init))}
    make(args, draw, width=width, height=height, facts=facts)


def list_samplers(args: argparse.Namespace) -> None:
    """Print every sampler and every grid as they are with this many steps of the schedule that all families but the upscaler share."""
    schedule, steps = Schedule(), tasks.Sampling(steps=args.steps).steps
    width = shutil.get_terminal_size((120, 24)).columns

    def entry(text: str, indent: int) -> None:
        terminal.show(textwrap.fill(text, max(width, 60), subsequent_indent=" " * indent, break_on_hyphens=False))

    terminal.show(f"Samplers, each with its own grid and the network calls that {steps} steps of it take:\n")
    for name, sampler in SAMPLERS.items():
        count = calls(name, GRIDS[DEFAULT_GRID[name]](schedule, steps))
        entry(f"{name:20}{DEFAULT_GRID[name]:10}{count:5}  {first_line(sampler)}", 37)
    terminal.show(f"\nGrids of {steps} steps, as timesteps and as sigmas:")
    for name, grid in GRIDS.items():
        terminal.show("")
        entry(f"{name:20}{first_line(grid)}", 20)
        try:
            sigmas = grid(schedule, steps)
        except ValueError as error:
            entry(f"  {error}", 2)
            continue
        entry("  t      " + " ".join(f"{round(schedule.timestep(sigma), 2):g}" for sigma in sigmas[:-1]) + " end", 9)
        entry("  sigma  " + " ".join(f"{sigma:.4g}" for sigma in sigmas), 9)


def train(args: argparse.Namespace) -> None:
    """Train one stage of the model that ships; the last one leaves the model in the original layout."""
    if model := training.run(args):
        path = weights.save(model, Path(args.out) / "model.safetensors", overwrite=True)
        terminal.show(printable(str(path)))


# One entry is one subcommand: what 'ldm --help' says of it, its arguments, what runs it, examples for its own --help.
COMMANDS: dict[str, Command] = {
    "txt2img": Command("draw what a prompt says", arguments.add_txt2img, txt2img, """
  ldm txt2img "a red cube on top of a blue sphere"
  ldm txt2img "a green cone behind a yellow cylinder" --n 9 --seed 7 --sheet
  ldm txt2img "a lighthouse in a storm" --ckpt v1-5-pruned-emaonly.safetensors --steps 30 --out lighthouse.png"""),
    "img2img": Command("redraw a picture as a prompt says", arguments.add_img2img, img2img, """
  ldm img2img "a purple cone on top of a blue sphere" --init outputs/00001.png --strength 0.7
  ldm img2img "an oil painting of a harbour" --init photo.jpg --width 512 --ckpt v1-5-pruned-emaonly.safetensors"""),
    "train": Command("train the model that ships", training.add_train, train, """
  ldm train vae --out runs/vae
  ldm train diffusion --vae runs/vae --out runs/blocks"""),
    "samplers": Command("list samplers and grids", arguments.add_samplers, list_samplers, """
  ldm samplers --steps 10"""),
}  # fmt: skip


# --- from arguments to pictures -------------------------------------------------------------------------------------


def make(args: argparse.Namespace, draw: Callable[..., list[Image.Image]], *, width: int | None, height: int | None, facts: dict[str, str] | None = None) -> None:
    """Check everything, then load the model, then draw batch by batch, writing each picture as soon as it is done.

    draw(model, seeds, negative, on_step, **sampling) -> pictures;  facts: further metadata
    """
    options = arguments.sampling(args)
    arguments.check(args)
    seeds = arguments.seeds_of(args)
    device = machine.device_of(args.device)
    dtype = machine.dtype_of(args.dtype, device)
    place = Place.checked(args.out, mkdir=args.mkdir, overwrite=args.overwrite, pixels=(width or 512) * (height or 512) * args.n)
    if args.seed is None:
        terminal.say(f"ldm: seed {seeds[0]}")  # without it the picture could not be made again
    model = weights.load(args.ckpt, args.config, device=device, dtype=dtype, ema=args.ema)
    size = (width or model.config.size, height or model.config.size)
    machine.check_size(model, size, min(args.batch, args.n))
    facts = describe(args, model, options, *size) | (facts or {})

    done: list[tuple[int, Image.Image]] = []
    settings = {field.name: getattr(options, field.name) for field in fields(options)}
    for first in range(0, args.n, args.batch):
        part = seeds[first : first + args.batch]
        with terminal.progress(f"{first + 1}-{first + len(part)} of {args.n}" if args.n > 1 else "") as watch:
            on_step = place.previewing(model, args.preview, watch) if args.preview else watch
            pictures = draw(model, seeds=part, negative=args.negative, on_step=on_step, **settings)
        for seed, picture in zip(part, pictures, strict=True):
            terminal.show(printable(str(place.save(picture, facts | {"seed": str(seed)}))))
            if args.sheet:
                done.append((seed, picture))
    if args.sheet:
        together = images.sheet([picture for _, picture in done], [f"seed {seed}" for seed, _ in done])
        facts |= {"seed": str(seeds[0]), "seeds": " ".join(map(str, seeds))}
        terminal.show(printable(str(place.save(together, facts, "-sheet"))))


def describe(args: argparse.Namespace, model: LatentDiffusion, options: tasks.Sampling, width: int, height: int) -> dict[str, str]:
    """What made a picture, but for its seed: the text chunks of the PNG. No time and no path, so that the same command gives the same bytes."""
    path = Path(args.ckpt) if args.ckpt else embedded()
    facts = {
        "task": args.command, "prompt": args.prompt, "negative_prompt": args.negative, "seed": "", "sampler": options.sampler, "grid": options.grid_name,
        "steps": str(options.steps), "cfg": repr(options.cfg), "size": f"{width}x{height}", "model": path.name, "model_hash": file_hash(path),
        "dtype": str(model.dtype).removeprefix("torch."), "version": arguments.version(),
    }  # fmt: skip
    if options.rescale:
        facts["cfg_rescale"] = repr(options.rescale)
    if options.interval:
        facts["cfg_interval"] = " ".join(map(repr, options.interval))
    if options.eta is not None:
        facts["eta"] = repr(options.eta)
    if options.clip_skip != 1:
        facts["clip_skip"] = str(options.clip_skip)
    return facts | ({"ema": "true"} if args.ema else {})


def file_hash(path: Path) -> str:
    """The first 10 hexadecimal digits of the file's SHA-256, as other tools name models. A 4 GB file takes about 3 seconds."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:10]


def first_line(function: Callable[..., Any]) -> str:
    """What a function does and where it comes from, by its docstring."""
    return (function.__doc__ or "").strip().partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, as listed in terminal.EXIT_CODES. Errors are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no name or prompt is unprintable
    try:
        with terminal.warnings_in_a_line(), terminal.termination_as_exception():
            args = arguments.parse(COMMANDS, argv)
            COMMANDS[args.command].run(args)
            return 0
    except SystemExit as done:  # --help, --version
        return done.code or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it closes stdout
        return 141
    except (KeyboardInterrupt, terminal.Terminated) as stop:
        terminal.say("ldm: stopped; the pictures listed are complete")
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    except Exception as error:
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        text, code = terminal.explain(error)
        terminal.say(f"ldm: error: {text}")
        return code


if __name__ == "__main__":
    sys.exit(main())
