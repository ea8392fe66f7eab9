"""The command that times training steps, on tiny networks: who takes turns, and that rows can say no."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import product

import pytest

from benchmarks import machine, train
from benchmarks.models import peers
from benchmarks.sides import process, training
from benchmarks.sides.training import Job

SAYS = """
import json, sys
job = json.loads(sys.argv[1])
if job["rate"] < 0:
    print(json.dumps({"failed": "no weights"}), flush=True)
    raise SystemExit
memory = {"between": 1, "peak": 2, "device_peak": None}
print(json.dumps({"seconds": 1, "trained": 5, **memory}), flush=True)
for i, _ in enumerate(sys.stdin):
    open(job["folder"], "a").write(job["side"][0])
    if (job["side"], job["rate"]) == ("diffusers", i):
        raise SystemExit("/some/where/file.py: no more")
    print(json.dumps({"seconds": i + 1.0, "loss": 1.0, "grad_norm": 1.0, **memory}), flush=True)
"""


@pytest.mark.slow  # twelve processes, a minute or two
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_case_is_the_same_on_both_sides(with_peers, tmp_path, dtype):
    out = tmp_path / "train.json"
    assert train.main(["--tiny", "--repeats=1", "--threads=1", f"--dtype={dtype}", f"--out={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["checkpointing"], row["side"], row["status"]) for row in rows] == [
        (*each, "same") for each in product(train.CASES, (False, True), training.SIDES)
    ]
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["ratio"] == pytest.approx(theirs["seconds"]["median"] / ours["seconds"]["median"])
        assert ours["memory"] == pytest.approx(ours["peak"] / theirs["peak"])


def test_one_side_in_its_own_process_has_a_row(tmp_path, capsys):
    out = tmp_path / "train.json"
    assert (
        train.main(
            [
                "--tiny",
                "--case=sd1-lora",
                "--checkpointing=on",
                "--side=ldm",
                "--repeats=1",
                "--threads=1",
                f"--out={out}",
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert (row["status"], row["why"]) == ("not compared", "no update of diffusers")
    assert row["ratio"] is row["memory"] is row["device_peak"] is None
    assert row["seconds"]["median"] > 0
    assert row["repeats"] == 1
    assert len(row["losses"]) == len(row["grad_norms"]) == 2
    assert 0 < row["between"] <= row["peak"]
    assert row["load"]["peak"] > 0
    assert found["machine"]["threads"] == found["settings"]["threads"] == 1
    assert "sd1-lora, 64, checkpointing" in capsys.readouterr().out


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Measure sides that write down their turns; diffusers' ends at its `until`th update."""
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    monkeypatch.setattr(process, "command", lambda module, job: [sys.executable, str(script), json.dumps(asdict(job))])

    def measure(until=100):
        log = tmp_path / f"turns-{until}"
        jobs = {
            side: Job(side, "sd1", True, "lora", False, 64, 1, until, str(log), "float32", "cpu", None)
            for side in ("ldm", "diffusers")
        }
        found, how = train.measured(jobs, 2)
        return found, how, log.read_text() if log.exists() else ""

    return measure


def test_sides_take_turns_where_they_fit_into_memory(asked, monkeypatch):
    found, how, order = asked()
    assert (how, order) == ("in turn", "ldldld")
    ours, theirs = train.rows_of(
        "sd1-lora", Job("ldm", "sd1", True, "lora", False, 64, 1, 0.0, "", "float32", "cpu", None), found, how
    )
    assert ours["seconds"] == {"median": 2.5, "p10": 2.1, "p90": 2.9}  # of 2 and 3: the first is told alone
    assert ours["first"] == 1.0
    assert (ours["status"], ours["ratio"], ours["memory"], theirs["ratio"]) == ("same", 1.0, 1.0, 1.0)
    monkeypatch.setattr(train, "fitting", lambda jobs: (False, {}))
    assert asked(50)[1:] == ("one side after the other: together they do not fit into memory", "lllddd")
    monkeypatch.setattr(train, "fitting", lambda jobs: (True, {"ldm": "too large"}))
    found, _, order = asked(60)
    assert (found["ldm"], order) == ({"why": "too large"}, "ddd")


def test_a_side_that_ends_has_a_row_that_says_so_and_the_other_goes_on(asked):
    found, how, order = asked(1)
    assert order == "ldldl"
    assert found["diffusers"] == {"failed": "its process ended with status 1: file.py: no more"}
    ours, theirs = train.rows_of(
        "sd1-lora", Job("ldm", "sd1", True, "lora", False, 64, 1, 0.0, "", "float32", "cpu", None), found, how
    )
    assert (ours["status"], ours["why"], ours["ratio"]) == ("not compared", "no update of diffusers", None)
    assert (theirs["status"], theirs["seconds"]) == ("failed", None)


