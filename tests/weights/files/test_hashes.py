"""Hashes: against hashlib on the same bytes, and the table of published files against what it must be to be of use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ldm.errors import FileError
from weights.files.hashes import PUBLISHED, Hashed, a1111_new, a1111_old, of_size, published, sha256
from weights.files.source import CHUNK, Source


@pytest.fixture
def file(tmp_path) -> Path:
    """Two and a half times what is read at once, no two parts alike."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(i.to_bytes(4, "little") for i in range(5 * CHUNK // 8)))
    return path


def test_a_file_is_hashed_whole_and_tells_how_far_it_is(file):
    steps: list[Hashed] = []
    assert sha256(Source(file), steps.append) == hashlib.sha256(file.read_bytes()).hexdigest()
    size = file.stat().st_size
    assert steps == [Hashed(CHUNK, size), Hashed(2 * CHUNK, size), Hashed(size, size)]


def test_a_file_that_changes_while_it_is_hashed_is_refused(file):
    def grow(hashed: Hashed) -> None:
        if hashed.done == CHUNK:
            with open(file, "ab") as more:
                more.write(b"more")

    with pytest.raises(FileError, match="changed while it was being read"):
        sha256(Source(file), grow)


def test_the_old_hash_is_of_64_kib_after_the_first_mebibyte(file):
    data = file.read_bytes()
    assert a1111_old(Source(file)) == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    changed = bytearray(data)
    changed[0x0FFFFF] ^= 1
    changed[0x110000] ^= 1
    file.write_bytes(changed)  # outside: not seen
    assert a1111_old(Source(file)) == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("size", [10, 0x100000, 0x100007])
def test_the_old_hash_of_a_short_file_is_of_what_there_is(size, tmp_path):
    data = bytes(range(256)) * 4200
    (tmp_path / "a").write_bytes(data[:size])
    assert a1111_old(Source(tmp_path / "a")) == hashlib.sha256(data[0x100000:size]).hexdigest()[:8]


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.name)
def test_every_published_file_is_found_by_its_bytes_and_only_by_them(file):
    digest = file.sha256.ljust(64, "0")
    assert published(digest, file.bytes or 123) == (file.name,)
    assert published(digest.upper(), file.bytes or 123) == (file.name,)
    assert published("0" + digest[1:] if digest[0] != "0" else "1" + digest[1:], file.bytes or 123) == ()
    if file.bytes is not None:
        assert published(digest, file.bytes + 1) == ()
        assert file.name in of_size(file.bytes)


def test_the_table_is_made_of_hashes():
    assert all(len(file.sha256) in (13, 64) and set(file.sha256) <= set("0123456789abcdef") for file in PUBLISHED)
    assert len({file.sha256 for file in PUBLISHED}) == len({file.name for file in PUBLISHED}) == len(PUBLISHED)
    assert of_size(5214604494) == ("v2-1_512-ema-pruned.safetensors", "v2-1_768-ema-pruned.safetensors")
    assert of_size(1) == ()


def test_a1111_knows_sd_1_4_and_1_5_by_their_first_ten_digits():
    """The hashes that its users know these files by: fe4efff1e1 and 6ce0161689."""
    by_name = {file.name: a1111_new(file.sha256) for file in PUBLISHED}
    assert by_name["sd-v1-4.ckpt"] == "fe4efff1e1"
    assert by_name["v1-5-pruned-emaonly.safetensors"] == "6ce0161689"
