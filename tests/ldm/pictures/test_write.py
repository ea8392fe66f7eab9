"""Picture files that are written: settings in them, numbers, all or nothing, animations."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm import images
from ldm.errors import ArgumentError, OutputError
from ldm.pictures import write
from ldm.pictures.animations import save_animation
from ldm.pictures.read import open_image, read_metadata
from ldm.pictures.write import numbered, save
from tests.made.pictures import color


@pytest.mark.parametrize(
    "text", ["a red cube", "größer", "赤い立方体 🙂\n\u202egnirts", "", "x" * 65536, "a\0b", "half a pair \ud83d end"]
)
def test_metadata_come_back_as_they_were(text, tmp_path, noisy):
    save(noisy, tmp_path / "a.png", {"prompt": text, "seed": "7"})
    assert read_metadata(tmp_path / "a.png") == {"prompt": text.replace("\ud83d", "\ufffd"), "seed": "7"}
    assert np.array_equal(open_image(tmp_path / "a.png"), noisy)


def test_text_beyond_latin_1_is_stored_as_utf_8(tmp_path, noisy):
    data = save(noisy, tmp_path / "a.png", {"prompt": "赤い"}).read_bytes()
    assert b"iTXtprompt" in data
    assert "赤い".encode() in data
    assert b"tEXtseed\x007" in save(noisy, tmp_path / "b.png", {"seed": "7"}).read_bytes()


def test_the_text_of_other_programs_is_read_too(tmp_path, noisy):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "Steps: 20", zip=True)
    noisy.save(tmp_path / "a.png", pnginfo=info)
    noisy.save(tmp_path / "b.png")
    assert read_metadata(tmp_path / "a.png") == {"parameters": "Steps: 20"}
    assert read_metadata(tmp_path / "b.png") == {}


def test_the_same_picture_gives_the_same_bytes(tmp_path, noisy):
    first, second = (save(noisy, tmp_path / name, {"prompt": "a"}) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_a_file_is_replaced_only_on_request(tmp_path, noisy):
    path = tmp_path / "a.png"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"a\.png: exists already"):
        save(noisy, path)
    assert path.read_text() == "precious"
    save(noisy, path, overwrite=True)
    assert np.array_equal(open_image(path), noisy)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_link_is_never_written_through(tmp_path, noisy):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "a.png").symlink_to("target")
    with pytest.raises(OutputError, match="exists already"):
        save(noisy, tmp_path / "a.png")
    with pytest.raises(OutputError, match="not a regular file"):
        save(noisy, tmp_path / "a.png", overwrite=True)
    assert (tmp_path / "target").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["a.png", "target"]


@pytest.mark.parametrize("call", ["open", "fsync", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fault_while_writing_leaves_nothing_behind_and_the_old_file_whole(
    call, overwrite, tmp_path, noisy, monkeypatch
):
    path = tmp_path / "a.png"
    if overwrite:
        path.write_text("precious")
        call = "replace" if call == "link" else call
    real = getattr(os, call)

    def full(*args, **kwargs):
        if call == "open" and not args[1] & os.O_CREAT:
            return real(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        if call == "link":  # no links and no room to reserve the name either
            opened = os.open
            patch.setattr(
                os, "open", lambda name, flags, *mode: full() if str(name) == str(path) else opened(name, flags, *mode)
            )
        with pytest.raises(OutputError, match=r"a\.png: could not be written: No space left") as caught:
            save(noisy, path, overwrite=overwrite)
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path) == (["a.png"] if overwrite else [])
    assert not overwrite or path.read_text() == "precious"


def test_a_file_system_without_links_will_do(tmp_path, noisy, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert [save(noisy, write.spare(tmp_path / "a.png")).name for _ in range(3)] == ["a.png", "a-2.png", "a-3.png"]
    assert all(np.array_equal(open_image(path), noisy) for path in tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_an_error(tmp_path, noisy):
    with pytest.raises(OutputError, match="No such file or directory"):
        save(noisy, tmp_path / "nowhere" / "a.png")


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path, noisy, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(noisy, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_numbers_go_on_from_the_highest_and_know_their_suffix(tmp_path, noisy):
    assert next(numbered(tmp_path)).name == "00001.png"
    for name in ("00002.png", "00041.png", "00050-sheet.png", "123.png", "x00099.png", "00100.txt"):
        (tmp_path / name).touch()
    assert save(noisy, numbered(tmp_path)).name == "00042.png"
    assert save(noisy, numbered(tmp_path, "-sheet")).name == "00051-sheet.png"


def test_long_names_work_as_far_as_the_system_takes_them(tmp_path, noisy):
    assert save(noisy, tmp_path / f"{'🙂' * 60}.png").exists()
    with pytest.raises(OutputError, match="could not be written"):
        save(noisy, tmp_path / f"{'🙂' * 80}.png")


WRITER = """
import sys
from pathlib import Path
from PIL import Image
from ldm.pictures.write import numbered, save
for i in range(20):
    save(Image.new("RGB", (4, 4), (int(sys.argv[2]), i, 0)), numbered(Path(sys.argv[1])))
