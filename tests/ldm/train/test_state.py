"""The state of a run: complete under its name or not there, whatever fails; the newest sound one is found; one run in a
directory."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import ArgumentError, OutputError
from ldm.train import state as module
from ldm.train.state import latest_state, only_run, save_state
from tests.made.warned import caught

FACTS = {"identity": {"data": "a1", "lr": 1e-4}, "skipped": 3}


def tensors(seed: float) -> dict[str, torch.Tensor]:
    return {
        "raw/a": torch.full((3, 5), seed), "raw/turned": torch.arange(6.0).reshape(2, 3).T * seed,
        "raw/half": torch.tensor([seed]).bfloat16(), "adam/step/a": torch.tensor(seed),
        "adam/state1/a": torch.arange(9, dtype=torch.uint8), "count": torch.tensor(2**40), "empty": torch.zeros(0, 3),
    }  # fmt: skip


def same(found, wanted) -> bool:
    return set(found) == set(wanted) and all(
        found[key].dtype == value.dtype and found[key].equal(value) for key, value in wanted.items()
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_state_reads_back_bit_by_bit_and_is_the_safetensors_that_others_read(tmp_path):
    path = save_state(tmp_path / "new" / "states", 500, tensors(1.5), FACTS, keep=2)
    assert path == tmp_path / "new" / "states" / "step-000500"
    assert names(path) == ["state.json", "tensors.safetensors"]
    state = latest_state(path.parent)
    assert (state.step, state.facts, state.path) == (500, FACTS, path)
    assert same(state.open(), tensors(1.5))
    assert same(load_file(path / "tensors.safetensors"), tensors(1.5))
    assert (path.parent / "LATEST").read_text() == "step-000500\n"
    with pytest.raises(KeyError):
        state.open()["raw/b"]


def test_where_there_is_no_state_none_is_found(tmp_path):
    assert latest_state(tmp_path) is None
    assert latest_state(tmp_path / "nowhere") is None


def test_as_many_states_stay_as_are_asked_for_and_the_newest_is_found(tmp_path):
    for step in (5, 10, 999_995, 1_000_000):  # the names' order is not the steps'
        save_state(tmp_path, step, tensors(step), FACTS, keep=3)
    assert names(tmp_path) == ["LATEST", "step-000010", "step-1000000", "step-999995"]
    assert latest_state(tmp_path).step == 1_000_000
    save_state(tmp_path, 1_000_005, tensors(1.0), FACTS, keep=1)
    assert names(tmp_path) == ["LATEST", "step-1000005"]


def test_a_state_takes_the_place_of_one_of_the_same_step(tmp_path):
    save_state(tmp_path, 5, tensors(1.0), FACTS, keep=2)
    save_state(tmp_path, 5, tensors(2.0), {}, keep=2)
    assert names(tmp_path) == ["LATEST", "step-000005"]
    assert same(latest_state(tmp_path).open(), tensors(2.0))


# --- faults of the disk ---------------------------------------------------------------------------------------------

CALLS = ("mkdir", "open", "write", "fsync", "replace", "rename", "rmdir", "unlink")


class Faults:
    """Counts the calls to the system that write, and lets one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int):
        self.calls: list[str] = []
        self.failing, self.code = -1, code
        for call in CALLS:
            monkeypatch.setattr(os, call, self.wrapped(call, getattr(os, call)))

    def wrapped(self, call: str, real):
        def wrapper(*arguments, **keywords):
            writes = call != "open" or (len(arguments) > 1 and arguments[1] & (os.O_WRONLY | os.O_RDWR))
            self.calls += [call] if writes else []
            if writes and len(self.calls) - 1 == self.failing:
                if call == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])  # a part had room
                raise OSError(self.code, os.strerror(self.code))
            return (
                None if call == "fsync" else real(*arguments, **keywords)
            )  # nobody pulls a plug here, and it takes long

        return wrapper


