"""Pictures in and out: every kind of file that a person may hand over, and files that are never half written."""

from __future__ import annotations

import errno
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from ldm import images
from ldm.errors import ArgumentError, FileError, NonFinite, OutputError
from ldm.images import ImageWarning, fit, from_pil, to_pil
from ldm.pictures import read, write
from ldm.pictures.read import open_image, open_with_alpha, read_metadata
from ldm.pictures.write import numbered, save, save_animation

RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture
def noisy() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def color(image: Image.Image) -> tuple[int, int, int]:
    """The one colour of a picture."""
    assert image.mode == "RGB"
    ((_, value),) = image.getcolors()
    return value


# --- tensors --------------------------------------------------------------------------------------------------------


def test_every_level_of_a_picture_comes_back_from_a_tensor_as_it_was(noisy):
    tensor = from_pil([noisy, noisy])
    assert tensor.shape == (2, 3, 24, 40)
    assert tensor.dtype == torch.float32
    assert -1 <= tensor.min() < -0.9 < 0.9 < tensor.max() <= 1
    assert all(np.array_equal(back, noisy) for back in to_pil(tensor))


@pytest.mark.parametrize(
    ("value", "level"), [(-7.0, 0), (-1.0, 0), (0.0, 128), (0.0039, 128), (0.9999, 255), (7.0, 255)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_clipped_and_rounded_to_the_nearest_level(value, level, dtype):
    assert color(to_pil(torch.full((1, 3, 2, 2), value, dtype=dtype))[0]) == (level,) * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_an_error_and_never_a_black_picture(value):
    picture = torch.zeros(1, 3, 4, 4)
    picture[0, 1, 2, 3] = value
    with pytest.raises(NonFinite, match="NaN or infinity"):
        to_pil(picture)


def test_tensors_of_other_shapes_and_pictures_of_different_sizes_are_refused(noisy):
    with pytest.raises(ArgumentError, match=r"\[1, 4, 8, 8\]"):
        to_pil(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ArgumentError, match="one size"):
        from_pil([noisy, noisy.crop((0, 0, 8, 8))])
    with pytest.raises(ArgumentError, match="none"):
        from_pil([])


# --- modes ----------------------------------------------------------------------------------------------------------


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert np.asarray(image)[0].tolist() == [[level] * 3 for level in (0, 1, 128, 255)]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16"]
)
def test_every_mode_becomes_rgb(mode):
    white = Image.new("RGB", (3, 2), WHITE)
    image = (
        Image.new(mode, (3, 2), 65535)
        if mode.startswith("I")
        else white.convert("P").convert("PA")
        if mode == "PA"
        else white.convert(mode)
    )
    assert color(images.to_rgb(image)) == WHITE


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "one colour"])
def test_what_is_transparent_becomes_white(kind, tmp_path):
    path = tmp_path / "clear.png"
    if kind == "palette":
        image = Image.new("P", (2, 2), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.save(path, transparency=bytes([255, 0]))
    elif kind == "one colour":
        Image.new("RGB", (2, 2), RED).save(path, transparency=RED)
    else:
        Image.new(kind, (2, 2), 0).save(path)
    assert color(open_image(path)) == WHITE


def test_half_transparent_red_becomes_pink():
    assert color(images.to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 127)))) == (255, 128, 128)


def test_transparency_can_be_kept(tmp_path, noisy):
    clear = noisy.convert("RGBA")
    clear.putalpha(100)
    exif = Image.Exif()
    exif[0x0112] = 6
    clear.save(tmp_path / "clear.png", exif=exif)
    image = open_with_alpha(tmp_path / "clear.png")
    assert (image.mode, image.size) == ("RGBA", (24, 40))
    assert image.getchannel("A").getcolors() == [(24 * 40, 100)]
    palette = noisy.convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert open_with_alpha(tmp_path / "palette.png").getchannel("A").getextrema()[0] == 0
    noisy.save(tmp_path / "opaque.png")
    with pytest.raises(FileError, match=r"opaque\.png: has no transparency"):
        open_with_alpha(tmp_path / "opaque.png")


def test_pictures_are_turned_as_their_camera_says(tmp_path, noisy):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 270 degrees
    noisy.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "turned.png"), noisy.transpose(Image.Transpose.ROTATE_270))


def test_colours_are_taken_to_srgb_by_the_profile(tmp_path):
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = swapped.index(b"rXYZ"), swapped.index(b"gXYZ")
    swapped = bytearray(swapped)
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"  # a space in which the first channel is green
    Image.new("RGB", (2, 2), RED).save(tmp_path / "swapped.png", icc_profile=bytes(swapped))
    r, g, b = color(open_image(tmp_path / "swapped.png"))
    assert r < 5
    assert g > 250
    assert b < 5


def test_a_profile_that_is_broken_or_for_other_channels_is_left_out_with_a_warning(tmp_path):
    Image.new("RGB", (2, 2), RED).save(tmp_path / "broken.png", icc_profile=b"no profile")
    with pytest.warns(ImageWarning, match="profile"):
        assert color(open_image(tmp_path / "broken.png")) == RED


