"""`ldm samplers`: every sampler and every grid."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from ldm.cli import arguments, terminal
from ldm.errors import require_whole
from samplers import DEFAULT_GRID, GRIDS, SAMPLERS, Schedule, calls


def add_samplers(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm samplers`."""
    parser.add_argument(
        "--steps", type=arguments.whole, default=25, metavar="N", help="to list them for (default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def samplers(args: argparse.Namespace) -> None:
    """Print every sampler and every grid as they are with this many steps of the schedule that all families but the \
upscaler share."""
    steps = require_whole("steps", args.steps, 1, 1000, " (the model has 1000 training steps)")
    schedule = Schedule()
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
