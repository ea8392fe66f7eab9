"""The log of a run: its files, what a resumed run keeps of them, and other writers."""

import csv
import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm.errors import ArgumentError, FileError, OutputError
from ldm.train.recipe import Watch
from ldm.train.watch.log import BANDS, COLUMNS, Log, read_log

BANDED = {"bands": [*(0.5 + i for i in range(BANDS - 1)), None], "band_counts": [*[2] * (BANDS - 1), 0]}


def record(step: int, **more) -> dict:
    return (
        {
            "step": step,
            "loss": 1 / step,
            "lr": 1e-4,
            "grad_norm": 0.5,
            "examples_per_second": 8.0,
            "skipped": 0,
            "seconds": 1.5,
        }
        | BANDED
        | more
    )


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "log.csv").read_text())))


def test_every_record_is_a_line_of_json_and_a_row_of_numbers(tmp_path):
    with Log(tmp_path, 20, Watch(), "run") as log:
        log.write(record(10))
        log.event({"step": 12, "event": "skipped", "why": "the loss is nan"})
        log.write({"step": 20, "validation_loss": 0.25, "validation_levels": [[500, 0.25]]})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [
        record(10),
        {"step": 12, "event": "skipped", "why": "the loss is nan"},
        {"step": 20, "validation_loss": 0.25, "validation_levels": [[500, 0.25]]},
    ]
    first, second = rows(tmp_path)
    assert tuple(first) == COLUMNS
    assert (first["step"], first["loss"], first["band_0"], first["count_0"], first["band_9"], first["count_9"]) == (
        "10",
        "0.1",
        "0.5",
        "2",
        "",
        "0",
    )
    assert (second["step"], second["loss"], second["validation_loss"]) == ("20", "", "0.25")


def test_what_is_written_can_be_read_while_the_run_goes(tmp_path):
    with Log(tmp_path, 20, Watch(), "run") as log:
        log.write(record(10))
        assert [line["step"] for line in read_log(tmp_path)] == [10]
        assert len(rows(tmp_path)) == 1


def test_a_number_that_json_does_not_know_is_null_and_an_empty_cell(tmp_path):
    with Log(tmp_path, 20, Watch(), "run") as log:
        log.write(record(10, loss=math.nan, grad_norm=math.inf, bands=[math.nan] * BANDS))
    (line,) = read_log(tmp_path)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["bands"] == [None] * BANDS
    assert [rows(tmp_path)[0][key] for key in ("loss", "grad_norm", "band_0", "count_0")] == ["", "", "", "2"]


