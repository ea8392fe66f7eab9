"""Folders of pictures: their pictures and captions, what is left out, and what need not be read again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import ArgumentError, FileError, OutputError
from ldm.train.data import decode
from ldm.train.data.folder import PictureFolder
from ldm.train.data.scenes import Scenes
from tests.made.pictures import captioned, picture


def whys(folder: PictureFolder) -> dict[str, str]:
    return {bad.id: bad.why for bad in folder.bad}


def test_pictures_of_every_kind_and_depth_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/deeper/d.bmp", "e.jpeg"):
        captioned(tmp_path / name, f" the {name[-6:]} \n")
    captioned(tmp_path / ".hidden.png", "no")
    captioned(tmp_path / ".git/f.png", "no")
    picture(tmp_path / "g.gif")
    folder = PictureFolder(tmp_path)
    assert [item.id for item in folder.items] == ["a.png", "b.JPG", "e.jpeg", "sub/c.webp", "sub/deeper/d.bmp"]
    assert folder.items[0].captions == ("the a.png",)
    assert folder.items[0].size == (6, 9)
    assert not folder.bad
    assert np.array_equal(folder.picture(0), Image.open(tmp_path / "a.png"))


def test_each_line_beside_a_picture_is_a_caption(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n  two  words \n".encode())
    assert PictureFolder(tmp_path).items[0].captions == ("one", "two words")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "one"}\n\n{"file_name": "./sub/b.png", "texts": ["two", '
            '"three"]}\n{"file_name": "a.png", "caption": "four"}\n',
        ),
        ("metadata.csv", 'file_name,text\na.png,one\nsub/b.png,"two"\nsub/b.png,three\na.png,four\n'),
    ],
)
def test_captions_come_from_one_file_too_and_otherwise_from_beside(tmp_path, name, text):
    for path in ("a.png", "sub/b.png"):
        picture(tmp_path / path)
    captioned(tmp_path / "c.png", "five")
    (tmp_path / name).write_text(text)
    assert {item.id: item.captions for item in PictureFolder(tmp_path).items} == {
        "a.png": ("one", "four"),
        "sub/b.png": ("two", "three"),
        "c.png": ("five",),
    }


def test_one_caption_can_be_said_of_all_pictures_and_none_is_looked_for(tmp_path):
    picture(tmp_path / "a.png")
    captioned(tmp_path / "b.png", "no")
    (tmp_path / "metadata.jsonl").write_text("not JSON")
    assert {item.captions for item in PictureFolder(tmp_path, "a photo of sks dog").items} == {("a photo of sks dog",)}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_picture_that_lies_on_its_side_is_listed_as_it_is_decoded(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    captioned(tmp_path / name, "a", exif=exif)
    folder = PictureFolder(tmp_path)
    assert folder.items[0].size == (9, 6) == folder.picture(0).size[::-1]


def test_listing_decodes_nothing(tmp_path, monkeypatch):
    for name in ("a.jpg", "b.png", "c.webp", "d.bmp"):
        captioned(tmp_path / name, "a")

    def refuse(image: Image.Image) -> None:
        raise AssertionError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    assert [item.size for item in PictureFolder(tmp_path).items] == [(6, 9)] * 4


def test_a_fingerprint_follows_the_picture_and_not_its_name_or_date(tmp_path):
    captioned(tmp_path / "a.png", "a")
    first = PictureFolder(tmp_path).items[0].fingerprint
    os.utime(tmp_path / "a.png", (0, 0))
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("b")
    assert PictureFolder(tmp_path).items[0].fingerprint == first
    picture(tmp_path / "b.png", seed=1)
    assert PictureFolder(tmp_path).items[0].fingerprint != first


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    captioned(tmp_path / "good.png", "good")
    picture(tmp_path / "silent.png")
    captioned(tmp_path / "blank.png", " \n\n")
    captioned(tmp_path / "babble.png", "x" * 1001)
    picture(tmp_path / "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    picture(tmp_path / "endless.png").with_suffix(".txt").write_bytes(b"a " * 600_000)
    for name, data in (("empty", b""), ("text", b"hello"), ("cut", (tmp_path / "good.png").read_bytes()[:20])):
        (tmp_path / f"{name}.png").write_bytes(data)
        (tmp_path / f"{name}.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "pipe.txt").write_text("x")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    folder = PictureFolder(tmp_path)
    assert [item.id for item in folder.items] == ["good.png"]
    found = whys(folder)
    assert found.keys() == {
        f"{name}.png"
        for name in ("silent", "blank", "babble", "latin", "endless", "empty", "text", "cut", "pipe", "gone")
    }
    assert found["silent.png"] == found["blank.png"] == "has no caption"
    assert "word of more than 1000" in found["babble.png"]
    assert "not UTF-8" in found["latin.png"]
    assert "limit" in found["endless.png"]
    assert found["empty.png"] == "is empty (0 bytes)"
    assert "not a picture in a format that is read" in found["text.png"]
    assert "damaged" in found["cut.png"] or "not a picture" in found["cut.png"]
    assert "not a regular file" in found["pipe.png"]


def test_metadata_of_a_missing_picture_or_without_text_is_left_out_with_its_line(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a"}\n{"file_name": "../c.png", "text": "c"}\n{"file_name": "b.png", "text": '
        "3}\n"
    )
    folder = PictureFolder(tmp_path)
    assert [item.id for item in folder.items] == ["a.png"]
    assert "is not there" in whys(folder)["../c.png"]
    assert whys(folder)["b.png"] == "has a caption that is no text (int) (metadata.jsonl line 3)"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no pictures"),
        ({"a.txt": "a"}, "holds no pictures"),
        ({"a.png": None}, r"has no picture to train on: a.png has no caption; write NAME.txt beside each"),
        ({"a.png": "hello", "a.txt": "a"}, "has no picture to train on: a.png is not a picture"),
        (
            {"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": "a"}\n{'},
            "metadata.jsonl: line 2 is not a JSON object",
        ),
        ({"a.png": None, "metadata.jsonl": "[" * 100_000}, "line 1 is not a JSON object"),
        ({"a.png": None, "metadata.jsonl": '{"text": "a"}'}, "line 1 has no file_name"),
        ({"a.png": None, "metadata.csv": "name,text\na.png,a\n"}, "metadata.csv: has no column file_name"),
        ({"a.png": None, "metadata.csv": 'file_name,text\na.png,"a'}, "is not CSV"),
        ({"a.png": None, "metadata.csv": "file_name,text\n", "metadata.jsonl": ""}, "keep one of them"),
        ({"a.png": None, "metadata.csv": b"\xff"}, "not UTF-8"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_clear_line(tmp_path, files, message):
    for name, text in files.items():
        if text is None:
            picture(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError, match=message) as error:
        PictureFolder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_path_that_is_no_folder_says_so(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        PictureFolder(tmp_path / "nowhere")
    with pytest.raises(FileError, match="is not a directory"):
        PictureFolder(picture(tmp_path / "a.png"))


def test_depth_maps_lie_in_a_folder_of_their_own_under_the_same_names(tmp_path):
    captioned(tmp_path / "sub/a.jpg", "a")
    captioned(tmp_path / "b.png", "b")
    captioned(tmp_path / "c.png", "c")
    picture(tmp_path / "depth/c.png", size=(9, 6))
    depth = picture(tmp_path / "depth/sub/a.png", seed=5)
    folder = PictureFolder(tmp_path)
    assert folder.has_depth
    assert [item.id for item in folder.items] == ["sub/a.jpg"]
    assert np.array_equal(folder.depth(0), Image.open(depth))
    assert whys(folder) == {
        "b.png": "has no depth map in depth/",
        "c.png": "has a depth map of 6x9 pixels, another shape than its 9x6",
    }


def test_rendered_scenes_are_what_the_renderer_says():
    scenes = Scenes(3, 32)
    assert [item.id for item in scenes.items] == ["scene 0", "scene 1", "scene 2"]
    assert all(len(item.captions) == 4 for item in scenes.items)
    assert scenes.picture(1).size == (32, 32)
    assert Scenes(3, 64).items[0].fingerprint != scenes.items[0].fingerprint
    assert Scenes(1, 32, "a scene").items[0].captions == ("a scene",)
    with pytest.raises(FileError, match="no depth map"):
        scenes.depth(0)
    with pytest.raises(ArgumentError, match="at least 1"):
        Scenes(0, 32)


# --- what need not be read again ------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the pictures that are read from now on."""
    names: list[str] = []
    size_of = decode.size_of
    monkeypatch.setattr(
        decode, "size_of", lambda data, place: (names.append(Path(place).name), size_of(data, place))[1]
    )
    return names


