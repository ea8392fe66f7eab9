"""Sides that are missing, fail, or do not fit into memory together."""

from __future__ import annotations

from benchmarks import machine
from benchmarks.sides import cells, process
from benchmarks.timing import rounds


def test_where_no_side_can_be_measured_every_row_says_so_once(monkeypatch):
    job, cell = cells.Job("ldm", "sd1", True, "", "", "float32", "cpu", 1), cells.Cell("step", 1, 64)
    monkeypatch.setattr(rounds, "missing", lambda side, device: "not here")
    found = [*rounds.rows_of(job, ["openvino", "sdcpp"], [cell], 1, 1e11, [])]
    assert [(row["side"], row["status"], row["why"]) for row in found] == [
        ("openvino", "absent", "not here"),
        ("sdcpp", "absent", "not here"),
    ]


def test_without_a_reference_half_precision_is_not_compared(monkeypatch):
    def failing(job):
        return process.SideFailed("no memory")

    monkeypatch.setattr(rounds, "attempted", failing)
    job = cells.Job("fast", "sd1", True, "", "", "bfloat16", "cpu", 1)
    assert rounds.references(job, [cells.Cell("step", 1, 64)]) == {}


def test_sides_that_do_not_fit_into_memory_are_measured_one_after_the_other(monkeypatch):
    job, cell = cells.Job("ldm", "sdxl-base", False, "", "", "float32", "cpu", None), cells.Cell("step", 1, 1024)
    for gigabytes, together, large in ((100, True, set()), (36, False, set()), (24, True, {"openvino"})):
        monkeypatch.setattr(machine, "available", lambda gigabytes=gigabytes: gigabytes * 1e9)
        found = rounds.fitting(job, ["ldm", "openvino"], [cell])
        assert (found[0], set(found[1])) == (together, large)
    assert found[1]["openvino"] == "needs about 33.0 GB where 24.0 are free"