def test_a_resumed_run_takes_up_both_files_where_its_state_was_saved(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with Log(straight, 40, Watch(), "run") as log:
        log.event({"step": 5, "event": "skipped"})
        for step in (10, 20, 30, 40):
            log.write(record(step))
    with Log(killed, 40, Watch(), "run") as log:
        log.event({"step": 5, "event": "skipped"})
        for step in (10, 20, 30):
            log.write(record(step))
        log.event({"step": 31, "event": "skipped"})
    with open(killed / "log.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # where kill -9 came
    with open(killed / "log.csv", "a") as file:
        file.write("40,0.")
    with Log(killed, 40, Watch(), "run", done=20) as log:
        for step in (30, 40):
            log.write(record(step))
    assert {file.name for file in killed.iterdir()} == {"log.jsonl", "log.csv"}
    for file in ("log.jsonl", "log.csv"):
        assert (killed / file).read_bytes() == (straight / file).read_bytes()


def test_a_run_from_the_beginning_begins_the_log_anew(tmp_path):
    for loss in (1.0, 2.0):
        with Log(tmp_path, 10, Watch(), "run") as log:
            log.write({"step": 0, "validation_loss": loss})
            log.write(record(10, loss=loss))
    assert [line.get("loss", line.get("validation_loss")) for line in read_log(tmp_path)] == [2.0, 2.0]


def test_no_name_of_a_picture_can_end_a_line(tmp_path):
    with Log(tmp_path, 10, Watch(), "run") as log:
        log.event({"step": 1, "event": "bad picture", "id": "a\u2028b\n\udcff.png"})
    assert read_log(tmp_path)[0]["id"] == "a\u2028b\n\udcff.png"


def test_a_line_that_no_run_wrote_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[1]\n{"step": 3}\n')
    with pytest.raises(FileError, match=r"log\.jsonl: line 2 is not a record of a run; take it out"):
        Log(tmp_path, 10, Watch(), "run", done=5)
    assert read_log(tmp_path / "nothing here") == []


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "run" / "log.csv").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"log\.csv: could not be written: \w.+; free space, or choose another"):
        Log(tmp_path / "run", 10, Watch(), "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"the log cannot be written \(.+\); free space, or choose another directory"):
        Log(tmp_path / "file", 10, Watch(), "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("file", ["log.jsonl", "log.csv"])
def test_a_full_disk_is_an_error_that_says_how_to_go_on(tmp_path, file):
    log = Log(tmp_path, 10, Watch(), "run")
    which = ["log.jsonl", "log.csv"].index(file)
    log._files[which].close()
    log._files[which] = open("/dev/full", "a")  # noqa: SIM115 (it can be neither flushed nor closed)
    with pytest.raises(
        OutputError, match=r"could not be written \(No space left on device\); free space and start again"
    ):
        log.write(record(1))


# --- TensorBoard and W&B ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_what_is_asked_for_and_not_installed_is_named_before_a_file_is_touched(tmp_path, monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ArgumentError, match=rf"{package}: it is not installed; 'pip install {package}', or set watch.{package} = false"
    ):
        Log(tmp_path / "out", 10, Watch(**{package: True}), "run")
    assert not (tmp_path / "out").exists()


def test_neither_is_imported_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Log(tmp_path, 10, Watch(), "run") as log:
        log.write(record(1))


def test_tensorboard_gets_every_number_at_its_step(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int):
            calls.append((log_dir, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, value, step))

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    with Log(tmp_path, 10, Watch(tensorboard=True), "run", done=4) as log:
        log.write({"step": 5, "loss": 0.5, "lr": math.nan} | BANDED)
        log.event({"step": 6, "event": "skipped"})
    assert calls == [
        (str(tmp_path / "tensorboard"), 5),
        ("loss", 0.5, 5),
        *((f"band_{i}", 0.5 + i, 5) for i in range(BANDS - 1)),
        "closed",
    ]


def test_wandb_gets_every_number_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    calls, opened = [], []

    def init(**settings):
        opened.append(settings)
        return SimpleNamespace(
            log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for done in (0, 1, 0):
        with Log(tmp_path, 10, Watch(wandb=True), "run", done=done) as log:
            log.write({"step": done + 1, "loss": 0.5})
    assert calls == [(1, {"loss": 0.5}), "finished", (2, {"loss": 0.5}), "finished", (1, {"loss": 0.5}), "finished"]
    first, resumed, another = (settings.pop("id") for settings in opened)
    assert first == resumed != another
    assert opened[0] == {"project": "ldm", "name": "run", "dir": str(tmp_path), "resume": "allow"}


# --- the bar ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar_with_loss_rate_and_what_happens(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Log(tmp_path, 40, Watch(), "sygil", done=10) as log:
        log.tick(11)
        log.write(record(20, loss=0.125))
        log.event({"step": 21, "event": "bad picture", "id": "a\x1b[2J.png"})
        log.tick(40)
    seen = screen.getvalue()
    assert "sygil" in seen
    assert "10/40" in seen
    assert "40/40" in seen
    assert "updates/s, loss=0.125, lr=0.0001" in seen
    assert "update 21: bad picture: id a\\u001b[2J.png" in seen


def test_nobody_sees_a_bar_where_there_is_no_terminal(tmp_path, capfd):
    with Log(tmp_path, 40, Watch(), "run") as log:
        log.write(record(20))
        log.event({"step": 21, "event": "saved"})
        log.tick(30)
    assert capfd.readouterr() == ("", "")
