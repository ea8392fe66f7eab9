"""Processes that begin with everything imported already: forked, each in a fraction of a second, from one that has."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldm.errors import LdmError

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "tests.made.forked", "torch._dynamo", "torch.distributed.fsdp", "ldm.train.loop"]
)


def start(
    function: Callable[..., None], *arguments: Any, said: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """A process that calls a function of some module, and ends as the command line does: what it says on stderr goes to
    the file `said`."""
    process = CONTEXT.Process(target=_run, args=(function, arguments, said, environment or {}), daemon=True)
    process.start()
    return process


def _run(function: Callable[..., None], arguments: tuple[Any, ...], said: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (it lives as long as the process)
    try:
        function(*arguments)
    except LdmError as error:
        if isinstance(error.__cause__, AssertionError):  # a test's own
            traceback.print_exception(error.__cause__)
        print(f"ldm: error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(99)


@contextmanager
def together(function: Callable[..., None], *arguments: Any, world: int, said: Path) -> Iterator[list[BaseProcess]]:
    """So many ranks, in an environment as torchrun's, whose store is in this process. `said` gets a file for each: 0, 1
    ... Killed at the end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    said.mkdir(parents=True, exist_ok=True)
    processes = [
        start(function, *arguments, said=said / str(rank),
            environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def succeed(processes: list[BaseProcess], said: Path) -> None:
    """Wait for their end; all must be content and silent."""
    for process in processes:
        process.join(120)
    told = "".join((said / str(rank)).read_text() for rank in range(len(processes)))
    assert [process.exitcode for process in processes] == [0] * len(processes), told
    assert not told, told
