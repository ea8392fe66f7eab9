"""The log of a run: lines in files, a bar on a terminal, TensorBoard and W&B where the recipe asks for them."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import FileError, OutputError, printable
from ldm.targets import write_text
from ldm.train.recipe import Watch, wrong_key

BANDS = 10  # equal parts of the noise schedule, the least noisy first
VALUES = ("loss", "lr", "grad_norm", "examples_per_second", "skipped", "seconds", "validation_loss")
COLUMNS = ("step", *VALUES, *(f"band_{i}" for i in range(BANDS)), *(f"count_{i}" for i in range(BANDS)))

Record = Mapping[str, Any]
Writer = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]  # logs values by name with their step; ends


class Log:
    """The log of one run, used by `with`.

    out    directory of log.jsonl (everything), log.csv (what are numbers), tensorboard/ and wandb/; it is made
    steps  updates in all
    done   updates that a resumed run has done: lines of later ones are cut, for they will be logged again
    Raises ArgumentError where TensorBoard or W&B are asked for and not installed, FileError where log.jsonl is no log,
    OutputError where nothing can be written.
    """

    def __init__(self, out: Path, steps: int, watch: Watch, name: str, *, done: int = 0):
        modules = writers(watch)  # before a file is touched
        try:
            out.mkdir(parents=True, exist_ok=True)
            lines = [record for record in read_log(out) if record["step"] <= done] if done else []
            write_text(out / "log.jsonl", "".join(_line(record) for record in lines))
            write_text(out / "log.csv", _csv([COLUMNS, *(_row(record) for record in lines if "event" not in record)]))
            names = ("log.jsonl", "log.csv")
            self._files = [(out / file).open("a", encoding="utf-8") for file in names]  # closed by __exit__
        except OutputError:  # names the file, and why
            raise
        except OSError as error:
            what = f"the log cannot be written ({error.strerror}); free space, or choose another directory"
            raise OutputError(what, path=out) from error
        self._writers = [start(module, out, name, done) for module, start in modules]
        self._bar = _bar(name, steps, done)

    def write(self, record: Record) -> None:
        """Log numbers: "step" (updates done), any of `VALUES`, "bands" (`BANDS` mean losses, or None), "band_counts".

        NaN and infinity are null in log.jsonl and empty in log.csv. Other keys go to log.jsonl alone.
        """
        self._append(0, _line(record))
        self._append(1, _csv([_row(record)]))
        values = _values(record)
        for write, _ in self._writers:
            write(values, record["step"])
        if self._bar is not None:
            shown = {key: f"{record[key]:.3g}" for key in ("loss", "lr") if record.get(key) is not None}
            self._bar.set_postfix(shown, refresh=False)
            self.tick(record["step"])

    def event(self, record: Record) -> None:
        """Log an event: {"step": ..., "event": "skipped" | "bad picture" | "saved" | ..., and its details}."""
        self._append(0, _line(record))
        if self._bar is not None:
            rest = ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("step", "event"))
            text = f"update {record['step']}: {record['event']}{': ' if rest else ''}{rest}"
            self._bar.write(printable(text), file=sys.stderr)

    def tick(self, step: int) -> None:
        """Move the bar: `step` updates are done. Costs nothing worth counting, so call it after every update."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()
        for _, end in self._writers:
            end()
        if self._bar is not None:
            self._bar.close()

    def _append(self, which: int, text: str) -> None:
        file = self._files[which]
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            what = f"could not be written ({error.strerror}); free space and start again: the run is resumed"
            raise OutputError(what, path=file.name) from error


def read_log(out: Path) -> list[dict[str, Any]]:
    """All records of log.jsonl in a run's directory, oldest first; none where there is no file.

    A last line that a crash cut off is left out. Raises FileError for any other line that is not a record.
    """
    path = out / "log.jsonl"
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            whole = isinstance(record, dict) and isinstance(record.get("step"), int)
        except ValueError:
            whole = False
        if whole:
            records.append(record)
        elif number < len(lines):
            raise FileError(f"line {number} is not a record of a run; take it out, or move the file away", path=path)
    return records


def _line(record: Record) -> str:
    return json.dumps(_finite(dict(record)), allow_nan=False) + "\n"  # in ASCII: no name of a file can end a line


def _finite(value: Any) -> Any:
    """`value` with None for every number in it that JSON has no way to write."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _values(record: Record) -> dict[str, float]:
    """The finite numbers of a record by their columns' names."""
    flat = {key: record.get(key) for key in VALUES}
    flat |= {f"band_{i}": mean for i, mean in enumerate(record.get("bands", ()))}
    return {key: value for key, value in flat.items() if value is not None and math.isfinite(value)}


def _row(record: Record) -> list[Any]:
    counts = {f"count_{i}": count for i, count in enumerate(record.get("band_counts", ()))}
    values = {"step": record["step"]} | _values(record) | counts
    return [values.get(column, "") for column in COLUMNS]


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _bar(name: str, steps: int, done: int) -> Any:
    """A progress bar with the rate and the time left, if stderr is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(desc=name, total=steps, initial=done, unit=" updates", file=sys.stderr, dynamic_ncols=True)


def writers(watch: Watch) -> list[tuple[Any, Callable[..., Writer]]]:
    """The modules that `watch` asks for, each with its opening function. Raises ArgumentError for one not installed."""
    asked = [("tensorboard", _tensorboard)] * watch.tensorboard + [("wandb", _wandb)] * watch.wandb
    return [(_installed(package), start) for package, start in asked]


def _installed(package: str) -> Any:
    try:
        if package == "wandb":
            import wandb

            return wandb
        from torch.utils import tensorboard

        return tensorboard
    except ImportError:
        what = f"it is not installed; 'pip install {package}', or set watch.{package} = false"
        raise wrong_key(package, what) from None


def _tensorboard(module: Any, out: Path, name: str, done: int) -> Writer:
    """Curves in `out`/tensorboard; points that a resumed run will log again are hidden."""
    board = module.SummaryWriter(log_dir=str(out / "tensorboard"), purge_step=done + 1)

    def write(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            board.add_scalar(key, value, step)

    return write, board.close


def _wandb(module: Any, out: Path, name: str, done: int) -> Writer:
    """A run of project "ldm"; a resumed run goes on as itself, and W&B leaves out the steps that it has already."""
    known = out / "wandb.id"
    if not (done and known.exists()):
        write_text(known, uuid.uuid4().hex[:8])
    run = module.init(project="ldm", name=name, dir=str(out), id=known.read_text(encoding="utf-8"), resume="allow")
    return lambda values, step: run.log(values, step=step), run.finish
