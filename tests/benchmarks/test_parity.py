"""The command that compares with golden outputs and peers: a row for every output, and that it can say no."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import parity
from benchmarks.models.seeded import golden
from benchmarks.sides import cells
from tests.made.checkpoints import TINY

INPUTS = {"x_T", "cond", "uncond", "ids_pad_eot", "ids_pad0", "sdxl/sizes", "ssd-1b-tiny/time_ids"}


def test_parity_has_a_row_for_every_golden_output(tmp_path, capsys):
    assert parity.main(["--out", str(tmp_path / "parity.json")]) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    rows = found["rows"]
    assert all(row["ok"] for row in rows)
    samplers = {row["name"] for row in rows if row["kind"] in ("sampler", "grid")}
    assert samplers == set(golden("samplers")) - INPUTS
    assert len(rows) - len(samplers) == 1 + sum(
        len(set(golden(file)) - INPUTS) for file in ("unet", "vae", "text", "vision", "dpt")
    )  # 1: the tokens
    assert sum(row["exact"].endswith("timesteps") for row in rows) > 10
    printed = capsys.readouterr().out
    assert all(row["name"] in printed for row in rows)
    assert f"{len(rows)} outputs, 0 beyond the limit" in printed


def test_parity_says_no_to_what_is_too_far_or_not_equal(monkeypatch, capsys):
    ones = torch.ones(2, 3)
    nudged = ones.clone()
    nudged[0, 0] += 2e-5
    assert parity.compared("unet", "same", ones, ones).ok
    assert not parity.compared("unet", "one element off", nudged, ones).ok
    assert parity.compared("sampler", "one element off, the rest not", nudged, ones, elementwise=False).ok
    assert not parity.compared("unet", "NaN", ones * torch.nan, ones).ok
    assert parity.compared("sampler", "equal", ones, ones, parity.equal([1, 2], [1, 2], "timesteps")).ok
    assert not parity.compared("sampler", "another", ones, ones, parity.equal([1, 3], [1, 2], "timesteps")).ok
    assert not parity.compared("sampler", "one more", ones, ones, parity.equal([1, 2, 3], [1, 2], "timesteps")).ok
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        parity.compared("unet", "another shape", ones[:1], ones)
    monkeypatch.setattr(parity, "golden_rows", lambda: iter([parity.compared("unet", "one element off", nudged, ones)]))
    assert parity.main([]) == 1
    assert "FAR" in capsys.readouterr().out


@pytest.mark.parametrize("config", [TINY, cells.config_of("sd1", tiny=True)], ids=["two levels", "four levels"])
def test_the_networks_agree_with_diffusers_and_transformers(config):
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    rows = list(parity.peer_rows(config, cells=8))
    assert len(rows) == 4
    for row in rows:
        assert row.ok, row