def test_a_picture_brings_nothing_along_but_its_pixels(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (2, 2), RED).save(tmp_path / "a.png", icc_profile=profile, dpi=(300, 300))
    save(open_image(tmp_path / "a.png"), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert image.info == {}


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "no extension", "-öffnen 🙂\n.png"])
def test_png_jpeg_webp_and_bmp_are_read_whatever_they_are_called(name, tmp_path):
    path = tmp_path / name
    Image.new("RGB", (16, 8), RED).save(path, {"a.jpg": "JPEG", "a.webp": "WEBP", "a.bmp": "BMP"}.get(name, "PNG"))
    image = open_image(path)
    assert image.size == (16, 8)
    assert np.abs(np.asarray(image).astype(int) - RED).max() < 6


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PPM", "EPS", "ICO", "TGA"])
def test_other_formats_are_refused_unopened(format, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16), RED).save(path, format)
    with pytest.raises(FileError, match=r"a\.png: is not a picture in a format that is read"):
        open_image(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_a_truncated_picture_is_an_error_that_names_the_file(format, share, tmp_path, noisy):
    buffer = io.BytesIO()
    noisy.save(buffer, format)
    path = tmp_path / "cut.png"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    with pytest.raises(FileError, match=r"cut\.png: is (damaged|not a picture)") as caught:
        open_image(path)
    assert caught.value.path == path
    assert caught.value.exit_code == 2


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path, noisy):
    buffer = io.BytesIO()
    noisy.save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= 16
    (tmp_path / "flipped.png").write_bytes(data)
    with pytest.raises(FileError, match="damaged"):
        open_image(tmp_path / "flipped.png")


@pytest.mark.parametrize("frames", ["webp", "png"])
def test_of_an_animation_the_first_frame_is_taken_with_a_warning(frames, tmp_path):
    path = tmp_path / f"moving.{frames}"
    Image.new("RGB", (8, 8), RED).save(
        path, save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 255))], lossless=True
    )
    with pytest.warns(ImageWarning, match=r"moving.*first of its 2 frames"):
        assert color(open_image(path)) == RED


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that claims a size it does not have the pixels for."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(size, tmp_path):
    (tmp_path / "huge.png").write_bytes(png_of(*size))
    with pytest.raises(FileError, match=r"huge\.png: has more than 64 million pixels"):
        open_image(tmp_path / "huge.png")


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused(tmp_path):
    bomb = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * 2**26))
    (tmp_path / "bomb.png").write_bytes(png_of(2, 2, bomb))
    with pytest.raises(FileError, match=r"bomb\.png"):
        read_metadata(tmp_path / "bomb.png")


def test_what_is_no_file_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    for path, what in [
        (tmp_path, "is a directory"),
        (tmp_path / "empty.png", "empty"),
        (tmp_path / "pipe.png", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "loop.png", "cannot be opened"),
        ("nul\0.png", "cannot be opened"),
    ]:
        with pytest.raises(FileError, match=what):
            open_image(path)
    monkeypatch.setattr(read, "MAX_BYTES", 10)
    (tmp_path / "big.png").write_bytes(png_of(2, 2))
    with pytest.raises(FileError, match="the limit is 10"):
        open_image(tmp_path / "big.png")


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "lighthouse.png").write_bytes(png_of(2, 2))
    with pytest.raises(FileError, match=r"does not exist; did you mean lighthouse\.png\?"):
        open_image(tmp_path / "lighthuose.png")
    with pytest.raises(FileError, match="there is no directory"):
        open_image(tmp_path / "nowhere" / "a.png")


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_lengths_are_rounded_to_the_nearest_multiple():
    assert [images.nearest_multiple(n) for n in (1, 4, 11, 12, 100, 128, 131)] == [8, 8, 8, 16, 104, 128, 128]


def test_the_size_of_a_picture_follows_it_where_it_is_not_given():
    photo = Image.new("RGB", (300, 200))
    assert images.size_for(photo) == (304, 200)
    assert images.size_for(photo, 96) == (96, 64)
    assert images.size_for(photo, None, 64) == (96, 64)
    assert images.size_for(photo, 8, 16) == (8, 16)


def test_a_picture_is_scaled_to_cover_and_cut_evenly_not_stretched():
    flag = Image.new("RGB", (300, 100), WHITE)
    flag.paste(RED, (100, 0, 200, 100))  # a red square in the middle
    assert color(fit(flag, 40, 40).crop((4, 0, 36, 40))) == RED  # within 3 pixels of its edges Lanczos rings
    assert fit(flag, 40, 40).size == (40, 40)
    assert color(fit(Image.new("RGB", (1, 1), RED), 64, 32)) == RED


def test_a_picture_of_the_right_size_is_not_resampled(noisy):
    assert np.array_equal(fit(noisy, *noisy.size), noisy)


# --- writing --------------------------------------------------------------------------------------------------------


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


# --- animations -----------------------------------------------------------------------------------------------------


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
