"""Times making pictures, by stages and end to end, in turn with other libraries on the same weights and inputs."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import use
from benchmarks.models.peers import require, write_folder
from benchmarks.sides.all import SIDES
from benchmarks.sides.cells import DTYPES, GRID, GUIDANCE, MODELS, STAGES, Cell, Job, config_of
from benchmarks.timing import command, plot
from benchmarks.timing.floors import peak
from benchmarks.timing.rounds import rows_of
from benchmarks.timing.rows import Row, growth

# The defaults, and those of --quick, in which diffusers' best recipe, which compiles for minutes, has no part.
DEFAULTS = {"model": ["sd1"], "side": [*SIDES], "stage": [*STAGES], "batch": [1], "sampler": ["ddim:50", "dpmpp_2m:20"]}
QUICK = {"side": ["ldm", "fast", "diffusers", "openvino", "sdcpp"], "repeats": 2}
PACKAGES = ("diffusers", "transformers", "openvino", "stable-diffusion-cpp-python")


def plan(args: argparse.Namespace, family: str) -> list[Cell]:
    """The cells of a model. Pictures come first, so that the first of them is the first thing that a process makes."""
    own = config_of(family, tiny=args.tiny).size
    if args.quick:
        half = max(64, own // 2)
        steps = dict.fromkeys(Cell("step", 1, size) for size in (half, own))
        return [Cell("picture", 1, half, "ddim", 2), *steps, Cell("text", 1, own), Cell("decode", 1, half)]
    cells = []
    for batch in args.batch:
        sizes = args.size or [own]
        for size in sizes:
            cells += [Cell("picture", batch, size, *each) for each in args.sampler if "picture" in args.stage]
            cells += [Cell(stage, batch, size) for stage in ("step", "decode") if stage in args.stage]
        cells += [Cell("text", batch, sizes[0])] * ("text" in args.stage)  # text knows of no size
    return cells


def measure(args: argparse.Namespace, keep: command.Keep) -> dict[str, Any]:
    """All figures; `keep` gets them whenever there are more."""
    reached = peak(args.device, DTYPES[args.dtype])
    found: dict[str, Any] = {"stages": STAGES, "peak": reached, "sides": [], "rows": [], "growth": []}
    best = found["peak"]["best"]
    seen = f"this machine was seen to reach {best / 1e9:.4g} GFLOP/s: a floor is a cell's FLOPs at that rate"
    print(f"{seen}\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory() as passing:
        cache = args.cache or Path(passing)
        cache.mkdir(parents=True, exist_ok=True)
        for family in args.model:
            folder = cache / f"{'tiny-' * args.tiny}{family}-{args.dtype}"
            if not folder.exists():
                write_folder(config_of(family, tiny=args.tiny), folder, DTYPES[args.dtype])
            job = Job("ldm", family, args.tiny, str(folder), "", args.dtype, args.device, args.threads)
            for row in rows_of(job, args.side, plan(args, family), args.repeats, best, found["sides"]):
                show(row)
                found["rows"].append(row)
                keep(found)
    found["growth"] = growth(found["rows"])
    keep(found)
    show_sides(found["sides"], found["rows"])
    show_growth(found["growth"])
    return found


HEAD = f"{'':38}{'side':15} {'median (p10 to p90), s':34} {'ratio':>6} {'x floor':>8} "
HEAD += f"{'first, s':>9} {'peak, GB':>9}  {'mean error':>10}"


def show(row: Row) -> None:
    """Print one line of the table."""
    line = f"{row['model'] + ' ' + row['cell']:38}{row['side']:15} "
    if row["seconds"]:
        times = row["seconds"]
        peak_bytes = row["peak"] if row["device_peak"] is None else row["device_peak"]
        line += f"{times['median']:9.4g} ({times['p10']:.4g} to {times['p90']:.4g})".ljust(35)
        line += f"{row['ratio']:6.2f} " if row["ratio"] else " " * 7
        line += f"{row['of_floor']:8.2f} {row['first']:9.4g} "
        line += f"{peak_bytes / 1e9:9.2f}  " if peak_bytes is not None else " " * 11
        line += f"{row['error']['mean']:10.1e}  " if row["error"] else " " * 12
    print(f"{line}{row['status']}{': ' + row['why'] if row['why'] else ''}", flush=True)


def show_sides(sides: Iterable[Mapping[str, Any]], rows: Sequence[Row]) -> None:
    """Print how each side began: seconds and memory until it could work, and to the first picture of a new process."""
    for side in sides:
        name = (side["model"], side["side"])
        line = " ".join(name)
        for what, part in (("imported", side["imported"]), ("loaded", side["loaded"])):
            held = f" and {part['bytes'] / 1e9:.2f} GB" if part["bytes"] is not None else ""
            line += f"{':' if what == 'imported' else ','} {what} in {part['seconds']:.2f} s{held}"
        cold = next((row["cold"] for row in rows if row["cold"] and (row["model"], row["side"]) == name), None)
        line += f", first picture {cold:.2f} s after the start" if cold else ""
        print("; ".join([line, *side["notes"]]))


def show_growth(found: Iterable[Mapping[str, Any]]) -> None:
    """Print how times grow beside FLOPs."""
    for each in found:
        stage = f"{each['stage']} {each['sampler']}:{each['steps']}" if each["sampler"] else each["stage"]
        line = f"{each['what']} {each['from']} -> {each['to']}, {each['model']} {stage}, {each['side']}: "
        print(f"{line}{each['times']:.2f} times the time for {each['flops']:.2f} times the FLOPs")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Exits with status 2 where it cannot be honoured."""
    parser = argparse.ArgumentParser(description=__doc__)
    stages = "; ".join(f"{name}: {what}" for name, what in STAGES.items())
    samplers = " or ".join(GRID)
    quick = "a short list of cells: a picture in 2 steps and decoding at half the size, steps at both, text; "
    quick += "2 repeats; all sides but diffusers-best"
    parser.add_argument("--model", nargs="+", choices=MODELS, help="seeded weights of these (default: sd1)")
    parser.add_argument("--stage", nargs="+", choices=STAGES, help=f"{stages} (default: all)")
    parser.add_argument("--batch", nargs="+", type=int, help="pictures made at once (default: 1)")
    parser.add_argument(
        "--size", nargs="+", type=int, help="pixels along a side, multiples of 64 (default: the model's)"
    )
    parser.add_argument("--sampler", nargs="+", metavar="NAME:STEPS", help=f"{samplers} (default: ddim:50 dpmpp_2m:20)")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios to diffusers there")
    command.add_options(parser, SIDES)
    fixed = ("stage", "batch", "size", "sampler")
    given = [f"--{name}" for name in fixed if getattr(parser.parse_args(argv), name) is not None]
    args = command.arguments(parser, argv, DEFAULTS, QUICK)
    if args.quick and given:
        parser.error(f"{', '.join(given)}: --quick has its own; leave one of them out")
    args.sampler = [_sampler(parser, text) for text in args.sampler]
    return args


