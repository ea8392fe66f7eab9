"""The report of a run: where its curves are drawn, what is said, and that the page holds everything itself."""

import base64
import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from ldm.errors import FileError, OutputError
from ldm.train.recipe import Card, Recipe, Run, Watch
from ldm.train.watch.chart import DARK, LIGHT, Chart, Curve, blend, draw, label, log_ticks, smoothed, ticks
from ldm.train.watch.log import BANDS, Log, read_log
from ldm.train.watch.report import charts, chosen, duration, facts, find_samples, html_page, picture, write_report

PROMPT = 'a <b>red</b> cube & "blue" ball'
RECIPE = Recipe(
    "sygil",
    "What it is for.",
    run=Run(steps=300, batch=8),
    watch=Watch(prompts=(PROMPT, "a cone")),
    card=Card(model="Sygil Diffusion", hardware="RTX 3050"),
)


def logged(out: Path, lines: int = 30, steps: tuple[int, ...] = (100, 200, 300)) -> Path:
    """A run's directory as the loop leaves it."""
    with Log(out, 300, Watch(), "sygil") as log:
        for i in range(1, lines + 1):
            bands = {"bands": [0.5 / (k + 1) / i for k in range(BANDS)], "band_counts": [1] * BANDS}
            log.write(
                {
                    "step": 10 * i,
                    "loss": 1 / i,
                    "lr": 1e-4,
                    "grad_norm": 0.5,
                    "examples_per_second": 8.0,
                    "skipped": 1,
                    "seconds": 4.0,
                }
                | bands
            )
        log.event({"step": 120, "event": "skipped", "loss": "<nan>"})
        log.event({"step": 130, "event": "saved"})
        for step in steps:
            log.write({"step": step, "validation_loss": 30 / step, "validation_levels": [[500, 30 / step]]})
    for step in steps:
        folder = out / "validation" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for i, colour in enumerate(("red", "blue")):
            Image.new("RGB", (300, 200) if i else (32, 32), colour).save(folder / f"{i:02d}.png")
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = logged(tmp_path_factory.mktemp("run"))
    write_report(out, RECIPE)
    return out


# --- charts -----------------------------------------------------------------------------------------------------------


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


