"""Several pictures on one: where each of them is, and what is written beside it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.errors import ArgumentError
from ldm.pictures import sheets
from ldm.pictures.sheets import sheet, table

WHITE = (255, 255, 255)


@pytest.fixture
def noisy() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def color(image: Image.Image) -> tuple[int, int, int]:
    """The one colour of a picture."""
    ((_, value),) = image.getcolors()
    return value


def test_a_sheet_shows_every_picture_in_order_with_its_label():
    pictures = [Image.new("RGB", (64, 48), (50 * i, 0, 0)) for i in range(5)]
    plain, labelled = sheet(pictures), sheet(pictures, [f"seed {i} 🙂" for i in range(5)])
    assert plain.size == (3 * 72 + 8, 2 * 56 + 8)
    assert [plain.getpixel((8 + i % 3 * 72 + 32, 8 + i // 3 * 56 + 24))[0] for i in range(5)] == [0, 50, 100, 150, 200]
    assert labelled.height > plain.height
    text = labelled.crop((8, 8 + 48, 72, 8 + 48 + 12))
    assert np.asarray(text).min() < 128  # something is written there


def test_a_label_that_is_too_long_stays_under_its_picture():
    pictures = [Image.new("RGB", (64, 16))] * 2
    long = sheet(pictures, ["W" * 1000, ""])
    beside = long.crop((8 + 64, 8 + 16, long.width, long.height))
    assert color(beside) == WHITE
    assert sheet([Image.new("RGB", (2, 2))], ["W"]).width == 18  # not even dots fit


def test_a_sheet_of_nothing_or_with_too_few_labels_is_refused(noisy):
    with pytest.raises(ArgumentError, match="at least one"):
        sheet([])
    with pytest.raises(ArgumentError, match="one label for each"):
        sheet([noisy, noisy], ["only one"])


# --- tables ---------------------------------------------------------------------------------------------------------


def filled(width: int, height: int, columns: int, rows: int) -> list[list[Image.Image]]:
    """Pictures whose red is their column and whose green is their row."""
    return [[Image.new("RGB", (width, height), (40 * x, 40 * y, 255)) for x in range(columns)] for y in range(rows)]


def box(out: Image.Image, value: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of all pixels of one colour."""
    where = np.argwhere((np.asarray(out) == value).all(axis=-1))
    (top, left), (bottom, right) = where.min(axis=0), where.max(axis=0)
    return int(left), int(top), int(right) + 1, int(bottom) + 1


def written(out: Image.Image, area: tuple[int, int, int, int]) -> bool:
    """Whether there is dark text on the white of an area."""
    pixels = np.asarray(out.crop(area).convert("L"))
    return bool(pixels.min() < 100 and pixels.max() == 255)


def test_every_picture_of_a_table_has_its_place_under_and_beside_its_headers():
    out = table(filled(200, 100, 3, 2), ["cfg 1", "cfg 2", "cfg 3"], ["ddim", "plms"])
    boxes = [[box(out, (40 * x, 40 * y, 255)) for x in range(3)] for y in range(2)]
    for y, row in enumerate(boxes):
        for x, (left, top, right, bottom) in enumerate(row):
            assert (right - left, bottom - top) == (200, 100)
            assert left == boxes[0][x][0]
            assert top == boxes[y][0][1]
    (left, top, _, _), (_, _, right, bottom) = boxes[0][0], boxes[1][2]
    assert right < out.width
    assert bottom < out.height
    for x in range(3):
        assert written(out, (boxes[0][x][0], 0, boxes[0][x][2], top))
    for y in range(2):
        assert written(out, (0, boxes[y][0][1], left, boxes[y][0][3]))
    assert color(out.crop((0, 0, left, top))) == WHITE  # no header in the corner


def test_a_table_without_headers_is_only_pictures():
    out = table(filled(40, 30, 2, 2))
    assert out.size == (2 * 48 + 8, 2 * 38 + 8)
    assert box(out, (0, 0, 255)) == (8, 8, 48, 38)
    assert table(filled(40, 30, 2, 1), ["a", "b"]).height > 38 + 8
    assert table(filled(40, 30, 2, 1), (), ["a"]).width > 2 * 48 + 8


def test_long_headers_are_broken_and_stay_out_of_the_pictures():
    prompt = "a red cube on top of a blue sphere in front of a green cone beside a yellow cylinder " * 20
    pictures = filled(64, 64, 2, 2)
    out = table(pictures, [prompt, "W" * 500], [prompt, "cfg 2"])
    assert out.width < 2 * 200 + 200
    for y in range(2):
        for x in range(2):
            left, top, right, bottom = box(out, (40 * x, 40 * y, 255))
            assert np.array_equal(out.crop((left, top, right, bottom)), pictures[y][x])


def test_pictures_of_several_sizes_stand_in_the_middle_of_their_places():
    small, large = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (40, 30), (0, 0, 255))
    out = table([[small, large], [large, small]])
    assert box(out.crop((0, 0, 56, 46)), (255, 0, 0)) == (18, 18, 38, 28)


def test_a_table_that_would_be_too_large_is_made_of_smaller_pictures(monkeypatch):
    monkeypatch.setattr(sheets, "MAX_SIDE", 400)
    out = table(filled(200, 100, 4, 3), list("abcd"), list("efg"))
    assert max(out.size) <= 500  # headers and gaps are not scaled
    left, top, right, bottom = box(out, (0, 0, 255))
    assert (right - left, bottom - top) == (90, 45)


def test_a_table_that_is_none_is_refused(noisy):
    for rows, across, down, what in [
        ([], (), (), "one row or more"),
        ([[]], (), (), "one row or more"),
        ([[noisy], [noisy, noisy]], (), (), "of one length"),
        ([[noisy]], ["a", "b"], (), "one for each"),
        ([[noisy]], (), ["a", "b"], "one for each"),
    ]:
        with pytest.raises(ArgumentError, match=what):
            table(rows, across, down)