def _sampler(parser: argparse.ArgumentParser, text: str) -> tuple[str, int]:
    name, _, steps = text.partition(":")
    if name not in GRID or not steps.isdecimal() or not 1 <= int(steps) <= 999:
        choices = " or ".join(f"{name}:STEPS" for name in GRID)
        parser.error(f"--sampler {text}: give {choices}, 1 to 999 steps")
    return name, int(steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0, or 1 if an output was void or a side failed."""
    args = arguments(argv)
    if {"diffusers", "diffusers-best", "openvino"} & {*args.side}:
        require("bench", "diffusers", "transformers")
    use(args.threads)
    names = ("side", "dtype", "repeats", "device", "threads", "quick", "tiny")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    settings |= {"guidance": GUIDANCE, "cells": {name: [str(cell) for cell in plan(args, name)] for name in args.model}}
    found, here = command.run(args, settings, PACKAGES, lambda keep: measure(args, keep))
    if args.plot:
        caption = f"{here.get('gpu') or here['cpu']}, {here['threads']} threads, "
        caption += f"torch {here['torch']}, diffusers {here['diffusers']}"
        plot.draw(found["rows"], "Times as fast as diffusers eager", caption).save(args.plot)
    return command.status(found["rows"])


if __name__ == "__main__":
    sys.exit(main())
