"""How every test runs: processes and threads, folders with short names, the command line as a function."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldm.__main__ import main

ROOT = Path(__file__).parents[1]

# One thread a process, here and in every process that a test starts: two processes of two threads each on two cores
# wait for each other. A process that a test starts finds the packages of this clone, whatever else is installed.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; none for files that are named: to start them takes longer than most files."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A new folder with a short name, removed afterwards: error messages are cut at 200 characters, and the long names
    of pytest's own folders would push out of them what tests look for."""
    with tempfile.TemporaryDirectory(prefix="ldm-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


@pytest.fixture
def ldm(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, list[str], list[str]]]:
    """Run a command line in this process; its code, lines of output and lines of errors."""

    def run(line: str) -> tuple[int, list[str], list[str]]:
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run