"""


def test_several_writers_in_one_directory_lose_nothing(tmp_path):
    """Four processes with 20 pictures each: 80 files, each of them one writer's picture."""
    environment = os.environ | {"PYTHONPATH": str(Path(images.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(k)], env=environment) for k in range(4)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n:05d}.png" for n in range(1, 81)]
    assert {color(open_image(path)) for path in tmp_path.iterdir()} == {(k, i, 0) for k in range(4) for i in range(20)}


@pytest.fixture
def frames() -> list[Image.Image]:
    return [Image.new("RGB", (24, 16), (60 * i, 255 - 60 * i, 128)) for i in range(4)]


@pytest.mark.parametrize(
    ("kind", "fps", "time"), [("webp", 8, 125), ("gif", 8, 120), ("gif", 50, 20), ("webp", 0.5, 2000)]
)
def test_an_animation_shows_every_frame_for_its_time_and_begins_again(kind, fps, time, tmp_path, frames):
    path = save_animation(frames, tmp_path / f"a.{kind}", kind=kind, fps=fps)
    with Image.open(path) as animation:
        assert (animation.format, animation.n_frames, animation.size, animation.info["loop"]) == (
            kind.upper(),
            4,
            (24, 16),
            0,
        )
        for i, frame in enumerate(frames):
            animation.seek(i)
            shown = np.asarray(animation.convert("RGB")).astype(int)
            assert animation.info["duration"] == time
            assert np.abs(shown - np.asarray(frame)).max() <= 8  # WebP is lossy
    assert os.listdir(tmp_path) == [path.name]


def test_an_animation_takes_the_next_number_and_is_replaced_only_on_request(tmp_path, frames):
    for expected in ("00001-animation.gif", "00002-animation.gif"):
        assert save_animation(frames, numbered(tmp_path, "-animation", "gif"), kind="gif").name == expected
    with pytest.raises(OutputError, match="exists already"):
        save_animation(frames, tmp_path / "00001-animation.gif", kind="gif")
    save_animation(frames[:2], tmp_path / "00001-animation.gif", kind="gif", overwrite=True)
    with Image.open(tmp_path / "00001-animation.gif") as animation:
        assert animation.n_frames == 2


def test_what_is_no_animation_is_refused(tmp_path, frames, noisy):
    for given, how, what in [
        (frames, {"kind": "mp4"}, "animation: 'mp4' is unknown"),
        (frames, {"fps": 0}, "fps: 0; give more than 0"),
        (frames, {"fps": float("nan")}, "fps"),
        ([*frames, noisy], {}, "one size"),
        ([], {}, "none"),
    ]:
        with pytest.raises(ArgumentError, match=what):
            save_animation(given, tmp_path / "a.webp", **how)
    assert os.listdir(tmp_path) == []
