"""What the commands that time sides in turn have in common: options, their checks, and what is printed and written."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.sides.cells import DTYPES
from benchmarks.timing.rows import Row

MOST = {"batch": 1024, "repeats": 10**6, "threads": 4096}
Keep = Callable[[Mapping[str, Any]], None]


def add_options(parser: argparse.ArgumentParser, sides: Iterable[str]) -> None:
    """The options of both commands; `arguments` checks them and fills in what was not given."""
    parser.add_argument("--side", nargs="+", choices=sides, help="who is timed (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the arithmetic (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="of every time, the sides in turn, after the first (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of every side (default: torch's own choice)")
    tiny = "narrow networks: shows that this works, not how fast it is"
    parser.add_argument("--tiny", action="store_true", help=tiny)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep weights there for the next time")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all figures, the machine and the versions")


def arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, defaults: Mapping[str, Any], quick: Mapping[str, Any]
) -> argparse.Namespace:
    """The command line, checked; `quick` are the defaults with --quick. Exits with status 2 where it makes no sense."""
    args = parser.parse_args(argv)
    for name, value in {"repeats": 5, **defaults, **(quick if args.quick else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, most in MOST.items():
        for each in several(getattr(args, name)):
            if not 1 <= each <= most:
                parser.error(f"--{name} {each}: give 1 to {most}")
    for size in several(args.size):
        if size < 64 or size % 64:
            parser.error(f"--size {size}: give a multiple of 64, which all sides take without padding")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device}: give cpu, cuda or cuda:N")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no CUDA device here")
    return args


def several(value: Any) -> list[Any]:
    """The values of an option that takes one, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def run(
    args: argparse.Namespace, settings: Mapping[str, Any], packages: tuple[str, ...], measure: Callable[[Keep], Any]
) -> tuple[Any, dict[str, Any]]:
    """Print the settings and the machine, and measure. Returns what was measured, and the machine.

    measure  is given a function that writes the figures so far into --out, and calls it whenever there are more
    """
    print("\n".join(f"{name}: {value}" for name, value in settings.items()))
    here, begun = machine(args.device, packages), time.perf_counter()
    print(", ".join(f"{name} {value}" for name, value in here.items() if value is not None))

    def keep(found: Mapping[str, Any]) -> None:
        if args.out:
            args.out.write_text(json.dumps({"settings": settings, "machine": here, **found}, indent=1) + "\n")

    found = measure(keep)
    print(f"all in {time.perf_counter() - begun:.0f} s")
    return found, here


def status(rows: Iterable[Row]) -> int:
    """The exit status: 1 if an output was void or a side failed."""
    return int(any(row["status"] in ("void", "failed") for row in rows))
