"""OpenVINO's side computes the same."""

from __future__ import annotations

import json

import pytest

from benchmarks import speed


@pytest.mark.slow  # tracing and compiling take half a minute
@pytest.mark.parametrize("family", ["sd1", "sdxl-base"])
def test_openvino_computes_the_same(family, tmp_path):
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    pytest.importorskip("openvino", reason="the comparison needs the extra 'bench'")
    out = tmp_path / "speed.json"
    assert (
        speed.main(
            [
                "--tiny",
                "--model",
                family,
                "--side",
                "ldm",
                "openvino",
                "--batch",
                "1",
                "2",
                "--sampler",
                "ddim:2",
                "--repeats=1",
                f"--out={out}",
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 * 2 * 4
    assert {row["status"] for row in found["rows"]} == {"same"}
    assert {each["what"] for each in found["growth"]} == {"batch"}
