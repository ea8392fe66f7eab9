"""What a person sees of a run: a progress bar, warnings and errors of one line, and the exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ldm.errors import LdmError, MemoryLimit, OutputError, printable

if TYPE_CHECKING:
    from samplers import OnStep, Step

EXIT_CODES = """\
exit codes:
  0 done; 1 a fault of this program; 2 a bad argument or input file, or no such device; 3 a result could not be written;
  4 not enough memory; 5 a result with NaN or infinity; 6 'ldm diff --fail-on-difference' found one; 130 interrupted; \
143 terminated; 141 nobody reads the output
"""


class Terminated(BaseException):
    """SIGTERM came."""


def say(text: str) -> None:
    """A line on stderr, if there is one."""
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def show(text: str) -> None:
    """A line on stdout, at once: another program may be waiting for it."""
    print(text, flush=True)


@contextlib.contextmanager
def progress(title: str) -> Iterator[OnStep]:
    """An `on_step` that moves a bar, if there is a terminal to see it."""
    with bar_of(title, unit="call") as bar:

        def on_step(step: Step) -> None:
            bar.total = step.total
            bar.update()

        yield on_step if bar is not None else lambda step: None


@contextlib.contextmanager
def bar_of(title: str, **how: Any) -> Iterator[Any]:
    """A bar of tqdm; None without a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=title, leave=False, file=sys.stderr, **how) as bar:
        yield bar


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Warnings as `ldm: warning: ...` on stderr, each text once; what only programmers want to know is left out."""
    shown = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(printable(str(message)).split())
        if text not in shown:
            shown.add(text)
            print(f"ldm: warning: {text if len(text) <= 200 else text[:197] + '...'}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def termination_as_exception() -> Iterator[None]:
    """SIGTERM raises Terminated, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def explain(error: Exception, spelled: Mapping[str, str]) -> tuple[str, int]:
    """One line about an error, with arguments as `spelled` says that they are typed, and the exit code."""
    if isinstance(error, LdmError):
        return error.line(spelled), error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return "out of memory; use a smaller --width and --height, --batch 1 or --dtype bfloat16", MemoryLimit.exit_code
    if isinstance(error, OSError):
        return printable(str(error))[:150], OutputError.exit_code
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"a fault of this program, {printable(text)[:120]}; --debug shows where", 1
