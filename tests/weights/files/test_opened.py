"""Files of weights are read when asked for, mapped where that is safe, checked whole; what is no sound file is in
test_corpus.py."""

from __future__ import annotations

import errno
import os
import threading
import time
import zlib

import pytest
import torch

from ldm.errors import FileError
from tests.made.checkpoints import safetensors_of, save_safetensors, save_zip
from tests.made.corpus_files import ENTRY, SOUND, stream_of
from weights import open_file
from weights.files import source
from weights.files.source import is_remote


def test_the_examples_are_refused_for_their_fault_alone(tmp_path):
    """Without the fault each of the three containers opens."""
    for name, data in {
        "a.ckpt": SOUND,
        "b.ckpt": stream_of(),
        "c.safetensors": safetensors_of({"w": ENTRY}, bytes(24)),
    }.items():
        (tmp_path / name).write_bytes(data)
        with open_file(tmp_path / name) as file:
            assert file["w"].tolist() == [[0.0] * 3] * 2


def test_one_flipped_bit_in_a_tensor_of_a_zip_is_noticed(tmp_path):
    path = save_zip({"w": torch.ones(2000), "v": torch.ones(5)}, tmp_path / "x.ckpt")
    data = bytearray(path.read_bytes())
    data[data.index(b"\0\0\x80\x3f" * 1000) + 2000] ^= 1
    path.write_bytes(data)
    with open_file(path) as file:
        assert file["v"].sum() == 5
        for read in (lambda: file["w"], lambda: file.read("w", dtype=torch.float16)):
            with pytest.raises(FileError, match="the checksum of w is wrong"):
                read()


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = save_zip({"w": torch.ones(2)}, tmp_path / "x.ckpt")
    path.chmod(0)
    if os.geteuid() == 0:  # who may read everything

        def refuse(*_: object) -> int:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FileError, match=r"permission denied\); change its permissions$"):
        open_file(path)


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    path = save_safetensors({"w": torch.ones(1000)}, tmp_path / "x.safetensors")
    before = path.read_bytes()
    with open_file(path) as file:
        mapped = file["w"]
    mapped.zero_()  # valid after closing
    assert mapped.sum() == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("system", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_file_of_another_machine_is_copied_since_it_may_shrink_under_a_map(system, tmp_path, monkeypatch):
    path = save_safetensors({"w": torch.ones(1000)}, tmp_path / "x.safetensors")
    device = path.stat().st_dev
    line = f"30 1 {os.major(device)}:{os.minor(device)} / /share rw,relatime shared:1 - {{}} server:/x rw\n"
    assert not is_remote(device, line.format("ext4"))
    assert not is_remote(device + 1, line.format(system))
    monkeypatch.setattr("weights.files.source._mounts", lambda: line.format(system))
    with open_file(path) as file:
        value, again = file["w"], file["w"]
        assert value.data_ptr() != again.data_ptr()  # a map gives the same memory
        path.write_bytes(b"")  # touching a map would now end the process
        assert value.sum() == 1000


def test_opening_8_gigabytes_costs_a_header(tmp_path):
    path = tmp_path / "x.safetensors"
    header = safetensors_of(
        {
            f"w{i}": {"dtype": "F16", "shape": [2**20, 4], "data_offsets": [i * 2**23, (i + 1) * 2**23]}
            for i in range(1000)
        }
    )
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 1000 * 2**23)  # a hole: no disk is used
    start = time.process_time()
    with open_file(path) as weights:
        assert weights.shape("w999") == (2**20, 4)
        assert weights["w500"][123].sum() == 0
    assert time.process_time() - start < 1


BASE = torch.arange(24.0).reshape(4, 6)


def test_views_of_one_storage_do_not_share_memory_once_read(tmp_path):
    path = save_zip({"a": BASE, "b": BASE, "c": BASE[0]}, tmp_path / "x.ckpt")
    with open_file(path) as file:
        a, b, c = file["a"], file["b"], file["c"]
    a.zero_()
    assert b.equal(BASE)
    assert c.equal(BASE[0])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = save_safetensors({"w": torch.ones(1000)}, tmp_path / "x.safetensors")
    with open_file(path) as file:
        file.source.require_unchanged()
        with path.open("ab") as other:
            other.write(b"x")
        with pytest.raises(FileError, match="changed while it was being read"):
            file.source.require_unchanged()


def test_reading_converts(tmp_path):
    value = torch.randn(7, 5)
    path = save_safetensors({"w": value}, tmp_path / "x.safetensors")
    with open_file(path) as file:
        assert file.read("w", dtype=torch.float16).equal(value.half())
        assert file.read("w").equal(value)
        assert file.read("w", device="meta").device.type == "meta"


