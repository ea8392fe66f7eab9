"""Writing all or nothing: what a failed or interrupted write leaves, and which name is taken."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ldm.disk import write_all, write_new
from ldm.errors import OutputError
from ldm.targets import replacing, replacing_directory, require_writable, write_text


def test_a_text_replaces_the_old_one_and_its_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "zwölf"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_fault_leaves_the_old_text_and_says_what_to_do(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a.txt", "one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"a\.txt: could not be written: No space left on device; free space, or"):
        write_text(tmp_path / "a.txt", "two")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "one"


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")

    def stopped() -> None:
        with replacing(tmp_path / "a.txt", overwrite=True) as descriptor:
            write_all(descriptor, b"two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "one"


def test_the_first_free_name_is_taken_and_no_free_name_is_an_error(tmp_path: Path) -> None:
    names = [tmp_path / "a", tmp_path / "b"]
    assert [write_new(names, b"x").name for _ in range(2)] == ["a", "b"]
    with pytest.raises(OutputError, match="a: exists already; choose another name or overwrite=True"):
        write_new(names, b"x")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_the_old_directory_stays_on_the_disk_when_it_can_be_put_back_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    write_text(tmp_path / "x" / "a.txt", "one")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "x":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="Input/output error"), replacing_directory(tmp_path / "x", overwrite=True):
        pass
    (left,) = tmp_path.iterdir()
    assert (left / "a.txt").read_text() == "one"


def test_a_directory_that_may_not_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="its directory may not be written to; choose another one"):
        require_writable(tmp_path / "a", overwrite=False)
    with pytest.raises(OutputError, match="cannot be written: embedded null byte"):
        require_writable("a\0", overwrite=False)


# --- directories ----------------------------------------------------------------------------------------------------


def folder(path: Path, text: str, overwrite: bool = False, stop: BaseException | None = None) -> None:
    with replacing_directory(path, overwrite) as temporary:
        (temporary / "unet").mkdir()
        (temporary / "unet" / "config.json").write_text(text)
        assert not (path / "unet" / text).exists()
        if stop:
            raise stop


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder(tmp_path / "x", "one")
    assert (tmp_path / "x" / "unet" / "config.json").read_text() == "one"
    folder(tmp_path / "x", "two", overwrite=True)
    assert (tmp_path / "x" / "unet" / "config.json").read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("stop", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), OutputError)],
)
def test_a_directory_that_fails_leaves_the_old_one(stop: BaseException, raised: type, tmp_path: Path) -> None:
    folder(tmp_path / "x", "one")
    with pytest.raises(raised):
        folder(tmp_path / "x", "two", overwrite=True, stop=stop)
    assert (tmp_path / "x" / "unet" / "config.json").read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_the_old_directory_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "x", "one")
    real = os.rename

    def rename(source, target):
        if Path(target) == tmp_path / "x" and (Path(source) / "unet" / "config.json").read_text() == "two":
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="Input/output error"):
        folder(tmp_path / "x", "two", overwrite=True)
    assert (tmp_path / "x" / "unet" / "config.json").read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupt_between_the_renames_loses_nothing(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter may raise KeyboardInterrupt just after a call has done its work."""
    folder(tmp_path / "x", "one")
    real, count = os.rename, 0

    def rename(source, target):
        nonlocal count
        real(source, target)
        count += 1
        if count == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        folder(tmp_path / "x", "two", overwrite=True)
    assert (tmp_path / "x" / "unet" / "config.json").read_text() == ("one" if after == 1 else "two")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_directory_is_not_replaced_unasked_nor_by_a_file(tmp_path: Path) -> None:
    folder(tmp_path / "x", "one")
    with pytest.raises(OutputError, match="exists already"):
        folder(tmp_path / "x", "two")
    (tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match="exists and is not a directory"):
        folder(tmp_path / "f", "two", overwrite=True)
