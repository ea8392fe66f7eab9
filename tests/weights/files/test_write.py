"""What is written reads back bit by bit, here and with torch and safetensors; a write that fails leaves no trace."""

from __future__ import annotations

import errno
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from ldm.errors import ArgumentError, OutputError
from weights import open_file
from weights.files.write import Pending, Written, pending, write

TENSORS = {
    "a.weight": torch.randn(3, 5), "a.half": torch.randn(7).half(), "a.bf16": torch.randn(2, 2, 3).bfloat16(),
    "a.double": torch.randn(1).double(), "ids": torch.arange(77)[None], "alpha": torch.tensor(4.0),
    "empty": torch.zeros(0, 3), "truth": torch.tensor([True, False, True]), "turned": torch.randn(4, 3).T,
}  # fmt: skip
NAMES = ["x.safetensors", "x.ckpt", "x.pt", "x.bin"]


def same(found, wanted=TENSORS) -> bool:
    return set(found) == set(wanted) and all(
        found[key].dtype == value.dtype and found[key].equal(value) for key, value in wanted.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_type_of_number_reads_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    path = write(
        {key: pending(value) for key, value in TENSORS.items()},
        tmp_path / name,
        {"format": "pt", "global_step": "470000"},
    )
    with open_file(path) as file:
        assert same(file)
        assert file.metadata == {"format": "pt", "global_step": "470000"}
    theirs = (
        safetensors.torch.load_file(path)
        if name == "x.safetensors"
        else torch.load(path, weights_only=True)["state_dict"]
    )
    assert same(theirs)
    assert list(tmp_path.iterdir()) == [path]


def test_the_numbers_in_a_torch_file_can_be_mapped(tmp_path: Path) -> None:
    path = write({key: pending(value) for key, value in TENSORS.items()}, tmp_path / "x.ckpt", {})
    assert same(torch.load(path, weights_only=True, mmap=True)["state_dict"])
    with open_file(path) as file:
        assert {spec.record.start % 64 for spec in file.specs.values()} == {0}


def test_entries_too_large_for_a_plain_zip_get_wide_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 60)
    path = write({key: pending(value) for key, value in TENSORS.items()}, tmp_path / "x.ckpt", {})
    with open_file(path) as file:
        assert same(file)
        assert {spec.record.start % 64 for spec in file.specs.values()} == {0}
    assert same(torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_same_tensors_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    one, two = (write({"w": pending(torch.ones(3))}, tmp_path / f"{i}{name}", {"a": "b"}) for i in range(2))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", NAMES[:2])
def test_one_tensor_is_made_at_a_time_and_each_is_reported(name: str, tmp_path: Path) -> None:
    made: list[str] = []

    def entry(key: str) -> Pending:
        def make() -> torch.Tensor:
            made.append(key)
            return torch.full((4,), float(len(made)))

        return Pending(torch.float16, (4,), make)

    reports: list[Written] = []

    def on_write(written: Written) -> None:
        assert len(reports) + 1 == len(made)
        reports.append(written)

    write({key: entry(key) for key in "abc"}, tmp_path / name, {}, on_write=on_write)
    assert [report.name for report in reports] == made == ["a", "b", "c"]
    assert [(report.done, report.total) for report in reports] == [(8, 24), (16, 24), (24, 24)]
    assert all(report.tensor.dtype == torch.float16 for report in reports)


def test_only_floating_point_numbers_are_converted(tmp_path: Path) -> None:
    path = write({key: pending(value, torch.float16) for key, value in TENSORS.items()}, tmp_path / "x.safetensors", {})
    with open_file(path) as file:
        assert all(
            file[key].equal(value.half() if value.is_floating_point() else value) for key, value in TENSORS.items()
        )
        assert {file[key].dtype for key in file} == {torch.float16, torch.int64, torch.bool}


@pytest.mark.parametrize("name", NAMES[:2])
def test_numbers_too_large_for_float16_are_refused_and_infinities_are_not(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="w has numbers too large for float16"):
        write({"w": pending(torch.tensor([1.0, 70_000.0]), torch.float16)}, tmp_path / name, {})
    assert not list(tmp_path.iterdir())
    with open_file(
        write({"w": pending(torch.tensor([1.0, torch.inf, torch.nan]), torch.float16)}, tmp_path / name, {})
    ) as file:
        assert file["w"].isinf().tolist() == [False, True, False]


def test_what_a_torch_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError,
        match=r"w has torch\.uint16 numbers, which this version does not write into torch files; write a \.safetensors",
    ):
        write({"w": pending(torch.tensor([1], dtype=torch.uint16))}, tmp_path / "x.ckpt", {})
    with pytest.raises(ArgumentError, match="metadata: state_dict is where a torch file keeps its tensors"):
        write({"w": pending(torch.ones(1))}, tmp_path / "x.ckpt", {"state_dict": "x"})
    with pytest.raises(OutputError, match="has half a character in its name"):
        write({"w\ud800": pending(torch.ones(1))}, tmp_path / "x.safetensors", {})
    with pytest.raises(OutputError, match="has a tensor named __metadata__"):
        write({"__metadata__": pending(torch.ones(1))}, tmp_path / "x.safetensors", {})
    with pytest.raises(ArgumentError, match="metadata must be text"):
        write({"w": pending(torch.ones(1))}, tmp_path / "x.ckpt", {"step": 3})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES[:2])
def test_what_does_not_fit_is_not_begun(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=11))
    with pytest.raises(OutputError, match=r"it needs 0\.00 GB and the disk has 0\.00 GB free; choose another disk"):
        write({"w": pending(torch.ones(3))}, tmp_path / name, {})
    assert not list(tmp_path.iterdir())


def test_a_double_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has numbers too large for float32; write float64"):
        write({"w": pending(torch.tensor([1e300], dtype=torch.float64), torch.float32)}, tmp_path / "x.safetensors", {})


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_full_disk_leaves_nothing_new_and_the_old_file_whole(name: str, tmp_path: Path) -> None:
    path = write({"w": pending(torch.ones(3))}, tmp_path / name, {})
    before = path.read_bytes()

    def full() -> torch.Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        write({"w": pending(torch.ones(3)), "x": Pending(torch.float32, (3,), full)}, path, {}, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt):
        write(
            {"w": pending(torch.ones(3))},
            path,
            {},
            overwrite=True,
            on_write=lambda written: (_ for _ in ()).throw(KeyboardInterrupt),
        )
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_taken_or_nowhere_is_refused(tmp_path: Path) -> None:
    path = write({"w": pending(torch.ones(3))}, tmp_path / "x.ckpt", {})
    with pytest.raises(OutputError, match="exists already; choose another name or overwrite=True"):
        write({"w": pending(torch.ones(3))}, path, {})
    with pytest.raises(OutputError, match="does not exist; make it first"):
        write({"w": pending(torch.ones(3))}, tmp_path / "no" / "x.ckpt", {})
    (tmp_path / "d.ckpt").mkdir()
    with pytest.raises(OutputError, match="is not a regular file"):
        write({"w": pending(torch.ones(3))}, tmp_path / "d.ckpt", {}, overwrite=True)