@pytest.mark.parametrize(
    ("code", "step"),
    [(errno.ENOSPC, 15), (errno.EIO, 10)],
    ids=["full disk", "broken disk, in place of one of the same step"],
)
def test_whichever_call_fails_the_state_before_stays_and_the_new_one_is_whole_or_not_there(
    tmp_path, monkeypatch, code, step
):
    """Every call that writes fails once, from the temporary directory's making to the oldest state's deletion."""
    before = tmp_path / "before"
    for k in (5, 10):
        save_state(before, k, tensors(k), FACTS, keep=2)
    faults, failed, k = Faults(monkeypatch, code), set(), 0
    while True:
        directory = tmp_path / str(k)
        shutil.copytree(before, directory)
        faults.calls, faults.failing = [], k
        try:
            save_state(directory, step, tensors(0.5), FACTS, keep=2)
            message = None
        except OutputError as error:
            message = str(error)
        calls, faults.failing = faults.calls, -1
        if len(calls) <= k:
            break
        failed |= {calls[k]} if message else set()
        assert message is None or os.strerror(code) in message
        found, warned = caught(lambda directory=directory: latest_state(directory))
        old, new = (
            found.step == 10 and same(found.open(), tensors(10)),
            found.step == step and same(found.open(), tensors(0.5)),
        )
        assert new or (old and message)
        assert found.path.name == f"step-{found.step:06d}"
        assert not warned
        assert not list(directory.glob("*.tmp")) or calls[k] in (
            "rmdir",
            "unlink",
        )  # what could not be deleted has a name that nobody reads
        save_state(directory, 20, tensors(2.0), FACTS, keep=2)  # the next one is written as if nothing had been
        assert latest_state(directory).step == 20
        assert not list(directory.glob("*.tmp"))
        k += 1
    assert message is None
    assert calls.count("write") > 5
    assert failed == set(CALLS)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    save_state(tmp_path, 5, tensors(1.0), FACTS, keep=1)
    assert same(latest_state(tmp_path).open(), tensors(1.0))


def test_an_interrupt_leaves_the_state_before_and_nothing_else(tmp_path, monkeypatch):
    save_state(tmp_path, 5, tensors(1.0), FACTS, keep=1)
    before = names(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, 10, tensors(2.0), FACTS, keep=1)
    assert names(tmp_path) == before
    assert latest_state(tmp_path).step == 5


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match=r"it needs 0\.00 GB and the disk has 0\.00 GB free; make room"):
        save_state(tmp_path, 5, tensors(1.0), FACTS, keep=1)
    assert names(tmp_path) == []


def test_a_disk_that_does_not_keep_what_was_written_is_found_before_an_older_state_goes(tmp_path, monkeypatch):
    save_state(tmp_path, 5, tensors(1.0), FACTS, keep=1)
    real = os.write
    monkeypatch.setattr(
        os, "write", lambda descriptor, data: real(descriptor, bytes(len(data)) if len(data) == 60 else data)
    )
    with pytest.raises(
        OutputError,
        match=r"does not read back as it was written \(tensors\.safetensors does not fit its checksum\); "
        r"check the disk",
    ):
        save_state(tmp_path, 10, tensors(2.0), FACTS, keep=1)
    assert names(tmp_path) == ["LATEST", "step-000005"]


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "states").write_text("a file")
    with pytest.raises(OutputError, match="could not be written: File exists"):
        save_state(tmp_path / "states", 5, tensors(1.0), FACTS, keep=1)


# --- damaged states -------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path / "tensors.safetensors", 100)


def flip(path: Path) -> None:
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "tensors.safetensors").write_bytes(data)


def edit(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text().replace('"skipped": 3', '"skipped": 4'))


def no_json(path: Path) -> None:
    (path / "state.json").write_text("[" * 100_000)


def other_json(path: Path) -> None:
    record = {"step": 10, "files": ["tensors.safetensors"]}
    (path / "state.json").write_text(json.dumps(record | {"crc32": zlib.crc32(json.dumps(record).encode())}))


