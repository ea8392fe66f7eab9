"""The sides draw the same pictures, and say where they cannot be measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import peers
from benchmarks.sides import all as sides
from benchmarks.sides import cells
from benchmarks.timing import rows


def test_openvino_has_no_rows_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sides.importlib.util, "find_spec", lambda name: object())
    assert sides.missing("openvino", "cuda") == "OpenVINO does not run on cuda"
    assert sides.missing("openvino", "cpu") is None


@pytest.mark.parametrize("family", cells.MODELS)
def test_every_family_is_the_same_on_all_sides(family, tmp_path):
    """Both pictures of every family, from one folder of weights: samplers, scheduler, sizes, both text towers."""
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    config = cells.config_of(family, tiny=True)
    peers.write_folder(config, tmp_path / "folder", torch.float32)
    outputs = {}
    for side in ("ldm", "diffusers"):
        make = sides.SIDES[side](cells.Job(side, family, True, str(tmp_path / "folder"), "", "float32", "cpu", None))
        with torch.no_grad():
            outputs[side] = [
                make(cells.Cell("picture", 2, 64, *sampler))()
                for sampler in (("ddim", 3), ("dpmpp_2m", 3), ("dpmpp_2m", 16))
            ]
    for ours, theirs in zip(*outputs.values(), strict=True):
        assert ours.shape == (2, 64, 64, 3)
        assert not torch.equal(ours[0], ours[1])
        assert rows.check({"diffusers": theirs}, ours, "float32")["diffusers"]["status"] == "same"