# --- reading ahead --------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_cached_is_asked_for_window_by_window(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(source, "WINDOW", 100)
    monkeypatch.setattr(source, "_is_cached", lambda descriptor, size: False)
    monkeypatch.setattr(
        source.os, "posix_fadvise", lambda descriptor, start, size, advice: asked.append((start, size)), raising=False
    )
    path = save_safetensors({"w": torch.randn(10)}, tmp_path / "x.safetensors")
    closed = []
    monkeypatch.setattr(
        source.os, "close", lambda descriptor, real=os.close: closed.append(descriptor) or real(descriptor)
    )
    with open_file(path) as file, file.read_ahead() as wait:
        wait()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread.daemon:
                thread.join(5)
    assert asked == [(start, 100) for start in range(0, path.stat().st_size, 100)]
    assert len(closed) == 1, "the thread gives back the descriptor of its own"


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not tell what it has cached")
def test_a_file_that_is_cached_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(source.os, "posix_fadvise", lambda *_: pytest.fail("asked for what is there"))
    path = save_safetensors({"w": torch.randn(10)}, tmp_path / "x.safetensors")
    path.read_bytes()
    with open_file(path) as file, file.read_ahead():
        pass


def test_checksums_are_checked_ahead_and_a_wrong_one_is_named(tmp_path):
    path = save_zip({f"w{i}": torch.full((100,), float(i)) for i in range(20)}, tmp_path / "x.ckpt")
    with open_file(path) as file, file.read_ahead() as wait:
        wait()
        assert all(spec.record.verified for spec in file.specs.values())
    data = path.read_bytes()
    at = data.index(torch.full((100,), 7.0).numpy().tobytes())
    path.write_bytes(data[:at] + b"\1" + data[at + 1 :])
    with (
        open_file(path) as file,
        file.read_ahead() as wait,
        pytest.raises(FileError, match="the checksum of w7 is wrong"),
    ):
        wait()


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_every_checksum_is_checked_once_on_any_number_of_cores(cores, tmp_path, monkeypatch):
    checked, real = [], source.Source.crc32
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    slow = lambda self, start, *rest: time.sleep(0.002) or checked.append(start) or real(self, start, *rest)  # noqa: E731
    monkeypatch.setattr(source.Source, "crc32", slow)
    path = save_zip({f"w{i}": torch.full((100,), float(i)) for i in range(50)}, tmp_path / "x.ckpt")
    with open_file(path) as file, file.read_ahead() as wait:
        wait()
        wait()
    assert sorted(checked) == sorted(spec.record.start for spec in file.specs.values())


def test_an_error_in_the_meantime_ends_the_checks(tmp_path, monkeypatch):
    checked, real = [], source.Source.crc32
    slow = lambda self, start, *rest: time.sleep(0.02) or checked.append(start) or real(self, start, *rest)  # noqa: E731
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(source.Source, "crc32", slow)
    path = save_zip({f"w{i}": torch.full((100,), float(i)) for i in range(50)}, tmp_path / "x.ckpt")
    with open_file(path) as file, pytest.raises(KeyboardInterrupt), file.read_ahead():
        raise KeyboardInterrupt
    assert len(checked) <= 2


@pytest.mark.parametrize("vectors", [True, False], ids=["by place", "in turn"])
def test_a_checksum_does_not_depend_on_the_pieces_it_is_read_in(vectors, tmp_path, monkeypatch):
    if not vectors:
        monkeypatch.delattr(os, "preadv", raising=False)
    (tmp_path / "x").write_bytes(data := bytes(range(256)) * 40)
    file = source.Source(tmp_path / "x")
    for start, count in ((0, len(data)), (3, 5000), (9, 0)):
        expected = zlib.crc32(data[start : start + count])
        assert {
            file.crc32(start, count),
            *(file.crc32(start, count, bytearray(room)) for room in (1, 7, 4999, 99999)),
        } == {expected}
    file.close()


def test_a_disk_that_cannot_be_read_is_the_file_s_fault(tmp_path, monkeypatch):
    path = save_safetensors({"w": torch.randn(10)}, tmp_path / "x.safetensors")

    class Broken:
        def __getattr__(self, name):
            raise OSError(errno.EIO, "Input/output error")

    with open_file(path) as file:
        real, file.source._file = file.source._file, Broken()
        for read in (lambda: file.source.read(0, 8), lambda: file.source.copied(0, 8)):
            with pytest.raises(FileError, match="cannot be read: Input/output error; check the disk"):
                read()
        file.source._file = real
