"""Several pictures on one: sheets with a label under each, tables with labelled axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from ldm.errors import ArgumentError, printable

GAP = 8  # pixels between pictures
MAX_SIDE = 16384  # pixels of a table; larger ones are made of smaller pictures
MIN_HEADER = 120  # pixels that a line of a header may take beside, or over, small pictures
MAX_LINES = 6  # of a header

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def sheet(images: Sequence[Image.Image], labels: Sequence[str] = (), columns: int | None = None) -> Image.Image:
    """All pictures on one, row by row, each over its label. Labels too long for the picture end in dots.

    columns  as many as make the sheet about square, if not given
    Raises ArgumentError for no pictures, or labels that are not one for each.
    """
    if not images or len(labels) not in (0, len(images)):
        raise ArgumentError(
            f"a sheet of {len(images)} pictures with {len(labels)} labels: "
            "give at least one picture, and one label for each or none"
        )
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    font = ImageFont.load_default(max(10, min(24, width // 12)))
    line = _line(font) if labels else 0
    rows = math.ceil(len(images) / columns)
    out = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + line + GAP) + GAP), "white")
    draw = ImageDraw.Draw(out)
    for i, (image, label) in enumerate(itertools.zip_longest(images, labels, fillvalue="")):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + line + GAP)
        out.paste(image, (x, y))
        text = _shortened(printable(label), lambda text: font.getlength(text) <= width)
        draw.text((x, y + height + 2), text, fill="black", font=font)
    return out


def table(rows: Sequence[Sequence[Image.Image]], across: Sequence[str] = (), down: Sequence[str] = ()) -> Image.Image:
    """Pictures in rows and columns, with a header over every column and one left of every row.

    across, down  the headers; none, or one for each column, or row. Long ones are broken into six lines, or end in dots
    Pictures are scaled down where the table would have more than 16384 pixels along a side. Raises ArgumentError for no
    pictures, rows of different lengths, or headers that are not one for each.
    """
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise ArgumentError(
            f"a table of rows with {[len(row) for row in rows][:10]} pictures: give one row or more, of one length"
        )
    if len(across) not in (0, len(rows[0])) or len(down) not in (0, len(rows)):
        raise ArgumentError(
            f"a table of {len(rows)} rows and {len(rows[0])} columns with {len(down)} and {len(across)} headers: "
            "give one for each, or none"
        )
    rows = _limited(rows)
    width, height = (max(image.size[side] for row in rows for image in row) for side in (0, 1))
    font = ImageFont.load_default(max(14, min(40, min(width, height) // 12)))
    heads = [_broken(label, font, max(width, MIN_HEADER)) for label in across]
    sides = [_broken(label, font, max(width // 2, MIN_HEADER)) for label in down]
    line = _line(font)
    wide = math.ceil(max([width, *(font.getlength(text) for lines in heads for text in lines)]))
    high = max([height, *(line * len(lines) for lines in sides)])
    left = math.ceil(max((font.getlength(text) for lines in sides for text in lines), default=-GAP)) + GAP
    top = max((line * len(lines) for lines in heads), default=-GAP) + GAP
    out = Image.new("RGB", (left + GAP + len(rows[0]) * (wide + GAP), top + GAP + len(rows) * (high + GAP)), "white")
    draw = ImageDraw.Draw(out)
    for i, lines in enumerate(heads):
        x = left + GAP + i * (wide + GAP) + wide / 2
        for k, text in enumerate(lines):
            draw.text((x, top - (len(lines) - k) * line), text, fill="black", font=font, anchor="ma")
    for j, (row, lines) in enumerate(zip(rows, sides or [[]] * len(rows), strict=True)):
        y = top + GAP + j * (high + GAP)
        for k, text in enumerate(lines):
            draw.text((left, y + (high - len(lines) * line) / 2 + k * line), text, fill="black", font=font, anchor="ra")
        for i, image in enumerate(row):
            x = left + GAP + i * (wide + GAP) + (wide - image.width) // 2
            out.paste(image, (x, y + (high - image.height) // 2))
    return out


def _limited(rows: Sequence[Sequence[Image.Image]]) -> list[list[Image.Image]]:
    """The pictures, smaller where all of them together would be too large."""
    largest = max(
        len(rows[0]) * max(image.width for row in rows for image in row),
        len(rows) * max(image.height for row in rows for image in row),
    )
    share = MAX_SIDE * 0.9 / largest  # a tenth is left for headers and gaps
    if share >= 1:
        return [list(row) for row in rows]

    def smaller(image: Image.Image) -> Image.Image:
        size = max(1, int(image.width * share)), max(1, int(image.height * share))
        return image.resize(size, Image.Resampling.LANCZOS)

    return [[smaller(image) for image in row] for row in rows]


def _line(font: Font) -> int:
    """The height of a line of text in pixels."""
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's default font of a given size
    return sum(font.getmetrics()) + 4


def _broken(text: str, font: Font, width: int) -> list[str]:
    """The text in lines no wider than `width`, broken between words where that is possible."""

    def fits(line: str) -> bool:
        return font.getlength(line) <= width

    lines = [""]
    for word in printable(" ".join(text.split())).split(" "):
        if fits(f"{lines[-1]} {word}".strip()):
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(_shortened(word, fits))
    lines = [line for line in lines if line] or [""]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], _shortened(f"{lines[MAX_LINES - 1]} ...", fits)]
    return lines


def _shortened(text: str, fits: Callable[[str], bool]) -> str:
    """As much of the text as fits, with dots where something is left out."""
    if fits(text):
        return text
    return next((text[:n] + "..." for n in range(len(text), 0, -1) if fits(text[:n] + "...")), "")
