"""Rows: what is the same, what is void, what has a ratio."""

from __future__ import annotations

import torch

from benchmarks.sides import cells
from benchmarks.timing import rows


def test_a_side_that_computes_something_else_is_void():
    out, other = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.0001])

    def status(found, reference, dtype="float32"):
        return {side: each["status"] for side, each in rows.check(found, reference, dtype).items()}

    assert status({"fast": out, "diffusers": out}, out) == {"fast": "same", "diffusers": "same"}
    assert status({"fast": other, "diffusers": out}, out) == {"fast": "void", "diffusers": "same"}
    assert status({"fast": out, "diffusers": other}, out) == {"fast": "same", "diffusers": "void"}
    assert status({"fast": out * torch.inf}, out) == {"fast": "void"}
    assert status({"fast": out}, None) == {"fast": "not compared"}
    half = {"diffusers": (out * 0.99).bfloat16()}
    assert status({**half, "fast": (out * 1.01).bfloat16()}, out, "bfloat16") == {"fast": "same", "diffusers": "same"}
    assert status({**half, "fast": (out * 1.05).bfloat16()}, out, "bfloat16") == {"fast": "void", "diffusers": "same"}
    assert status({"fast": out.bfloat16()}, out, "bfloat16") == {"fast": "not compared"}
    picture = torch.full((1, 8, 8, 3), 100, dtype=torch.uint8)
    rounded = picture.clone()
    rounded[0, 0, 0, 0] += 1
    assert status({"fast": rounded}, picture) == {"fast": "same"}
    assert status({"fast": picture + 1}, picture) == {"fast": "void"}


def test_a_void_row_has_times_but_no_ratio():
    job = cells.Job("ldm", "sd1", True, "", "", "float32", "cpu", None)
    entry = {"first": 3.0, "cold": None, "peak": 1, "device_peak": None}
    found = {
        side: {**entry, "seconds": [seconds] * 3, "output": torch.ones(4)}
        for side, seconds in (("ldm", 1.0), ("fast", 0.5), ("diffusers", 2.0))
    }
    cell = cells.Cell("step", 1, 64)

    def ratios():
        return {
            row["side"]: (row["status"], row["ratio"]) for row in rows.finished(job, cell, found, None, 1e9, "in turn")
        }

    assert ratios() == {"ldm": ("same", 2.0), "fast": ("same", 4.0), "diffusers": ("same", 1.0)}
    found["fast"]["output"] = torch.full((4,), 1.1)
    assert ratios() == {"ldm": ("same", 2.0), "fast": ("void", None), "diffusers": ("same", 1.0)}
    found["diffusers"]["output"] = torch.full((4,), 1.1)
    assert ratios() == {"ldm": ("same", None), "fast": ("void", None), "diffusers": ("void", None)}
    found["openvino"] = {"failed": "no memory"}
    assert ratios()["openvino"] == ("failed", None)


def test_growth_is_shown_beside_that_of_the_flops():
    row = {
        "model": "sdxl-base",
        "dtype": "float32",
        "side": "fast",
        "stage": "step",
        "sampler": "",
        "steps": 0,
        "batch": 1,
        "size": 512,
        "status": "same",
    }
    found = rows.growth(
        [
            {**row, "seconds": {"median": 2.0}, "flops": 10},
            {**row, "seconds": {"median": 5.0}, "flops": 30, "size": 1024},
            {**row, "seconds": {"median": 3.0}, "flops": 20, "batch": 2},
            {**row, "seconds": {"median": 1.0}, "flops": 5, "model": "ssd-1b"},
            {**row, "seconds": {"median": 9.0}, "flops": 99, "size": 2048, "status": "void"},
        ]
    )
    assert [(each["what"], each["from"], each["to"], each["times"], each["flops"]) for each in found] == [
        ("size", 512, 1024, 2.5, 3.0), ("batch", 1, 2, 1.5, 2.0), ("model", "ssd-1b", "sdxl-base", 2.0, 2.0),
    ]  # fmt: skip


def test_a_diffusers_that_gives_nan_voids_itself_alone():
    good = torch.ones(1, 4, 8, 8)
    found = rows.check({"diffusers": good * float("nan"), "fast": good}, good, "bfloat16")
    assert [found[side]["status"] for side in ("diffusers", "fast")] == ["void", "not compared"]
    assert found["diffusers"]["error"] is None
