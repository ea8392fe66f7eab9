"""The report of a run, report.png and report.html, from its log and its validation pictures."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ldm.pictures.read import open_image
from ldm.pictures.write import save
from ldm.targets import write_text
from ldm.train.recipe import Recipe
from ldm.train.watch.card import training_section
from ldm.train.watch.chart import DARK, LIGHT, Chart, Curve, Theme, blend, draw, font, smoothed
from ldm.train.watch.log import BANDS, Record, read_log

SMOOTH = 40  # a curve is the mean of as many lines of the log as make this many parts of the run
CHART = (420, 270)  # pixels of one chart; its pictures have SCALE times as many
SCALE, MARGIN, GAP, PROMPT = 2, 32, 16, 200  # pixels: of the page's border, between its parts, of the column of prompts
COLUMNS_PNG, COLUMNS_HTML = 8, 12  # validations that are shown, evenly chosen, the first and the last among them
THUMBNAIL = 256  # pixels: validation pictures in the HTML file are at most as large
EVENTS = 40  # at most, in the list


@dataclass(frozen=True)
class Samples:
    """Validation pictures of a run."""

    steps: tuple[int, ...]
    prompts: tuple[str, ...]  # one for each row
    files: Mapping[tuple[int, int], Path]  # (step, row)


def write_report(out: Path, recipe: Recipe) -> tuple[Path, Path]:
    """Write report.png and report.html into a run's directory, from its log.jsonl and validation/; return their paths.

    The HTML file holds everything it shows and loads nothing. Raises FileError for a log or a picture that cannot be
    read, OutputError.
    """
    records = read_log(out)
    samples = find_samples(out, recipe.watch.prompts)
    png, page = out / "report.png", out / "report.html"
    save(picture(records, samples, recipe), png, overwrite=True)
    write_text(page, html_page(records, samples, recipe), "free space and write the report again")
    return png, page


def find_samples(out: Path, prompts: Sequence[str]) -> Samples:
    """The pictures validation/step-*/NN.png of these prompts, in the order of their steps."""
    files = {}
    for path in sorted((out / "validation").glob("step-*/*.png")):
        step, row = re.fullmatch(r"step-(\d+)", path.parent.name), re.fullmatch(r"\d+", path.stem)
        if step and row:
            files[int(step[1]), int(row[0])] = path
    rows = max((row + 1 for _, row in files), default=0)
    names = [*prompts, *(f"picture {i + 1}" for i in range(len(prompts), rows))][:rows]
    return Samples(tuple(sorted({step for step, _ in files})), tuple(names), files)


def chosen(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, evenly, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def charts(records: Sequence[Record], theme: Theme) -> list[Chart]:
    """A chart of each number that was logged at least once."""
    lines = [record for record in records if "event" not in record and "loss" in record]
    x = [record["step"] for record in lines]
    window = max(1, len(lines) // SMOOTH)
    mean = f"mean of {window} lines of the log; single lines are faint" if window > 1 else "every line of the log"
    pale = blend((theme.panel, theme.accent), 4)[1]

    def curves(key: str) -> tuple[Curve, ...]:
        bold = Curve(x, _smooth(lines, key), theme.accent, 2.2, last=True)
        faint = Curve(x, [record.get(key) for record in lines], pale, 1.0, background=True)
        return (faint, bold) if window > 1 else (bold,)

    made = [Chart("Loss", mean, curves("loss"), log=_wide(curves("loss")))]
    if banded := [record for record in lines if record.get("bands")]:
        made.append(_bands(banded, theme, window))
    if validations := [record for record in records if record.get("validation_loss") is not None]:
        levels = len(validations[-1].get("validation_levels", ()))
        note = f"held-out pictures, same noise, {levels} noise level{'s' if levels > 1 else ''}"
        losses = {record["step"]: record["validation_loss"] for record in validations}
        steps = sorted(losses)
        curve = Curve(steps, [losses[step] for step in steps], theme.accent, 2.2, dots=True, last=True)
        made.append(Chart("Validation loss", note, (curve,)))
    rate = Curve(x, [record.get("lr") for record in lines], theme.accent, 2.2, last=True)
    made.append(Chart("Learning rate", "of the first group of parameters", (rate,), zero=True))
    note = f"before clipping; {mean}" if window == 1 else "before clipping, smoothed likewise"
    made.append(Chart("Norm of the gradient", note, curves("grad_norm"), log=_wide(curves("grad_norm"))))
    made.append(Chart("Speed", "examples per second", curves("examples_per_second"), zero=True))
    return [chart for chart in made if any(y is not None for curve in chart.curves for y in curve.y)]


def _smooth(lines: Sequence[Record], key: str) -> list[float | None]:
    return smoothed([record.get(key) for record in lines], [1.0] * len(lines), max(1, len(lines) // SMOOTH))


def _bands(lines: Sequence[Record], theme: Theme, window: int) -> Chart:
    """The loss of every tenth of the noise schedule; lines of the log weigh as many examples as they saw of it."""
    curves = []
    for i, colour in enumerate(blend(theme.ramp, BANDS)):
        means, counts = [line["bands"][i] for line in lines], [line["band_counts"][i] for line in lines]
        curves.append(Curve([line["step"] for line in lines], smoothed(means, counts, max(window, 2)), colour, 1.6))
    note = "one curve for every tenth of the noise schedule"
    return Chart("Loss by timestep", note, tuple(curves), log=_wide(curves), ramp=("t = 0", "T"))


def _wide(curves: Sequence[Curve]) -> bool:
    """Whether values reach over more than one power of ten, and none is 0 or less."""
    values = [y for curve in curves if not curve.background for y in curve.y if y is not None]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def facts(records: Sequence[Record], recipe: Recipe) -> list[tuple[str, str]]:
    """The numbers of a run: name and value."""
    lines = [record for record in records if "event" not in record and "loss" in record]
    updates = f"{records[-1]['step'] if records else 0:,} of {recipe.run.steps:,}"
    rows = [("method", recipe.method.kind), ("updates", updates), ("batch", str(recipe.run.batch))]
    if ends := [y for y in _smooth(lines, "loss") if y is not None]:
        rows.append(("loss at the end", f"{ends[-1]:.3g}"))
    losses = [record["validation_loss"] for record in records if record.get("validation_loss") is not None]
    rows += [("validation loss", f"{loss:.3g}") for loss in losses[-1:]]
    if lines:
        rows.append(("time in updates", duration(sum(record.get("seconds") or 0.0 for record in lines))))
        rows.append(("updates skipped", str(lines[-1].get("skipped", 0))))
    return rows


def duration(seconds: float) -> str:
    """45 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600:,} h {whole % 3600 // 60} min"


def picture(records: Sequence[Record], samples: Samples, recipe: Recipe, theme: Theme = LIGHT) -> Image.Image:
    """The report on one page: name and numbers, charts, and pictures with a row a prompt and a column a step."""
    width = 3 * CHART[0] + 2 * GAP + 2 * MARGIN
    parts = [_head(records, recipe, theme, width), *_chart_rows(records, theme, width)]
    if samples.steps:
        parts.append(_sample_grid(samples, theme, width))
    page = Image.new("RGB", (width * SCALE, sum(part.height for part in parts) + MARGIN * SCALE), theme.paper)
    y = 0
    for part in parts:
        page.paste(part, (0, y))
        y += part.height
    return page


def _head(records: Sequence[Record], recipe: Recipe, theme: Theme, width: int) -> Image.Image:
    about = _wrapped(recipe.about, width - 2 * MARGIN, 15, 2)
    below = 82 + 22 * len(about)
    part = Image.new("RGB", (width * SCALE, (below + 70) * SCALE), theme.paper)
    pen = ImageDraw.Draw(part)
    _text(pen, MARGIN, 62, _wrapped(recipe.name, width - 2 * MARGIN, 34, 1)[0], theme.ink, 34)
    for i, line in enumerate(about):
        _text(pen, MARGIN, 88 + 22 * i, line, theme.faint, 15)
    x = MARGIN
    for name, value in facts(records, recipe):
        _text(pen, x, below + 22, value, theme.ink, 18)
        _text(pen, x, below + 41, name, theme.faint, 12)
        x += round(max(font(18 * SCALE).getlength(value), font(12 * SCALE).getlength(name)) / SCALE) + 36
    return part


def _chart_rows(records: Sequence[Record], theme: Theme, width: int) -> list[Image.Image]:
    drawn = [draw(chart, CHART, theme, SCALE) for chart in charts(records, theme)]
    rows = []
    for i in range(0, len(drawn), 3):
        row = Image.new("RGB", (width * SCALE, (CHART[1] + GAP) * SCALE), theme.paper)
        for k, chart in enumerate(drawn[i : i + 3]):
            row.paste(chart, ((MARGIN + k * (CHART[0] + GAP)) * SCALE, 0))
        rows.append(row)
    return rows


def _sample_grid(samples: Samples, theme: Theme, width: int) -> Image.Image:
    steps = chosen(samples.steps, COLUMNS_PNG)
    room = width - 2 * MARGIN - PROMPT
    cell = min(180, (room - GAP // 2 * (len(steps) - 1)) // len(steps))
    head, pitch = 76, cell + GAP // 2
    part = Image.new("RGB", (width * SCALE, (head + pitch * len(samples.prompts)) * SCALE), theme.paper)
    pen = ImageDraw.Draw(part)
    _text(pen, MARGIN, 38, _title(samples, steps), theme.ink, 20)
    _text(pen, MARGIN, 64, "after so many updates", theme.faint, 13)
    for column, step in enumerate(steps):
        x = MARGIN + PROMPT + column * pitch
        _text(pen, x + cell / 2, 64, f"{step:,}", theme.faint, 13, "ms")
        for row in range(len(samples.prompts)):
            if (step, row) in samples.files:
                image = _fitted(open_image(samples.files[step, row]), cell * SCALE, theme.panel)
                part.paste(image, (x * SCALE, (head + row * pitch) * SCALE))
    for row, prompt in enumerate(samples.prompts):
        lines = _wrapped(prompt, PROMPT - 20, 13, max(1, cell // 18))
        for i, line in enumerate(lines):
            y = head + row * pitch + cell / 2 + (i - (len(lines) - 1) / 2) * 18
            _text(pen, MARGIN, y, line, theme.ink, 13, "lm")
    return part


def _text(
    pen: ImageDraw.ImageDraw, x: float, y: float, words: str, colour: str, pixels: float, anchor: str = "ls"
) -> None:
    pen.text((x * SCALE, y * SCALE), words, colour, font(pixels * SCALE), anchor)


def _title(samples: Samples, steps: Sequence[int]) -> str:
    some = "" if len(steps) == len(samples.steps) else f" ({len(steps)} of {len(samples.steps)} validations)"
    return f"Samples by step{some}"


def _fitted(image: Image.Image, side: int, colour: str) -> Image.Image:
    """The picture as large as fits into a square, in its middle; the pixels of a smaller one stay sharp."""
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    cell = Image.new("RGB", (side, side), colour)
    scaled = image.resize((width, height), Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    cell.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return cell


def _wrapped(text: str, width: float, pixels: float, most: int) -> list[str]:
    """`text` in at most so many lines of `width` pixels, with an ellipsis where it is cut."""
    face = font(pixels * SCALE)
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < most:
        n = next((n for n in range(len(rest), 1, -1) if face.getlength(rest[:n]) <= width * SCALE), 1)
        if n < len(rest) and len(lines) == most - 1:
            lines.append(rest[: max(1, n - 3)].rstrip() + "...")
            break
        if n < len(rest) and " " in rest[: n + 1]:
            n = rest[: n + 1].rindex(" ")
        lines.append(rest[:n].strip())
        rest = rest[n:].strip()
    return lines


STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --panel: #f8fafc; --ink: #111827; --faint: #64748b; --grid: #e2e8f0; --accent: #c2410c }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0b1120; --panel: #131c2e; --ink: #f1f5f9; --faint: #94a3b8; --grid: #26334a; --accent: #fb923c }
}
* { box-sizing: border-box } main { max-width: 1360px; margin: 0 auto; padding: 28px 16px 64px }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 2rem; line-height: 1.2 } h2 { margin: 44px 0 14px; font-size: 1.25rem }
p { margin: 8px 0; max-width: 75ch } .faint, th, figcaption { color: var(--faint) }
dl { display: flex; flex-wrap: wrap; gap: 14px 36px; margin: 22px 0 }
dt { font-size: .8rem; color: var(--faint) } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
.facts div { display: flex; flex-direction: column-reverse }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 16px }
.charts img { width: 100%; height: auto; display: block; border-radius: 10px }
.strip { display: flex; gap: 8px; overflow-x: auto; padding-bottom: 8px; margin-bottom: 18px }
.strip figure { margin: 0; flex: 0 0 auto; width: 148px }
.strip img { width: 148px; height: auto; display: block; border-radius: 6px }
.strip img.small { image-rendering: pixelated } figcaption { font-size: .8rem; text-align: center }
table { border-collapse: collapse; font-size: .9rem } th { font-weight: 400 }
td, th { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--grid) }
summary { cursor: pointer; color: var(--accent); margin: 10px 0 }
code { font-size: .9em; background: var(--panel); padding: 1px 4px; border-radius: 4px }
"""


def html_page(records: Sequence[Record], samples: Samples, recipe: Recipe) -> str:
    """The report as one HTML file for narrow and wide screens, light and dark, without scripts, its pictures inside."""
    name, about = html.escape(recipe.name), html.escape(recipe.about)
    pairs = [(html.escape(key), html.escape(value)) for key, value in facts(records, recipe)]
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="faint">{about}</p>' if about else "",
        f'<dl class="facts">{"".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in pairs)}</dl>',
        f'<h2>Curves</h2><div class="charts">{_html_charts(records)}</div>',
        _html_samples(samples),
        _html_events(records),
        _html_recipe(recipe),
        _html_markdown(training_section(recipe)),
    ]
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<head>{meta}<title>{name}</title><style>{STYLE}</style></head>"
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en">\n{head}\n<body><main>\n{body}\n</main></body>\n</html>\n'


def _html_charts(records: Sequence[Record]) -> str:
    made = []
    for light, dark in zip(charts(records, LIGHT), charts(records, DARK), strict=True):
        day, night = (_data(draw(chart, CHART, theme, SCALE), "PNG") for chart, theme in ((light, LIGHT), (dark, DARK)))
        words = html.escape(f"{light.title}: {light.note}")
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{night}">'
        image = f'<img src="{day}" width="{CHART[0]}" height="{CHART[1]}" alt="{words}">'
        made.append(f"<picture>{source}{image}</picture>")
    return "".join(made)


def _html_samples(samples: Samples) -> str:
    if not samples.steps:
        return ""
    steps = chosen(samples.steps, COLUMNS_HTML)
    rows = [f"<h2>{_title(samples, steps)}</h2>"]
    for row, prompt in enumerate(samples.prompts):
        shown = [_html_sample(samples.files[step, row], step, prompt) for step in steps if (step, row) in samples.files]
        rows.append(f'<p>{html.escape(prompt)}</p><div class="strip">{"".join(shown)}</div>')
    return "".join(rows)


def _html_sample(path: Path, step: int, prompt: str) -> str:
    image = open_image(path)
    small = max(image.size) <= THUMBNAIL // 2  # as it is, its pixels visible
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    source, kind = (_data(image, "PNG"), ' class="small"') if small else (_data(image, "JPEG"), "")
    words = html.escape(f"{prompt}, after {step} updates")
    shown = f'<img src="{source}"{kind} width="{image.width}" height="{image.height}" alt="{words}">'
    return f"<figure>{shown}<figcaption>{step:,}</figcaption></figure>"


def _html_events(records: Sequence[Record]) -> str:
    """The events of the run but for saved states."""
    events = [record for record in records if record.get("event", "saved") != "saved"]
    if not events:
        return ""
    rows = []
    for record in events[:EVENTS]:
        rest = ", ".join(f"{key}: {value}" for key, value in record.items() if key not in ("step", "event"))
        cells = [f"{record['step']:,}", html.escape(str(record["event"])), html.escape(rest)]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    more = f'<p class="faint">{len(events) - EVENTS} more are in log.jsonl.</p>' if len(events) > EVENTS else ""
    return f"<h2>Events</h2><table><tr><th>update</th><th>what</th><th></th></tr>{''.join(rows)}</table>{more}"


def _html_recipe(recipe: Recipe) -> str:
    """The keys that differ from the defaults, and behind a fold every key."""

    def table(values: Mapping[str, Any]) -> str:
        rows = [(html.escape(key), html.escape(_shown(value))) for key, value in values.items()]
        return f"<table>{''.join(f'<tr><th>{key}</th><td>{value}</td></tr>' for key, value in rows)}</table>"

    keys, defaults = recipe.flat(), Recipe(recipe.name).flat()
    changed = {key: value for key, value in keys.items() if value != defaults[key]}
    return f"<h2>Recipe</h2>{table(changed)}<details><summary>every key</summary>{table(keys)}</details>"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ", ".join(_shown(each) for each in value) or "none"
    if is_dataclass(value):
        return " ".join(f"{each.name} {_shown(getattr(value, each.name))}" for each in fields(value))
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def _html_markdown(text: str) -> str:
    """HTML of the Markdown that `training_section` writes: headings, lists, bold, code and paragraphs."""
    made: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        while lines and lines[0].startswith("#"):
            made.append(f"<h2>{_html_inline(lines.pop(0).lstrip('# '))}</h2>")
        if lines and lines[0].startswith("- "):
            items = re.split(r"(?m)^- ", "\n".join(lines))[1:]
            made.append(f"<ul>{''.join(f'<li>{_html_inline(item)}</li>' for item in items)}</ul>")
        elif lines:
            made.append(f"<p>{_html_inline(' '.join(lines))}</p>")
    return "".join(made)


def _html_inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _data(image: Image.Image, kind: str) -> str:
    """A picture as a data: URI."""
    buffer = io.BytesIO()
    if kind == "PNG":
        image.save(buffer, "PNG")
    else:
        image.convert("RGB").save(buffer, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
