"""How many of our files take part in one small picture of the model that ships: `python -m tests.whole.traced`.

A file takes part when a function in it is executed that has a name of its own: the body of a module or a class, a
comprehension and a lambda do not count. Lines are those of the whole file, laid out by one formatter for lines of 140
columns, so that figures of today compare with those of any other day.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ldm", "samplers", "weights")
SHIPPED = "weights/embedded/blocks.safetensors"
FORMAT = ["format", "--isolated", "--no-cache", "--line-length=140", "--config=format.skip-magic-trailing-comma=true"]
FUNCTION = 0x1  # CO_OPTIMIZED in the flags of a code object, which the bodies of modules and classes do not have

IMPORTS = """
import weights
from ldm import guided
from ldm.images import to_pil
from samplers import cfg, dpmpp_2m, finish, karras, seeded, start
"""
LOAD = "model = weights.load()"
PICTURE = """
cond = model.condition(["a red cube on top of a blue sphere"], size=(64, 64))
uncond = model.condition([""], size=(64, 64))
denoise = guided(model, [uncond, cond], cfg(7.5))
sigmas = karras(model.schedule, 2)
noise = seeded([7])
x = start(noise(model.latent_shape(1, 64, 64)), sigmas)
x = finish(dpmpp_2m(denoise, x, sigmas, noise=noise), sigmas)
to_pil(model.vae.decode(x))[0].save("python.png")
"""
TXT2IMG = "txt2img,a red cube,--steps,2,--width,64,--height,64,--seed,7,--out,command.png"


def command(words: str) -> str:
    """The Python lines that run one command line of ours; its words are separated by commas."""
    return f"from ldm.__main__ import main\nmain({words.split(',')})"


RUNS = {  # name: (lines that run first, lines that are traced)
    "python": (IMPORTS + LOAD, PICTURE),
    "reading": ("", f"import weights\n{LOAD}"),
    "txt2img": ("", command(TXT2IMG)),
    "samplers": ("", command("samplers")),
    "inspect": ("", command(f"inspect,{ROOT / SHIPPED}")),
    "help": ("", command("--help")),
}
TITLES = {
    "python": "a picture from Python, its model loaded before",
    "reading": "reading the file: what the picture does not use",
    "reading in all": "reading the file: all of it",
    "txt2img": "the same picture from the command line",
    "samplers": "ldm samplers",
    "inspect": "ldm inspect FILE",
    "help": "ldm --help",
}
LIMITS = {  # of files and lines that take part
    "python": (17, 2450),
    "reading": (12, 2000),
    "txt2img": (45, 6000),
}
MODULE_LIMITS = {"txt2img": 80, "reading": 45}  # of our files that are imported


@dataclass(frozen=True)
class Count:
    """What one run took."""

    files: tuple[str, ...]  # in which a function was executed, relative to the repository
    imported: tuple[str, ...]  # our files that were imported, executed or not


# --- in a process of its own ------------------------------------------------------------------------------------------


def observe(name: str) -> None:
    """Run one entry of RUNS in this process, and print as JSON which files it executed and imported."""
    before, traced = RUNS[name]
    codes: set[CodeType] = set()
    scope: dict[str, Any] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        exec(before, scope)
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            exec(traced, scope)
        finally:
            sys.setprofile(None)
    named = (code.co_filename for code in codes if code.co_flags & FUNCTION and not code.co_name.startswith("<"))
    loaded = (module.__file__ for module in [*sys.modules.values()] if getattr(module, "__file__", None))
    print(json.dumps({"files": ours(named), "imported": ours(loaded)}))


def ours(paths: Iterable[str]) -> list[str]:
    """The files of our packages among paths, relative to the repository."""
    inside = {Path(path).relative_to(ROOT) for path in paths if Path(path).is_relative_to(ROOT)}
    return sorted(str(path) for path in inside if path.parts[0] in PACKAGES)


# --- counting ---------------------------------------------------------------------------------------------------------


def counts(names: Iterable[str] = tuple(RUNS)) -> dict[str, Count]:
    """What each run takes, every one in a fresh process."""
    found: dict[str, Count] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            line = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tests.whole.traced as t; t.observe({name!r})"
            done = subprocess.run([sys.executable, "-c", line], cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
            seen = json.loads(done.stdout)
            found[name] = Count(tuple(seen["files"]), tuple(seen["imported"]))
    return found


def lengths() -> dict[str, int]:
    """The lines of every file of ours, as the formatter lays it out for 140 columns."""
    with tempfile.TemporaryDirectory() as folder:
        sources = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
        for source in sources:
            copy = Path(folder, source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / source).read_bytes())
        subprocess.run([sys.executable, "-m", "ruff", *FORMAT, folder], check=True, capture_output=True)
        return {str(source): lines(Path(folder, source)) for source in sources}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def taking_part(found: dict[str, Count]) -> dict[str, tuple[str, ...]]:
    """The files that are held against LIMITS: of reading, those that the picture itself does not use."""
    parts = {name: found[name].files for name in LIMITS}
    parts["reading in all"] = parts["reading"]
    parts["reading"] = tuple(file for file in parts["reading"] if file not in parts["python"])
    return parts


def main(argv: list[str]) -> None:
    """Print the table; with --files also the names of the files that take part."""
    found, length = counts(), lengths()
    print(f"{'files with an executed function':50}  files  limit  lines  limit  lines as they stand")
    parts = taking_part(found)
    for name, files in parts.items():
        total, stand = sum(length[file] for file in files), sum(lines(ROOT / file) for file in files)
        most = LIMITS.get(name, ("", ""))
        print(f"{TITLES[name]:50}  {len(files):5}  {most[0]:5}  {total:5}  {most[1]:5}  {stand:5}")
        if "--files" in argv:
            print("".join(f"    {length[file]:5}  {file}\n" for file in files), end="")
    print(f"\n{'files imported':50}  files  limit")
    for name in ("txt2img", "reading", "samplers", "inspect", "help"):
        title = {"txt2img": "ldm txt2img", "reading": "import weights; weights.load()"}.get(name, TITLES[name])
        print(f"{title:50}  {len(found[name].imported):5}  {MODULE_LIMITS.get(name, ''):5}")
    print(f"\n{', '.join(PACKAGES)}: {len(length)} files, {sum(length.values())} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
