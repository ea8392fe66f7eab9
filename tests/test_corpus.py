"""Every bad file is refused in one line that says what to do, soon, with nothing run; every odd but sound one loads bit by bit."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm.errors import FileError
from tests.corpus import REFUSALS, Refusal
from weights import open_file
from weights.folders import is_folder, open_folder

REMEDY = re.compile(
    r"; (near it: \S|(download|use|save|unpack|run|rename|convert|repack|name|join|wait|link|change|check|give) [^;]*$)"
)


def read_all(path: Path) -> None:
    """Open and read everything, as a loader would: some faults only show in the numbers."""
    with open_folder(path) if is_folder(path) else open_file(path) as file:
        for key in file:
            file[key]


def test_the_corpus_is_large_enough():
    assert len(REFUSALS) >= 150
    assert len({case.make for case in REFUSALS.values()}) >= 150


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_bad_file_is_refused_in_one_line_that_says_what_to_do(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = REFUSALS[kind]
    path = case.build(tmp_path)
    before = set(sys.modules)
    start = time.process_time()
    with pytest.raises(FileError) as caught:
        read_all(path)
    seconds = time.process_time() - start
    error, message = caught.value, str(caught.value)
    assert case.words in message
    assert error.key == case.key
    assert len(message) <= 200
    assert "\n" not in message
    assert message.isprintable()
    assert REMEDY.search(message), message
    assert Path(error.path).name in message or not Path(error.path).name.isprintable() or len(str(error.path)) > 80
    assert error.path == path or path in Path(error.path).parents
    assert not (tmp_path / "canary").exists()
    assert set(sys.modules) == before
    assert seconds < 1, f"{seconds:.2f} s"
