"""Picture files that are read: formats, colours, and damage of every kind."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.errors import FileError
from ldm.images import ImageWarning
from ldm.pictures import read
from ldm.pictures.read import open_image, open_with_alpha, read_metadata
from ldm.pictures.write import save
from tests.made.pictures import color

RED, WHITE = (255, 0, 0), (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert np.asarray(image)[0].tolist() == [[level] * 3 for level in (0, 1, 128, 255)]


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


@pytest.fixture
def frames() -> list[Image.Image]:
    return [Image.new("RGB", (24, 16), (60 * i, 255 - 60 * i, 128)) for i in range(4)]