def drawn_at(image: Image.Image, colour: str) -> list[tuple[int, int]]:
    """Where a picture has exactly this colour."""
    wanted, width = ImageColor.getrgb(colour), image.width
    return [
        (i % width, i // width)
        for i, pixel in enumerate(
            image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata()
        )
        if pixel == wanted
    ]


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


# --- what is said -----------------------------------------------------------------------------------------------------


def test_there_is_a_chart_of_everything_that_was_logged(run):
    records = read_log(run)
    made = charts(records, LIGHT)
    assert [chart.title for chart in made] == [
        "Loss",
        "Loss by timestep",
        "Validation loss",
        "Learning rate",
        "Norm of the gradient",
        "Speed",
    ]
    loss, bands, validation = made[:3]
    assert loss.log, "it falls to a thirtieth"
    assert loss.curves[-1].y == pytest.approx([1 / i for i in range(1, 31)])
    assert len(bands.curves) == BANDS
    assert len({curve.colour for curve in bands.curves}) == BANDS
    assert (validation.curves[0].x, validation.curves[0].y) == ([100, 200, 300], [0.3, 0.15, 0.1])
    assert [chart.title for chart in charts([record for record in records if "bands" not in record], LIGHT)] == [
        "Validation loss"
    ]


def test_a_long_run_is_smoothed_and_its_lines_stay_visible():
    records = [{"step": i, "loss": 1.0 + i % 2} for i in range(1, 401)]
    (loss,) = charts(records, LIGHT)
    faint, bold = loss.curves
    assert faint.background
    assert faint.y == [1.0 + i % 2 for i in range(1, 401)]
    assert bold.y[200] == 1.5
    assert loss.note == "mean of 10 lines of the log; single lines are faint"


def test_a_band_weighs_as_many_examples_as_it_saw():
    records = [
        {"step": i, "loss": 1.0, "bands": [float(i)] * BANDS, "band_counts": [3 if i == 1 else 1] * BANDS}
        for i in (1, 2)
    ]
    bands = charts(records, LIGHT)[1]
    assert bands.curves[0].y[0] == pytest.approx((3 * 1 + 2) / 4)


def test_the_numbers_of_a_run_are_told(run):
    assert facts(read_log(run), RECIPE) == [
        ("method", "full"), ("updates", "300 of 300"), ("batch", "8"), ("loss at the end", "0.0333"),
        ("validation loss", "0.1"), ("time in updates", "2 min 0 s"), ("updates skipped", "1"),
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (45.4, 725, 12000, 4_000_000)] == [
        "45 s",
        "12 min 5 s",
        "3 h 20 min",
        "1,111 h 6 min",
    ]


def test_the_first_and_the_last_validation_are_always_shown():
    assert chosen((100, 200), 8) == [100, 200]
    assert chosen(range(0, 10001, 100), 3) == [0, 5000, 10000]


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_has_every_sample_in_the_row_of_its_prompt_and_the_column_of_its_step(run):
    page = Image.open(run / "report.png").convert("RGB")
    small = page.resize((page.width // 8, page.height // 8), Image.Resampling.NEAREST)
    red, blue = drawn_at(small, "red"), drawn_at(small, "blue")
    assert max(y for _, y in red) < min(y for _, y in blue)
    assert min(x for x, _ in red) == pytest.approx(min(x for x, _ in blue), abs=1)
    gaps = [x for x in range(min(red)[0], max(red)[0]) if x not in {x for x, _ in red}]
    assert len({x - i for i, x in enumerate(gaps)}) == 2, "three columns"


def test_a_wide_sample_keeps_its_shape(run):
    page = Image.open(run / "report.png").convert("RGB")
    small = page.resize((page.width // 8, page.height // 8), Image.Resampling.NEAREST)
    columns, rows = zip(*drawn_at(small, "blue"), strict=True)
    third = (max(columns) - min(columns)) / 3
    assert (max(rows) - min(rows)) / third == pytest.approx(2 / 3, abs=0.08)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_run_without_anything_to_show_has_a_page_all_the_same(tmp_path, theme):
    bare = Recipe("x" * 300, "", run=Run(steps=5))
    page = picture([], find_samples(tmp_path, bare), bare, theme)
    assert page.getpixel((0, 0)) == ImageColor.getrgb(theme.paper)
    assert "0 of 5" in html_page([], find_samples(tmp_path, bare), bare)


def test_the_same_run_gives_the_same_bytes(tmp_path, run):
    again = logged(tmp_path / "again")
    for path in write_report(again, RECIPE):
        assert path.read_bytes() == (run / path.name).read_bytes()


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page is made of, and whether everything opened is closed."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words, self.sources = [], Counter(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_everything_itself_and_reaches_for_nothing(run):
    text = (run / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert len(page.sources) == 6 * 2 + 3 * 2
    for source in page.sources:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,([\w+/=]+)", source).groups()
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert image.format.lower() == kind
    assert not re.search(r"url\(|@import|https?:|//[a-z]", re.sub(r"base64,[\w+/=]+", "", text))


def test_the_page_suits_a_phone_and_the_night(run):
    text = (run / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert text.count('media="(prefers-color-scheme: dark)"') == 6
    night, day = (
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in Page(text).sources[:2]
    )
    assert [image.getpixel((image.width // 2, 4)) for image in (night, day)] == [
        ImageColor.getrgb(theme.panel) for theme in (DARK, LIGHT)
    ]
    assert "@media (prefers-color-scheme: dark)" in text


def test_what_people_wrote_is_shown_and_not_obeyed(run):
    text = (run / "report.html").read_text()
    said = "".join(Page(text).words)
    assert PROMPT in said
    assert "loss: <nan>" in said
    assert "<nan>" not in text
    assert "<b>red" not in text


def test_the_page_tells_the_recipe_its_card_and_what_happened(run):
    words = Page((run / "report.html").read_text()).words
    said = "\n".join(words)
    assert "Training" in words, "the card's section"
    assert "the card of Sygil Diffusion" in said
    assert words[words.index("run.batch") + 1] == "8"
    assert said.index("run.batch") < said.index("every key") < said.index("run.keep"), (
        "what is usual is behind the fold"
    )
    assert words[words.index("120") + 1] == "skipped"
    assert "saved" not in words


def test_pictures_in_the_page_are_small_and_the_smallest_untouched(run):
    images = [
        Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2])))
        for s in Page((run / "report.html").read_text()).sources[12:]
    ]
    assert [(image.format, image.size) for image in images] == [("PNG", (32, 32))] * 3 + [("JPEG", (256, 171))] * 3


def test_many_events_are_counted_and_not_listed():
    records = [{"step": i, "event": "bad picture", "id": f"{i}.png"} for i in range(1, 51)]
    text = html_page(records, find_samples(Path("nowhere"), RECIPE), RECIPE)
    assert text.count("bad picture") == 40
    assert "10 more are in log.jsonl." in text


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_sample_that_cannot_be_read_is_named(tmp_path):
    logged(tmp_path, 2, (100,))
    (tmp_path / "validation" / "step-000100" / "01.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match=r"01\.png"):
        write_report(tmp_path, RECIPE)


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(
        OutputError, match=r"report\.html: cannot be written \(.+\); free space and write the report again"
    ):
        write_report(tmp_path, RECIPE)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.png"}
