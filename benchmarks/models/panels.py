"""Pictures in labelled rows, with a tick or a cross each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, LABEL, EDGE = 128, 10, 170, 28  # pixels: a picture, between two, what is left of a row, around everything
HEAD, WORDS = 44, 32  # pixels: of a title, below a picture
COLUMNS = 8
INK, FAINT, LINE, PAPER = "#111827", "#64748b", "#e2e8f0", "#ffffff"
RIGHT, WRONG = "#15803d", "#b91c1c"


@dataclass(frozen=True)
class Row:
    """Pictures, uint8 [128, 128, 3], of one model or of the data."""

    label: str  # its first line is larger
    pictures: Sequence[ndarray]
    marks: Sequence[bool] = ()  # whether each is right; empty: it is not asked
    captions: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Panel:
    """What one demonstration shows."""

    title: str
    rows: Sequence[Row]


def draw(panel: Panel) -> Image.Image:
    """The panel's title and rows. Captions are written below the last of rows that have the same ones."""
    below = [*panel.rows[1:], None]
    words = [
        bool(row.captions) and (each is None or [*each.captions] != [*row.captions])
        for row, each in zip(panel.rows, below, strict=True)
    ]
    heights = [SIDE + (WORDS if captioned else 0) + GAP for captioned in words]
    width = 2 * EDGE + LABEL + COLUMNS * (SIDE + GAP) - GAP
    sheet = Image.new("RGB", (width, HEAD + sum(heights) + EDGE // 2), PAPER)
    pen = ImageDraw.Draw(sheet)
    title, large, small, tiny = (ImageFont.load_default(size) for size in (21, 16, 13, 11))
    pen.line((EDGE, 2, width - EDGE, 2), LINE, 2)
    pen.text((EDGE, 13), panel.title, INK, title)
    y = HEAD
    for row, captioned, height in zip(panel.rows, words, heights, strict=True):
        first, *rest = row.label.split("\n")
        pen.text((EDGE, y + 4), first, INK, large)
        pen.multiline_text((EDGE, y + 28), "\n".join(rest), FAINT, small, spacing=5)
        for k, picture in enumerate(row.pictures[:COLUMNS]):
            x = EDGE + LABEL + k * (SIDE + GAP)
            sheet.paste(Image.fromarray(picture), (x, y))
            if row.marks:
                _mark(pen, x + SIDE - 22, y + 4, row.marks[k])
            if captioned:
                pen.multiline_text((x, y + SIDE + 3), textwrap.fill(row.captions[k], 24), FAINT, tiny, spacing=1)
        y += height
    return sheet


def _mark(pen: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A tick in a green disc or a cross in a red one, 18 pixels wide."""
    pen.ellipse((x, y, x + 18, y + 18), RIGHT if right else WRONG, PAPER, 2)
    if right:
        pen.line([(x + 5, y + 9), (x + 8, y + 13), (x + 13, y + 5)], PAPER, 2)
    else:
        pen.line([(x + 6, y + 6), (x + 12, y + 12)], PAPER, 2)
        pen.line([(x + 12, y + 6), (x + 6, y + 12)], PAPER, 2)


def stacked(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels below each other."""
    sheet = Image.new("RGB", (max(each.width for each in panels), sum(each.height for each in panels)), PAPER)
    y = 0
    for each in panels:
        sheet.paste(each, (0, y))
        y += each.height
    return sheet
