"""Times making pictures, stage by stage and end to end, in turn with diffusers, OpenVINO and others on the same weights, inputs, dtype and threads."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import machine
from benchmarks.models.peers import require, write_folder
from benchmarks.sides.all import DTYPES, GRID, SIDES, Job
from benchmarks.sides.cells import GUIDANCE, MODELS, STAGES, Cell, config_of
from benchmarks.timing import plot
from benchmarks.timing.floors import peak
from benchmarks.timing.rounds import rows_of
from benchmarks.timing.rows import Row, growth

QUICK = {
    "side": ("ldm", "fast", "diffusers", "openvino", "sdcpp"),
    "repeats": 2,
}  # diffusers' best recipe compiles for minutes
PACKAGES = ("diffusers", "transformers", "openvino", "stable-diffusion-cpp-python")


def plan(args: argparse.Namespace, family: str) -> list[Cell]:
    """The cells of a model. Pictures come first, so that the first of them is the first thing that a process makes."""
    own = config_of(family, tiny=args.tiny).size
    if args.quick:
        half = max(64, own // 2)
        return [
            Cell("picture", 1, half, "ddim", 2),
            *dict.fromkeys(Cell("step", 1, size) for size in (half, own)),
            Cell("text", 1, own),
            Cell("decode", 1, half),
        ]
    cells = []
    for batch in args.batch:
        sizes = args.size or [own]
        for size in sizes:
            cells += [Cell("picture", batch, size, *each) for each in args.sampler if "picture" in args.stage]
            cells += [Cell(stage, batch, size) for stage in ("step", "decode") if stage in args.stage]
        cells += [Cell("text", batch, sizes[0])] * ("text" in args.stage)  # text knows of no size
    return cells


def measure(args: argparse.Namespace, keep: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """All figures; `keep` is told them whenever there are more."""
    found: dict[str, Any] = {"peak": peak(args.device, DTYPES[args.dtype]), "sides": [], "rows": [], "growth": []}
    print(
        f"this machine was seen to reach {found['peak']['best'] / 1e9:.4g} GFLOP/s: a floor is a cell's FLOPs at that rate",
        flush=True,
    )
    print(HEAD)
    with tempfile.TemporaryDirectory() as passing:
        cache = args.cache or Path(passing)
        cache.mkdir(parents=True, exist_ok=True)
        for family in args.model:
            folder = cache / f"{'tiny-' * args.tiny}{family}-{args.dtype}"
            if not folder.exists():
                write_folder(config_of(family, tiny=args.tiny), folder, DTYPES[args.dtype])
            job = Job("ldm", family, args.tiny, str(folder), "", args.dtype, args.device, args.threads)
            for row in rows_of(job, args.side, plan(args, family), args.repeats, found["peak"]["best"], found["sides"]):
                show(row)
                found["rows"].append(row)
                keep(found)
    found["growth"] = growth(found["rows"])
    return found


# --- what is printed --------------------------------------------------------------------------------------------------

HEAD = f"{'':38}{'side':15} {'median (p10 to p90), s':34} {'ratio':>6} {'x floor':>8} {'first, s':>9} {'peak, GB':>9}  {'mean error':>10}"


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
    """Print how each side began: the seconds and the memory until it could work, and to the first picture of a new process."""
    for side in sides:
        cold = next(
            (
                row["cold"]
                for row in rows
                if row["cold"] and (row["model"], row["side"]) == (side["model"], side["side"])
            ),
            None,
        )
        held = [
            f" and {part['bytes'] / 1e9:.2f} GB" if part["bytes"] is not None else ""
            for part in (side["imported"], side["loaded"])
        ]
        line = f"{side['model']} {side['side']}: imported in {side['imported']['seconds']:.2f} s{held[0]}, loaded in {side['loaded']['seconds']:.2f} s{held[1]}"
        line += f", first picture {cold:.2f} s after the start" if cold else ""
        print("; ".join([line, *side["notes"]]))


def show_growth(found: Iterable[Mapping[str, Any]]) -> None:
    """Print how times grow beside FLOPs."""
    for each in found:
        stage = f"{each['stage']} {each['sampler']}:{each['steps']}" if each["sampler"] else each["stage"]
        print(
            f"{each['what']} {each['from']} -> {each['to']}, {each['model']} {stage}, {each['side']}: {each['times']:.2f} times the time for {each['flops']:.2f} times the FLOPs"
        )


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Exits with status 2 where it cannot be honoured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, help="seeded weights of these (default: sd1)")
    parser.add_argument("--side", nargs="+", choices=SIDES, help="who makes pictures (default: all)")
    parser.add_argument(
        "--stage",
        nargs="+",
        choices=STAGES,
        help="; ".join(f"{name}: {what}" for name, what in STAGES.items()) + " (default: all)",
    )
    parser.add_argument("--batch", nargs="+", type=int, help="pictures made at once (default: 1)")
    parser.add_argument(
        "--size", nargs="+", type=int, help="pixels along a side, multiples of 64 (default: the model's own)"
    )
    parser.add_argument(
        "--sampler",
        nargs="+",
        metavar="NAME:STEPS",
        help=f"of pictures, {' or '.join(GRID)} (default: ddim:50 dpmpp_2m:20)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, help="of every time, the sides in turn, after the first call (default: 5)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of every side (default: torch's own choice)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a short list of cells: one picture in 2 steps and decoding at half the size, steps at both, text; 2 repeats; all sides but diffusers-best",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="narrow networks: shows that this works, not how fast it is"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep weights and converted networks there for the next time (default: a passing folder)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write all figures there, with the machine and the versions"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios to diffusers there")
    args = parser.parse_args(argv)
    fixed = [
        f"--{name}" for name in ("stage", "batch", "size", "sampler") if args.quick and getattr(args, name) is not None
    ]
    if fixed:
        parser.error(f"{', '.join(fixed)}: --quick has its own; leave one of them out")
    defaults = {
        "model": ["sd1"],
        "side": list(SIDES),
        "stage": list(STAGES),
        "batch": [1],
        "sampler": ["ddim:50", "dpmpp_2m:20"],
        "repeats": 5,
    }
    for name, value in (defaults | (QUICK if args.quick else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.sampler = [_sampler(parser, text) for text in args.sampler]
    for name, most in (("batch", 1024), ("repeats", 10**6), ("threads", 4096)):
        value = getattr(args, name)
        for each in value if isinstance(value, list) else [value] * (value is not None):
            if not 1 <= each <= most:
                parser.error(f"--{name} {each}: give 1 to {most}")
    for size in args.size or ():
        if size < 64 or size % 64:
            parser.error(f"--size {size}: give multiples of 64, which all sides take without padding")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device}: give cpu, cuda or cuda:N")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no CUDA device here")
    return args


def _sampler(parser: argparse.ArgumentParser, text: str) -> tuple[str, int]:
    name, _, steps = text.partition(":")
    if name not in GRID or not steps.isdecimal() or not 1 <= int(steps) <= 999:
        parser.error(f"--sampler {text}: give {' or '.join(f'{name}:STEPS' for name in GRID)}, 1 to 999 steps")
    return name, int(steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0, or 1 if an output was void or a side failed."""
    args = arguments(argv)
    if {"diffusers", "diffusers-best", "openvino"} & {*args.side}:
        require("bench", "diffusers", "transformers")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    settings: dict[str, Any] = {
        name: getattr(args, name) for name in ("side", "dtype", "repeats", "device", "threads", "quick", "tiny")
    }
    settings |= {
        "guidance": GUIDANCE,
        "cells": {family: [str(cell) for cell in plan(args, family)] for family in args.model},
    }
    print("\n".join(f"{name}: {value}" for name, value in settings.items()))
    here, begun = machine(args.device, PACKAGES), time.perf_counter()
    print(", ".join(f"{name} {value}" for name, value in here.items() if value is not None))

    def keep(found: Mapping[str, Any]) -> None:
        if args.out:
            args.out.write_text(
                json.dumps({"settings": settings, "stages": STAGES, "machine": here, **found}, indent=1) + "\n"
            )

    found = measure(args, keep)
    keep(found)
    show_sides(found["sides"], found["rows"])
    show_growth(found["growth"])
    print(f"all in {time.perf_counter() - begun:.0f} s")
    if args.plot:
        caption = f"{here.get('gpu') or here['cpu']}, {here['threads']} threads, torch {here['torch']}, diffusers {here['diffusers']}"
        plot.draw(found["rows"], "Times as fast as diffusers eager", caption).save(args.plot)
    return 1 if any(row["status"] in ("void", "failed") for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
