"""Pictures from bytes, refused as `ldm.images.open_image` refuses files."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from ldm.errors import FileError
from ldm.images import to_rgb
from ldm.pictures.read import FORMATS, MAX_PIXELS
from ldm.train.data.source import Unusable

ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side
ORIENTED_PNG = (
    b"eXIf",
    b"rofile type exif",
    b"com.adobe.xmp",
)  # one of these is in a PNG that says how it lies, perhaps after its pixels


def size_of(data: bytes, place: str) -> tuple[int, int]:
    """Height and width of the picture in these bytes, turned upright as EXIF says; its pixels are not decoded. Raises FileError."""
    with _opened(data, place) as image:
        width, height = image.size
        try:
            upright = image.format == "PNG" and not any(mark in data for mark in ORIENTED_PNG)  # asking would decode it
            lies = not upright and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        except Exception:  # parsers of EXIF raise whatever they meet
            raise FileError("is damaged or cut short; get it again", path=place) from None
        return (width, height) if lies else (height, width)


def decoded(data: bytes, place: str) -> Image.Image:
    """The picture in these bytes, RGB and upright, of an animation the first frame. Raises FileError that names `place`."""
    with _opened(data, place) as image:
        try:
            image.load()
            return to_rgb(image)
        except MemoryError:
            raise
        except Exception:  # decoders raise whatever they meet: OSError, SyntaxError, ValueError, struct.error, ...
            raise FileError("is damaged or cut short; get it again", path=place) from None


def _opened(data: bytes, place: str) -> Image.Image:
    if not data:
        raise FileError("is empty (0 bytes)", path=place)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise FileError(
            f"is not a picture in a format that is read ({', '.join(FORMATS)}); convert it to PNG", path=place
        ) from None
    except Image.DecompressionBombError:
        raise FileError(f"has more than {MAX_PIXELS // 10**6} million pixels; scale it down", path=place) from None
    except Exception:
        raise FileError("is damaged or cut short; get it again", path=place) from None
    if image.width * image.height > MAX_PIXELS:
        raise FileError(f"has more than {MAX_PIXELS // 10**6} million pixels; scale it down", path=place)
    return image


def require_shape(depth: tuple[int, int], picture: tuple[int, int]) -> None:
    """Raises Unusable for a depth map (height, width) that is not of its picture's shape, to 1 %: as for `ldm.tasks.depth2img`."""
    if abs(depth[1] * picture[0] - depth[0] * picture[1]) > 0.01 * depth[1] * picture[0]:
        raise Unusable(
            f"has a depth map of {depth[1]}x{depth[0]} pixels, another shape than its {picture[1]}x{picture[0]}"
        )
