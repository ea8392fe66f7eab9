"""What several files of tests are given."""

from __future__ import annotations

import shlex

import pytest

from ldm.__main__ import main


@pytest.fixture
def ldm(capsys):
    """Run a command line in this process; its code, lines of output and lines of errors."""

    def run(line: str) -> tuple[int, list[str], list[str]]:
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run
