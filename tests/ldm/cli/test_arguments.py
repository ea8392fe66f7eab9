"""What is typed: a command imports what it needs, and errors name arguments as the command has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli import COMMANDS, arguments, terminal
from ldm.errors import ArgumentError, FileError

ROOT = Path(__file__).parents[3]
IMPORTED = """
import contextlib, io, json, sys
from ldm.__main__ import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main(sys.argv[1:])
print(json.dumps([*sys.modules]))
"""


def imported(line: str) -> tuple[set[str], set[str]]:
    """The modules of ours that a command line imports in a process of its own, and all others."""
    run = [sys.executable, "-c", IMPORTED, *line.split()]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=900, check=True)
    names = set(json.loads(done.stdout))
    ours = {name for name in names if name.split(".")[0] in ("ldm", "samplers", "weights")}
    return ours, names - ours


@pytest.mark.parametrize(
    ("line", "most", "without"),
    [
        ("--help", 8, ("torch", "numpy", "PIL")),
        ("lora --help", 10, ("torch", "numpy")),
        ("samplers", 20, ("ldm.model", "ldm.networks.unet", "weights")),
        ("merge a", 20, ("ldm.networks.unet", "ldm.tasks", "ldm.denoiser")),
        ("inspect", 80, ("ldm.tasks", "ldm.denoiser", "ldm.fast", "ldm.cli.options", "weights.tools.convert")),
        (
            "txt2img x --n 0",
            80,
            ("ldm.fast.optimize", "ldm.changes", "ldm.train", "ldm.pictures.sheets", "ldm.cli.image"),
        ),
    ],
)
def test_a_command_imports_what_it_needs(line, most, without):
    ours, others = imported(line)
    assert len(ours) <= most, sorted(ours)
    assert not (ours | others) & set(without)
    modules = {f"ldm.cli.{command.module}" for command in COMMANDS.values()}
    assert len(ours & modules) == (line != "--help")


NO_AVERAGE = FileError("has none", path="a.ckpt", remedy="load it with {ema=False}")


@pytest.mark.parametrize(
    ("line", "error", "text"),
    [
        ("txt2img x", ArgumentError("rescale: 2; give less", key="rescale"), "--cfg-rescale: 2; give less"),
        ("txt2img x", ArgumentError("scale: 9; give less", key="scale"), "--hires: 9; give less"),
        ("hires x", ArgumentError("scale: 9; give less", key="scale"), "--scale: 9; give less"),
        ("txt2img x", ArgumentError("window: 9; give less", key="window"), "window: 9; give less"),
        ("convert a b", NO_AVERAGE, "a.ckpt: has none; load it with --raw"),
        ("txt2img x", NO_AVERAGE, "a.ckpt: has none; load it with no --ema"),
        ("train x", NO_AVERAGE, "a.ckpt: has none; load it with ema=False"),
        ("lora extract a b --out c --rank 2", FileError("odd", remedy="say {text=False}"), "odd; say --no-text"),
        ("merge a b --out c", FileError("odd", remedy="say {partial=True}"), "odd; say --partial"),
    ],
)  # fmt: skip
def test_an_error_names_arguments_as_the_command_has_them(line, error, text):
    args = arguments.parse(COMMANDS, line.split())
    assert terminal.explain(error, args.spelled) == (text, 2)