def test_sides_that_cannot_begin_have_rows_that_say_so(asked):
    assert asked(-1)[0] == {side: {"failed": "no weights"} for side in ("ldm", "diffusers")}


def test_sides_that_do_not_do_the_same_are_void():
    def status(loss=1.0, norm=1.0, trained=5, dtype="float32", theirs=(1.0, 1.0)):
        sides = (("ldm", loss, norm, trained), ("diffusers", *theirs, 5))
        return train.compared(
            {side: {"load": {"trained": n}, "updates": [{"loss": a, "grad_norm": b}]} for side, a, b, n in sides}, dtype
        )

    assert status(1.00009, 1.0009)["status"] == "same"
    assert status(1.00011)["why"] == "loss: 1.00011 and 1"
    assert status(norm=1.0011)["why"] == "grad_norm: 1.0011 and 1"
    assert status(trained=6)["why"] == "ldm trains 6 numbers, diffusers 5"
    assert status(float("nan"))["why"] == "no update with a finite loss and gradient"
    assert {status(*each)["status"] for each in ((1.00011,), (1.0, 1.0011), (1.0, 1.0, 6), (float("nan"),))} == {"void"}
    assert status(1.01, 1.1, dtype="bfloat16")["status"] == "same"
    assert status(1.02, dtype="bfloat16")["status"] == status(1.01, dtype="float16")["status"] == "void"


def test_updates_that_the_scaler_leaves_out_are_not_compared():
    skipped, good = {"loss": 1.0, "grad_norm": float("inf")}, {"loss": 2.0, "grad_norm": 3.0}
    found = {
        side: {"load": {"trained": 5}, "updates": updates}
        for side, updates in (("ldm", [{"loss": None, "grad_norm": None}, good]), ("diffusers", [skipped, good]))
    }
    assert train.compared(found, "float16") == {"status": "same", "why": None, "error": {"loss": 0.0, "grad_norm": 0.0}}


def test_sides_that_do_not_fit_into_memory_together_are_seen_before(monkeypatch):
    def fits(name, size, gigabytes, *, checkpointing=False):
        monkeypatch.setattr(machine, "available", lambda: gigabytes * 1e9)
        case = train.CASES[name]
        jobs = {
            side: Job(
                side, case.family, False, case.method, checkpointing, size, 1, case.rate, "", "float32", "cpu", None
            )
            for side in training.SIDES
        }
        together, large = train.fitting(jobs)
        return together, sorted(large)

    assert fits("sd1-full", 256, 22) == (False, [])
    assert fits("sd1-full", 512, 20) == (True, ["diffusers", "ldm"])
    assert fits("sd1-full", 512, 20, checkpointing=True) == (False, [])
    assert fits("sdxl-lora", 256, 22) == (True, [])
    assert fits("sdxl-lora", 1024, 22) == (True, ["diffusers", "ldm"])


def test_a_void_or_failed_row_is_an_exit_status(monkeypatch, capsys):
    row = {"case": "sd1-lora", "size": 64, "checkpointing": True, "side": "ldm", "seconds": None, "why": "it fell over"}
    monkeypatch.setattr(train, "write_folder", lambda *_: None)
    monkeypatch.setattr(train, "measured", lambda *_: ({}, "in turn"))
    for status, code in (("failed", 1), ("void", 1), ("absent", 0)):
        monkeypatch.setattr(train, "rows_of", lambda *_, status=status: iter([{**row, "status": status}]))
        assert train.main(["--tiny", "--side=ldm"]) == code
        assert f"{status}: it fell over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--size=100"], "--size 100: give a multiple of 64"),
        (["--repeats=0"], "--repeats 0: give 1"),
        (["--batch=0"], "--batch 0: give 1"),
        (["--device=tpu"], "--device tpu: give cpu, cuda or cuda:N"),
        (["--dtype=float16"], "--dtype float16: diffusers does not train in it on a CPU"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(given, said, capsys):
    with pytest.raises(SystemExit) as left:
        train.main(given)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_quick_is_small_unless_more_is_asked_for():
    assert (train.arguments(["--quick"]).size, train.arguments(["--quick"]).repeats) == (256, 2)
    assert (train.arguments(["--quick", "--size=512"]).size, train.arguments([]).repeats) == (512, 5)


def test_without_diffusers_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        train.main(["--tiny"])
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith("pip install '.[bench]'\n")
