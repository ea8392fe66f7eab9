"""Pictures: PIL <-> tensors in [-1, 1], files of untrusted origin -> RGB, sizes, PNGs with their metadata, and animations."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import math
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.disk import sync_directory
from ldm.errors import ArgumentError, FileError, NonFinite, OutputError, printable

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # all that is read: most of what is dangerous in image libraries is in the other formats
MAX_PIXELS = 64_000_000  # of a picture that is read, checked before it is decoded
MAX_BYTES = 2 * 1024**3  # of a file that is read
ANIMATIONS = ("webp", "gif")
MAX_FPS = 50.0  # of an animation: viewers slow down a GIF that asks for more


class ImageWarning(UserWarning):
    """Something about a picture was left out."""


# --- tensors --------------------------------------------------------------------------------------------------------


def to_pil(images: Tensor) -> list[Image.Image]:
    """[b, 3, H, W] in [-1, 1] -> RGB pictures; what lies outside is clipped, and levels are rounded to the nearest.

    Raises NonFinite for NaN or infinity, which would otherwise come out black, and ArgumentError for another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ArgumentError(f"pictures are tensors [b, 3, H, W]; this one is {list(images.shape)}")
    if not torch.isfinite(images).all():
        raise NonFinite("the decoded picture has NaN or infinity in it; decode in float32 or bfloat16")
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).numpy()]


