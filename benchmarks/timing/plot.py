"""Bars of how many times as fast as diffusers each side is, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# In pixels: the whole, its border, what is left of the bars and right of them; a bar, the room below it and below a
# cell's bars, and the title.
WIDTH, MARGIN, LABEL, FIGURES = 1200, 24, 300, 230
BAR, GAP, CELL_GAP, HEAD = 22, 4, 26, 72
COLOURS = {
    "fast": "#c2410c", "ldm": "#f59e0b", "diffusers": "#475569", "diffusers-best": "#94a3b8", "openvino": "#2563eb",
    "sdcpp": "#16a34a",
}  # fmt: skip
INK, FAINT, PAPER = "#111827", "#9ca3af", "#ffffff"


def draw(rows: Sequence[Mapping[str, Any]], title: str, caption: str) -> Image.Image:
    """A bar for each row that has a ratio, grouped by what was timed. Longer is faster; the line at 1 is diffusers."""
    rows = [row for row in rows if row["ratio"] is not None]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['model']}, {row['dtype']}\n{row['cell']}", []).append(row)
    height = HEAD + len(rows) * (BAR + GAP) + len(groups) * CELL_GAP + 2 * MARGIN
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(22), ImageFont.load_default(15)
    pen.text((MARGIN, MARGIN), title, INK, large)
    pen.text((MARGIN, MARGIN + 30), caption, FAINT, small)
    unit = (WIDTH - 2 * MARGIN - LABEL - FIGURES) / max([1.0, *(row["ratio"] for row in rows)])
    left, y = MARGIN + LABEL, HEAD + MARGIN
    for name, group in groups.items():
        pen.multiline_text((MARGIN, y), name, INK, small, spacing=6)
        for row in group:
            right = left + row["ratio"] * unit
            pen.rectangle((left, y, right, y + BAR), fill=COLOURS[row["side"]])
            label = f"{row['side']}  {row['ratio']:.2f}  ({row['seconds']['median']:.3g} s)"
            pen.text((max(right, left + unit) + 8, y + 3), label, INK, small)
            y += BAR + GAP
        y += CELL_GAP
    pen.line((left + unit, HEAD + MARGIN - 8, left + unit, y - CELL_GAP), fill=FAINT, width=1)
    return picture