def old(path: Path, seconds: int = 100) -> None:
    """Give a file a date that can be trusted."""
    os.utime(path, (os.stat(path).st_mtime - seconds,) * 2)


def test_a_picture_is_read_again_only_when_its_file_changes(tmp_path, reads):
    kept = tmp_path / "run/pictures.json"
    for name in ("a.png", "b.png", "depth/a.png", "depth/b.png"):
        captioned(tmp_path / "photos" / name, "x", seed=len(name))
        old(tmp_path / "photos" / name)
    first = PictureFolder(tmp_path / "photos", listing=kept)
    assert len(reads) == 4
    assert PictureFolder(tmp_path / "photos", listing=kept).items == first.items
    assert len(reads) == 4
    picture(tmp_path / "photos/depth/b.png", seed=77)
    second = PictureFolder(tmp_path / "photos", listing=kept)
    assert reads[4:] == ["b.png"]
    assert second.items[0] == first.items[0]
    assert second.items[1] != first.items[1]
    assert PictureFolder(tmp_path / "photos").items == second.items


def test_a_file_that_has_just_been_written_is_not_trusted_to_have_kept_its_date(tmp_path, reads):
    captioned(tmp_path / "a.bmp", "a", seed=1)
    first = PictureFolder(tmp_path, listing=tmp_path / "x.json").items[0]
    status = os.stat(tmp_path / "a.bmp")
    picture(tmp_path / "a.bmp", seed=2)
    os.utime(tmp_path / "a.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(tmp_path / "a.bmp").st_size == status.st_size
    assert PictureFolder(tmp_path, listing=tmp_path / "x.json").items[0].fingerprint != first.fingerprint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2, 3]}', "[" * 100_000])
