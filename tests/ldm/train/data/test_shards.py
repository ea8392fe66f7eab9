"""Pictures and captions in tar files."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm.errors import ArgumentError, FileError
from ldm.train.data import decode
from ldm.train.data.shards import Shards, expanded
from tests.made.pictures import png, shard


def test_members_of_one_name_belong_together_in_the_order_of_the_shards(tmp_path):
    shard(tmp_path / "01.tar", {"b/7.jpg": png(3), "b/7.json": json.dumps({"caption": "three", "url": "x"})})
    shard(
        tmp_path / "00.tar",
        {
            "1.png": png(1),
            "1.txt": "one\nuno\n",
            "2.JSON": json.dumps({"texts": ["two", "due"]}),
            "2.webp": png(2, (9, 4)),
            "2.cls": "4",
        },
    )
    shards = Shards(str(tmp_path / "{00..01}.tar"))
    assert [item.id for item in shards.items] == ["00.tar/1", "00.tar/2", "01.tar/b/7"]
    assert [item.captions for item in shards.items] == [("one", "uno"), ("two", "due"), ("three",)]
    assert shards.items[1].size == (9, 4)
    assert np.array_equal(shards.picture(2), Image.open(io.BytesIO(png(3))))
    assert len({item.fingerprint for item in shards.items}) == 3
    assert not shards.bad
    assert not shards.has_depth


def test_patterns_are_ranges_and_wildcards(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-09.tar"):
        shard(tmp_path / name, {})
    assert [path.name for path in expanded(str(tmp_path / "a-{08..10}.tar"))] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert [path.name for path in expanded(str(tmp_path / "?-{09..09}.tar"))] == ["a-09.tar", "b-09.tar"]
    with pytest.raises(FileError, match="does not exist"):
        expanded(str(tmp_path / "a-{10..11}.tar"))
    for wrong in ("{3..1}.tar", "{0..999}-{0..999}.tar"):
        with pytest.raises(ArgumentError, match="rises to its end"):
            expanded(wrong)


def test_one_caption_can_be_said_of_all(tmp_path):
    shard(tmp_path / "0.tar", {"1.png": png()})
    assert Shards(str(tmp_path / "0.tar"), "a painting").items[0].captions == ("a painting",)


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    members = {
        "good.png": png(), "good.txt": "good", "silent.png": png(), "broken.png": png()[:30], "broken.txt": "x",
        "odd.png": png(), "odd.json": "[1]", "text.jpg": "hello", "text.txt": "x", "blank.png": png(), "blank.txt": " ",
        "latin.png": png(), "latin.txt": b"\xff", "only.txt": "no picture",
    }  # fmt: skip
    shards = Shards(str(shard(tmp_path / "0.tar", members)))
    assert [item.id for item in shards.items] == ["0.tar/good"]
    why = {bad.id.removeprefix("0.tar/"): bad.why for bad in shards.bad}
    assert why.keys() == {"silent", "broken", "odd", "text", "blank", "latin"}
    assert why["silent"] == why["blank"] == "has no caption"
    assert "not a JSON object" in why["odd"]
    assert "not a picture" in why["text"]
    assert "not UTF-8" in why["latin"]


def test_depth_maps_come_with_every_picture_or_none(tmp_path):
    shard(tmp_path / "0.tar", {"1.png": png(), "1.txt": "one", "1.depth.png": png(8)})
    shard(
        tmp_path / "1.tar",
        {"2.png": png(), "2.txt": "two", "3.png": png(), "3.txt": "three", "3.depth.png": png(size=(7, 5))},
    )
    shards = Shards(str(tmp_path / "*.tar"))
    assert shards.has_depth
    assert [item.id for item in shards.items] == ["0.tar/1"]
    assert [bad.why for bad in shards.bad] == [
        "has no depth map, and others have",
        "has a depth map of 5x7 pixels, another shape than its 7x5",
    ]
    assert np.array_equal(shards.depth(0), Image.open(io.BytesIO(png(8))))


def test_a_shard_that_is_no_sound_tar_file_is_one_clear_line(tmp_path):
    whole = shard(tmp_path / "whole.tar", {"1.png": png(), "1.txt": "one", "2.png": png(1, (40, 40))}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 3 * 512 + 700])
    (tmp_path / "short.tar").write_bytes(whole[: 5 * 512 + 700])
    (tmp_path / "endless.tar").write_bytes(whole[: 4 * 512])
    (tmp_path / "text.tar").write_text("hello" * 200)
    (tmp_path / "empty.tar").write_bytes(b"")
    shard(tmp_path / "packed.tar", {"1.png": png()}, "w:gz")
    for name in ("cut", "short", "endless", "text", "empty", "packed"):
        with pytest.raises(FileError, match=f"{name}.tar: is damaged, cut short, compressed or no tar file"):
            Shards(str(tmp_path / f"{name}.tar"))
    with pytest.raises(FileError, match="they hold none"):
        Shards(str(shard(tmp_path / "none.tar", {"a.txt": "a"})))
    with pytest.raises(FileError, match="cannot be read"):
        Shards(str(tmp_path))


def test_nothing_in_a_shard_leads_outside(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("1.png", tarfile.SYMTYPE),
            ("2.png", tarfile.LNKTYPE),
            ("3.png", tarfile.CHRTYPE),
            ("4.png", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in (("../../5.png", png()), ("../../5.txt", b"five")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shards = Shards(str(path))
    assert [item.captions for item in shards.items] == [("five",)]
    assert shards.bad == []
    assert shards.picture(0).size == (7, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["0.tar"]


def test_members_are_read_again_only_when_their_shard_changes(tmp_path, monkeypatch):
    path = shard(tmp_path / "0.tar", {"1.png": png(), "1.txt": "one", "1.depth.png": png(1)})
    os.utime(path, (10**9, 10**9))
    reads: list[str] = []
    size_of = decode.size_of
    monkeypatch.setattr(decode, "size_of", lambda data, place: (reads.append(place), size_of(data, place))[1])
    first = Shards(str(path), listing=tmp_path / "x.json").items
    assert len(reads) == 2
    assert Shards(str(path), listing=tmp_path / "x.json").items == first
    assert len(reads) == 2
    shard(path, {"1.png": png(), "1.txt": "one", "1.depth.png": png(2)})
    assert Shards(str(path), listing=tmp_path / "x.json").items != first


def test_a_shard_that_changes_while_it_is_read_is_an_error_that_names_the_picture(tmp_path):
    path = shard(tmp_path / "0.tar", {"1.png": png(), "1.txt": "one"})
    shards = Shards(str(path))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(FileError, match=r"0\.tar/1: is damaged"):
        shards.picture(0)
    path.unlink()
    with pytest.raises(FileError, match=r"0\.tar: cannot be read: No such file"):
        shards.picture(0)