def from_pil(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> [b, 3, H, W] float32 in [-1, 1]. Raises ArgumentError for pictures of different sizes, or none."""
    pictures = [to_rgb(image) for image in ([images] if isinstance(images, Image.Image) else images)]
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ArgumentError(f"pictures of one batch must have one size; these have {sorted(sizes) or 'none'}")
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- reading --------------------------------------------------------------------------------------------------------


def open_image(path: str | PathLike[str]) -> Image.Image:
    """A PNG, JPEG, WebP or BMP file as an upright RGB picture, as `to_rgb` makes it.

    Of an animation the first frame, with an ImageWarning. Raises FileError that names the file for anything missing, damaged, cut short,
    of another format, over 64 million pixels or over 2 GB.
    """
    with _opened(path, FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1:
            warnings.warn(f"{printable(str(path))[-80:]}: is animated; the first of its {image.n_frames} frames is used", ImageWarning, stacklevel=2)
        image.load()
        return to_rgb(image)


def open_with_alpha(path: str | PathLike[str]) -> Image.Image:
    """The same file with its transparency: upright, RGBA. Raises FileError as `open_image` does, and for a picture that is opaque by its kind."""
    with _opened(path, FORMATS) as image:
        image.load()
        if not image.has_transparency_data:
            raise FileError("has no transparency to read a mask from; give a mask that is white where to repaint", path=path)
        return ImageOps.exif_transpose(image).convert("RGBA")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: turned upright as EXIF says, 16-bit levels scaled to 8, colours to sRGB by the embedded profile, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips to white
        image = Image.fromarray(((np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    alpha = None
    colour = image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha, colour = rgba.getchannel("A"), image.getchannel(0) if image.mode == "LA" else rgba.convert("RGB")
    colour = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    colour.info = {}  # what it says is done
    return colour


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB. A profile that cannot be read, or is for other channels, is left out with an ImageWarning."""
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            return ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            warnings.warn(f"a colour profile that does not suit its {image.mode} picture was left out", ImageWarning, stacklevel=4)
    return image.convert("RGB")


def read_metadata(path: str | PathLike[str]) -> dict[str, str]:
    """The text chunks of a PNG by keyword; what `save` wrote comes back as it was. Raises FileError as `open_image` does."""
    with _opened(path, ("PNG",)) as image:
        image.load()  # chunks may follow the pixels
        return {key: str(value) for key, value in image.text.items()}


@contextlib.contextmanager
def _opened(path: str | PathLike[str], formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """The file as Pillow opens it, its size checked and nothing decoded yet. What goes wrong in the block is a FileError too."""
    path = Path(path)
    try:
        _require_readable(os.stat(path), path)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileError(f"does not exist{_nearest(path)}", path=path) from None
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot be opened: {getattr(error, 'strerror', None) or error}", path=path) from None
    with open(descriptor, "rb") as file:
        _require_readable(os.fstat(descriptor), path)
        try:
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
        except UnidentifiedImageError:
            raise FileError(f"is not a picture in a format that is read ({', '.join(formats)}); convert it to PNG", path=path) from None
        except Image.DecompressionBombError:
            raise FileError(f"has more than {MAX_PIXELS // 10**6} million pixels; scale it down", path=path) from None
        except (FileError, MemoryError):
            raise
        except Exception:  # decoders raise whatever they meet: OSError, SyntaxError, ValueError, struct.error, ...
            raise FileError("is damaged or cut short; get it again", path=path) from None


def _require_readable(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise FileError("is a directory, not a picture" if stat.S_ISDIR(status.st_mode) else "is not a regular file", path=path)
    if status.st_size == 0:
        raise FileError("is empty (0 bytes)", path=path)
    if status.st_size > MAX_BYTES:
        raise FileError(f"has {status.st_size} bytes; the limit is {MAX_BYTES}", path=path)


def _nearest(path: Path) -> str:
    """The names most like it beside it, as the end of a message."""
    try:
        names = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    except OSError:
        return f"; there is no directory {printable(str(path.parent))[-60:]}"
    return f"; did you mean {' or '.join(map(printable, names))}?" if names else ""


# --- sizes ----------------------------------------------------------------------------------------------------------


def nearest_multiple(pixels: float, unit: int = 8) -> int:
    """The multiple of `unit` nearest to a length in pixels, at least `unit`; halves go up."""
    return max(unit, math.floor(pixels / unit + 0.5) * unit)


def size_for(image: Image.Image, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """(width, height) to make of a picture, in pixels: its own rounded to multiples of 8; or, given one side, the other as its shape wants it."""
    if width is None and height is None:
        return nearest_multiple(image.width), nearest_multiple(image.height)
    if height is None:
        return width, nearest_multiple(width * image.height / image.width)
    return nearest_multiple(height * image.width / image.height) if width is None else width, height


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled to cover width x height pixels (Lanczos), what juts out cut off evenly: nothing is stretched. Its own size: unchanged."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


# --- writing --------------------------------------------------------------------------------------------------------

_counter = itertools.count()


def save(image: Image.Image, path: str | PathLike[str] | Iterable[Path], metadata: Mapping[str, str] | None = None, *, overwrite: bool = False) -> Path:
    """Write a PNG with `metadata` as text chunks; return its path. The same picture and metadata give the same bytes.

    path       or several of one directory, such as `numbered` and `spare` give: the first that is free is taken, also among processes
    metadata   in Latin-1 as tEXt, other text as UTF-8 in iTXt; a character that UTF-8 has not becomes U+FFFD
    overwrite  replace the file that is there
    All or nothing: a temporary file in the same directory gets the name once it is complete and on the disk.
    Raises OutputError, also where the path exists and `overwrite` is false.
    """
    return _write(_png(image, metadata or {}), path, overwrite)


def save_animation(frames: Sequence[Image.Image], path: str | PathLike[str] | Iterable[Path], *, kind: str = "webp", fps: float = 8, overwrite: bool = False) -> Path:
    """Write pictures of one size one after another, for ever from the beginning; return the path. The rest as for `save`.

    kind  webp, or gif: 256 colours a picture, and times in hundredths of a second
    fps   pictures a second, above 0 to 50
    Raises ArgumentError for another kind or speed, and for pictures of different sizes, or none.
    """
    if kind not in ANIMATIONS:
        raise ArgumentError(f"animation: {kind[:20]!r} is unknown; use {' or '.join(ANIMATIONS)}", key="animation")
    require_fps(fps)
    if len({frame.size for frame in frames}) != 1:
        raise ArgumentError(f"an animation is made of pictures of one size; these have {sorted({frame.size for frame in frames}) or 'none'}")
    buffer, time = io.BytesIO(), 1000 / fps
    if kind == "gif":
        frames, time = [frame.quantize(256) for frame in frames], max(20, round(time / 10) * 10)
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=round(time), loop=0, **{"quality": 90} if kind == "webp" else {})
    return _write(buffer.getvalue(), path, overwrite)


def require_fps(fps: float) -> None:
    """Raises ArgumentError for a speed that no animation has."""
    if not 0 < fps <= MAX_FPS:
        raise ArgumentError(f"fps: {fps:g}; give more than 0 and at most {MAX_FPS:g} pictures a second", key="fps")


def numbered(directory: Path, suffix: str = "", ending: str = "png") -> Iterator[Path]:
    """Names in the directory from the first above all its numbers on: 00001.png, 00002.png, ...; with a suffix, 00001-sheet.png, ..."""
    pattern = re.compile(rf"(\d{{5,9}}){re.escape(suffix)}\.{ending}")
    taken = [int(match[1]) for name in os.listdir(directory) if (match := pattern.fullmatch(name))]
    return (directory / f"{n:05d}{suffix}.{ending}" for n in itertools.count(max(taken, default=0) + 1))


def spare(path: Path) -> Iterator[Path]:
    """cat.png, cat-2.png, cat-3.png, ..."""
    return itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))


def _png(image: Image.Image, metadata: Mapping[str, str]) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    for key, value in metadata.items():
        info.add_text(key, value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))  # iTXt by itself where Latin-1 does not do
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _write(data: bytes, path: str | PathLike[str] | Iterable[Path], overwrite: bool) -> Path:
    """The bytes under the first name that is free, complete or not at all."""
    names = iter([Path(path)] if isinstance(path, (str, PathLike)) else path)
    first = next(names)
    temporary = first.parent / f".{first.name[:40]}.ldm-{os.getpid()}-{next(_counter)}.tmp"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for name in itertools.chain([first], names):
            if _takes(temporary, name, overwrite):
                sync_directory(name.parent)
                return name
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"could not be written: {error.strerror}", path=first) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    raise OutputError("exists already; choose another name, or overwrite it", path=first)


def _takes(temporary: Path, path: Path, overwrite: bool) -> bool:
    """Give the finished file its name; False if the name is taken. No other process can take it in between."""
    if overwrite:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise OutputError("is there and is not a regular file", path=path)
        os.replace(temporary, path)
        return True
    try:
        os.link(temporary, path)  # unlike rename, fails where the name exists
    except FileExistsError:
        return False
    except OSError:  # a file system without links: reserve the name, then replace
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(temporary, path)
    return True