def elsewhere(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000005"), path)


DAMAGES = [
    (cut, r"tensors\.safetensors has 100 bytes, not \d+"),
    (flip, r"tensors\.safetensors does not fit its checksum"),
    (lambda path: (path / "tensors.safetensors").unlink(), r"tensors\.safetensors is missing"),
    (lambda path: (path / "state.json").unlink(), r"state\.json is missing"),
    (lambda path: (path / "state.json").write_bytes(b""), r"state\.json is not what was written"),
    (lambda path: (path / "state.json").write_bytes(b"\xff\x00"), r"state\.json is not what was written"),
    (lambda path: (path / "state.json").write_text("3"), r"state\.json is not what was written"),
    (no_json, r"state\.json is not what was written"),
    (other_json, r"state\.json is not what was written"),
    (edit, r"state\.json does not fit its checksum"),
    (elsewhere, r"state\.json does not fit its checksum"),
    (lambda path: (shutil.rmtree(path), path.write_text("")), r"cannot be read: Not a directory"),
]


@pytest.mark.parametrize(("damage", "why"), DAMAGES)
def test_a_damaged_state_is_passed_over_with_a_warning_that_says_why(damage, why, tmp_path):
    for step in (5, 10):
        save_state(tmp_path, step, tensors(step), FACTS, keep=2)
    damage(tmp_path / "step-000010")
    state, warned = caught(lambda: latest_state(tmp_path))
    assert state.step == 5
    assert same(state.open(), tensors(5))
    assert len(warned) == 1
    assert re.search(rf"step-000010: is damaged \({why}\); the state before it is taken$", warned[0]), warned


def test_a_damaged_state_is_replaced_when_the_run_comes_by_again_and_does_not_count_until_then(tmp_path):
    for step in (5, 10):
        save_state(tmp_path, step, tensors(step), FACTS, keep=2)
    cut(tmp_path / "step-000010")
    save_state(tmp_path, 7, tensors(7), FACTS, keep=2)
    assert names(tmp_path) == ["LATEST", "step-000005", "step-000007", "step-000010"]
    save_state(tmp_path, 10, tensors(11), FACTS, keep=2)
    assert names(tmp_path) == ["LATEST", "step-000007", "step-000010"]
    assert same(latest_state(tmp_path).open(), tensors(11))


def test_a_damaged_state_is_not_among_those_that_are_kept(tmp_path):
    for step in (5, 10):
        save_state(tmp_path, step, tensors(step), FACTS, keep=2)
    cut(tmp_path / "step-000010")
    save_state(tmp_path, 15, tensors(15), FACTS, keep=2)
    assert names(tmp_path) == ["LATEST", "step-000005", "step-000015"]


def test_a_state_that_was_about_to_be_replaced_when_the_process_was_killed_is_found(tmp_path):
    path = save_state(tmp_path, 5, tensors(1.0), FACTS, keep=1)
    path.rename(tmp_path / "step-000005.replaced")
    assert same(latest_state(tmp_path).open(), tensors(1.0))
    save_state(tmp_path, 5, tensors(2.0), FACTS, keep=1)
    assert names(tmp_path) == ["LATEST", "step-000005"]
    assert same(latest_state(tmp_path).open(), tensors(2.0))


# --- two runs -------------------------------------------------------------------------------------------------------

HOLD = f"""
import importlib.util, sys, pathlib
sys.path.insert(0, {str(Path(module.__file__).parents[2])!r})
import fcntl, os
lock = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("held")
"""


def test_a_second_run_in_a_directory_is_refused_with_the_process_of_the_first(tmp_path):
    with only_run(tmp_path / "run"):
        with (
            pytest.raises(
                ArgumentError,
                match=rf"run: a run is under way in it \(process {os.getpid()}\); wait for it, stop it or choose "
                "another directory",
            ),
            only_run(tmp_path / "run"),
        ):
            pass
        held = subprocess.run(
            [sys.executable, "-S", "-c", HOLD, tmp_path / "run" / "run.lock"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert held.stdout == "held\n"
    with only_run(tmp_path / "run"):
        pass


def test_a_directory_that_no_run_can_lock_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="file: cannot be written to: File exists; choose another directory"),
        only_run(tmp_path / "file"),
    ):
        pass

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with (
        pytest.raises(
            OutputError, match="run: cannot be locked: No locks available; choose a directory on another disk"
        ),
        only_run(tmp_path / "run"),
    ):
        pass
