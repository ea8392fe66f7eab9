"""The FLOPs of a cell, and the rate of a machine."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sides import cells
from benchmarks.timing import floors


@pytest.mark.parametrize(
    ("family", "size", "step", "decode"),
    [
        ("sd1", 512, 1.607, 2.515),
        ("sd2-v", 768, 4.298, 5.754),
        ("sdxl-base", 1024, 13.523, 10.470),
        ("ssd-1b", 1024, 8.416, 10.470),
    ],
)
def test_flops_are_those_of_the_published_networks(family, size, step, decode):
    """TFLOP of a guided step and of decoding, counted with diffusers' networks of the published configs."""
    config = cells.config_of(family)
    for stage, tera in (("step", step), ("decode", decode)):
        assert floors.flops(config, cells.Cell(stage, 1, size)) == pytest.approx(tera * 1e12, abs=1e9)
    whole = floors.flops(config, cells.Cell("picture", 1, size, "ddim", 20))
    assert whole == sum(
        n * floors.flops(config, cells.Cell(stage, 1, size)) for stage, n in (("step", 20), ("text", 1), ("decode", 1))
    )


def test_the_rate_of_a_machine_is_its_best(monkeypatch):
    sizes = []

    def operations(device, dtype, cells):
        sizes.append((dtype, cells))
        return [(name, name, cells * count) for name, count in (("product", 3), ("convolution", 5))]

    monkeypatch.setattr(floors, "_operations", operations)
    monkeypatch.setattr(floors, "_best", lambda call, device: 0.125 if sizes[-1][0] == torch.float32 else 1.0)
    found = floors.peak("cpu", torch.bfloat16)
    assert found == {
        "rates": {
            "float32": {"product": 64 * 3 * 8, "convolution": 64 * 5 * 8},
            "bfloat16": {"product": 8 * 3, "convolution": 8 * 5},
        },
        "best": 64 * 5 * 8,
    }
    assert len(sizes) == 4 + 1  # what is slow already is not made larger


def test_the_operations_whose_rate_is_measured_have_the_flops_that_are_said():
    for _, call, count in floors._operations("meta", torch.float32, 8):
        assert floors._counted(call) == count
