"""Charts: axes, colours, and curves where their values are."""

from __future__ import annotations

import pytest
from PIL import ImageColor

from ldm.train.watch.chart import DARK, LIGHT, Chart, Curve, blend, draw, label, log_ticks, smoothed, ticks
from ldm.train.watch.log import BANDS
from tests.made.pictures import drawn_at


def test_ticks_are_round_numbers_within_the_range():
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.11, 0.29, 5) == pytest.approx([0.15, 0.2, 0.25])
    assert ticks(3, 3, 5) == [3]
    assert log_ticks(0.02, 30) == pytest.approx([0.1, 1, 10])
    assert log_ticks(0.05, 1.5) == pytest.approx([0.1, 0.3, 1])
    assert log_ticks(1, 11) == pytest.approx([1, 3, 10])
    assert log_ticks(1, 7) == pytest.approx([1, 2, 5])
    assert len(log_ticks(1e-12, 1e12)) <= 6


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (1e-5, "1e-5"),
        (2.5e-7, "2.5e-7"),
        (0.05, "0.05"),
        (-3.0, "-3"),
        (1200, "1200"),
        (20000, "20k"),
        (1.5e6, "1.5M"),
    ],
)
def test_numbers_on_axes_are_short(value, words):
    assert label(value) == words


def test_numbers_on_one_axis_have_one_unit():
    assert [label(value, 10000) for value in (0, 5000, 10000)] == ["0", "5k", "10k"]


def test_a_smoothed_curve_is_a_weighted_mean_of_what_is_there():
    assert smoothed([1, 2, 3, 4], [1] * 4, 1) == [1, 2, 3, 4]
    assert smoothed([1, 2, 3, 4, 5], [1] * 5, 3) == [1.5, 2, 3, 4, 4.5]
    assert smoothed([1, None, 4], [1, 1, 3], 3) == [1, 3.25, 4]
    assert smoothed([None, None, 2], [0, 0, 1], 2) == [None, 2, 2]


def test_a_family_of_colours_runs_from_the_first_to_the_last():
    assert blend(("#000000", "#ffffff"), 3) == ["#000000", "#808080", "#ffffff"]
    assert blend(LIGHT.ramp, 10)[0] == LIGHT.ramp[0]
    assert blend(LIGHT.ramp, 10)[-1] == LIGHT.ramp[-1]


def test_a_curve_is_drawn_from_corner_to_corner_where_its_values_are():
    curve = Curve([0, 50, 100], [0, 1, 2], "#00ff00", 3)
    points = drawn_at(draw(Chart("", "", (curve,)), (300, 200), LIGHT, 1), "#00ff00")
    left, right = min(points), max(points)
    assert right[0] - left[0] == pytest.approx(300 - 54 - 54, abs=4)
    assert left[1] - right[1] == pytest.approx(
        (200 - 60 - 32) / 1.16, abs=4
    )  # 8 % of the range stay free above and below
    assert any(abs(x - (left[0] + right[0]) / 2) < 2 and abs(y - (left[1] + right[1]) / 2) < 3 for x, y in points), (
        "it is straight"
    )


def test_on_a_logarithmic_axis_a_factor_is_a_distance():
    curve = Curve([0, 50, 100], [1, 10, 100], "#00ff00", 3)
    points = drawn_at(draw(Chart("", "", (curve,), log=True), (300, 200), LIGHT, 1), "#00ff00")
    left, right = min(points), max(points)
    assert any(abs(x - (left[0] + right[0]) / 2) < 2 and abs(y - (left[1] + right[1]) / 2) < 3 for x, y in points)
    draw(
        Chart("", "", (Curve([0, 1], [0.0, 1.0], "#00ff00"),), log=True), (300, 200), LIGHT, 1
    )  # 0 is nowhere on it: a gap


def test_a_missing_value_is_a_gap_and_a_lone_one_a_dot():
    curve = Curve([0, 40, 50, 60, 100], [1, 1, None, 1, 1], "#00ff00", 3)
    columns = {x for x, _ in drawn_at(draw(Chart("", "", (curve,)), (300, 200), LIGHT, 1), "#00ff00")}
    assert not columns & set(range(54 + 82, 54 + 110))
    assert columns & set(range(54, 54 + 70))
    assert columns & set(range(54 + 120, 54 + 190))
    assert drawn_at(draw(Chart("", "", (Curve([5], [1], "#00ff00", 4),)), (300, 200), LIGHT, 1), "#00ff00")


def test_an_outlier_in_the_background_neither_flattens_the_curve_nor_leaves_the_plot():
    x = list(range(200))
    noise = Curve(x, [1.0 + i % 2 for i in x[:-2]] + [500.0, -500.0], "#0000ff", 1, background=True)
    image = draw(Chart("Title", "", (noise, Curve(x, [1 + i / 199 for i in x], "#00ff00", 3))), (300, 200), LIGHT, 1)
    points = drawn_at(image, "#00ff00")
    assert max(y for _, y in points) - min(y for _, y in points) > 80
    assert {60 <= y < 200 - 32 for _, y in drawn_at(image, "#0000ff")} == {True}
    assert max(y for _, y in drawn_at(image, LIGHT.ink)) < 60, "nothing is drawn over"


def test_a_curve_of_many_points_looks_like_one_of_few():
    few, many = (
        Curve([i * 100 / n for i in range(n + 1)], [i / n for i in range(n + 1)], "#00ff00", 3) for n in (10, 30000)
    )
    pictures = [draw(Chart("", "", (curve,)), (300, 200), LIGHT, 1) for curve in (few, many)]
    one, other = (set(drawn_at(image, "#00ff00")) for image in pictures)
    for some, all_others in ((one, other), (other, one)):
        assert some <= {(x + i, y + k) for x, y in all_others for i in (-1, 0, 1) for k in (-1, 0, 1)}, (
            "what is left out moves nothing by a pixel"
        )
    assert len(other) > 400


def test_themes_have_colours_that_can_be_read():
    """WCAG 2.2: 4.5 for words, 3 for what is drawn."""

    def luminance(colour: str) -> float:
        return sum(
            w * ((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else w * c / 255 / 12.92
            for w, c in zip((0.2126, 0.7152, 0.0722), ImageColor.getrgb(colour), strict=True)
        )

    def contrast(a: str, b: str) -> float:
        low, high = sorted(map(luminance, (a, b)))
        return (high + 0.05) / (low + 0.05)

    for theme in (LIGHT, DARK):
        for ground in (theme.paper, theme.panel):
            assert min(contrast(theme.ink, ground), contrast(theme.faint, ground)) >= 4.5
        assert contrast(theme.accent, theme.panel) >= 4.5
        assert min(contrast(colour, theme.panel) for colour in blend(theme.ramp, BANDS)) >= 3
