"""The report of a run: where its curves are drawn, its words, and that the page holds everything itself."""

from __future__ import annotations

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
from ldm.train.watch.chart import DARK, LIGHT
from ldm.train.watch.log import BANDS, Log, read_log
from ldm.train.watch.report import charts, chosen, duration, facts, find_samples, html_page, picture, write_report
from tests.made.pictures import drawn_at

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
    page = picture([], find_samples(tmp_path, bare.watch.prompts), bare, theme)
    assert page.getpixel((0, 0)) == ImageColor.getrgb(theme.paper)
    assert "0 of 5" in html_page([], find_samples(tmp_path, bare.watch.prompts), bare)


def test_the_same_run_gives_the_same_bytes(tmp_path, run):
    again = logged(tmp_path / "again")
    for path in write_report(again, RECIPE):
        assert path.read_bytes() == (run / path.name).read_bytes()


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
    shown = "".join(Page(text).words)
    assert PROMPT in shown
    assert "loss: <nan>" in shown
    assert "<nan>" not in text
    assert "<b>red" not in text


def test_the_page_tells_the_recipe_its_card_and_what_happened(run):
    words = Page((run / "report.html").read_text()).words
    shown = "\n".join(words)
    assert "Training" in words, "the card's section"
    assert "the card of Sygil Diffusion" in shown
    assert words[words.index("run.batch") + 1] == "8"
    assert shown.index("run.batch") < shown.index("every key") < shown.index("run.keep"), (
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
    text = html_page(records, find_samples(Path("nowhere"), RECIPE.watch.prompts), RECIPE)
    assert text.count("bad picture") == 40
    assert "10 more are in log.jsonl." in text


def test_a_sample_that_cannot_be_read_is_named(tmp_path):
    logged(tmp_path, 2, (100,))
    (tmp_path / "validation" / "step-000100" / "01.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match=r"01\.png"):
        write_report(tmp_path, RECIPE)


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(
        OutputError, match=r"report\.html: could not be written: \w.+; free space and write the report again"
    ):
        write_report(tmp_path, RECIPE)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.png"}
