"""A side in a process of its own, which works only when it is asked, and whose memory is its alone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import use, without_folders

ROOT = Path(__file__).resolve().parents[2]
Answer = dict[str, Any]


class SideFailed(Exception):
    """A side could not do what it should; the message is its own."""


class Unmeasured(Exception):
    """This side cannot do what was asked, for the reason given: not a fault of its own."""


def command(module: str, job: Any) -> list[str]:
    """The command that runs a module of ours for a job. With -P, `sides/diffusers.py` does not hide the package."""
    return [sys.executable, "-P", "-m", module, json.dumps(asdict(job))]


def environment() -> dict[str, str]:
    """The environment of that command: it finds our modules, and fetches nothing from the network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}


class Process:
    """One side in a process of its own. It waits, using no processor, while it is not asked."""

    def __init__(self, module: str, job: Any):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command(module, job), stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment()
        )

    def ask(self, **request: Any) -> Answer:
        """What the side answers. Raises Unmeasured or SideFailed, with its reason."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: `answer` says how
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Answer:
        """The next answer, which the side may also give unasked."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            reason = without_folders(self.errors.read().strip())[-300:]
            raise SideFailed(f"its process ended with status {status}: {reason}")
        answer = json.loads(line)
        if "unmeasured" in answer:
            raise Unmeasured(answer["unmeasured"])
        if "failed" in answer:
            raise SideFailed(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError), self.process:  # closes its pipes
            pass
        self.errors.close()


def serve(kind: type[Any], answers: Callable[[Any, Callable[[Answer], None]], None]) -> None:
    """What such a module does when it is run: answer for the job on its command line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error, so that answers stand alone
    job = kind(**json.loads(sys.argv[1]))
    use(job.threads)
    answers(job, lambda answer: print(json.dumps(answer), file=out, flush=True))


def attempted(make: Callable[[], Answer]) -> Answer:
    """The answer that a function makes, or why there is none: the side goes on with what is left."""
    try:
        return make()
    except Unmeasured as reason:
        return {"unmeasured": str(reason)}
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> Answer:
    """The answer that makes `ask` raise SideFailed."""
    return {"failed": without_folders(f"{type(error).__name__}: {error}")[:500]}