def test_a_listing_that_makes_no_sense_counts_as_none(tmp_path, text):
    captioned(tmp_path / "a.png", "a")
    (tmp_path / "x.json").write_text(text)
    assert PictureFolder(tmp_path, listing=tmp_path / "x.json").items == PictureFolder(tmp_path).items


def test_a_listing_forgets_pictures_that_are_gone_and_tells_a_full_disk(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        captioned(tmp_path / name, "x")
        old(tmp_path / name)
    PictureFolder(tmp_path, listing=tmp_path / "x.json")
    (tmp_path / "a.png").unlink()
    PictureFolder(tmp_path, listing=tmp_path / "x.json")
    assert "a.png" not in (tmp_path / "x.json").read_text()
    assert "b.png" in (tmp_path / "x.json").read_text()
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes() + b" ")
    old(tmp_path / "b.png")
    before = (tmp_path / "x.json").read_text()
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match=r"x\.json: could not be written: No space left"):
        PictureFolder(tmp_path, listing=tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_a_reason_is_what_a_message_says_after_its_path(tmp_path):
    captioned(tmp_path / "odd: name.png", "x")
    (tmp_path / "odd: name.png").write_bytes(b"")
    captioned(tmp_path / "good.png", "x")
    long = tmp_path / ("long " * 30)
    captioned(long / "a.png", "x")
    (long / "a.png").write_bytes(b"")
    assert {bad.why for bad in PictureFolder(tmp_path).bad} == {"is empty (0 bytes)"}
