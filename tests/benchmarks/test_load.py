"""The command that times loading, on a tiny model."""

from __future__ import annotations

import json

import torch

from benchmarks import load


def test_loading_is_timed_beside_others_with_every_tensor_read(tmp_path, capsys):
    assert (
        load.main(["--tiny", "--repeats", "1", "--row", "single", "--cold", "--out", str(tmp_path / "load.json")]) == 0
    )
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert [(row["side"], row["cold"]) for row in rows] == [("raw", True), ("ldm", True)]
    assert all(0 < row["returned"] <= row["read"] and row["peak"] > row["bytes"] > 1e6 for row in rows)
    assert "of raw (" in capsys.readouterr().out


def test_every_form_can_be_loaded_and_converted_by_the_benchmark(tmp_path):
    forms = load.prepare(tmp_path, "sd1", torch.float16, tiny=True)
    sizes = {
        row: load.one("ldm", row, forms[row.split(" ")[0]], forms["folder"], cold=False)["bytes"]
        for row in (*load.LOADS, *load.CONVERSIONS)
    }
    assert len({sizes[row] for row in load.LOADS}) == 1
    assert all(size >= sizes["single"] for size in sizes.values())


def test_a_ratio_says_whether_it_is_what_it_should_be():
    row = {"row": "single", "read": 1.0}
    assert load._against(row, "raw", 0.95) == "1.05 of raw (<= 1.1)"
    assert load._against(row, "diffusers", 1.9) == "0.53 of diffusers (not <= 0.5)"
