"""The benchmarks' commands on tiny networks: what they print and write, and that they can say no."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from benchmarks import load, machine, parity, peers, speed
from ldm.config import FAMILIES
from ldm.model import LatentDiffusion
from tests.checkpoints import TINY
from tests.networks import golden

INPUTS = {"x_T", "cond", "uncond", "ids_pad_eot", "ids_pad0", "sdxl/sizes", "ssd-1b-tiny/time_ids"}


@pytest.fixture
def no_diffusers(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)


def test_parity_has_a_row_for_every_golden_output(tmp_path, capsys):
    assert parity.main(["--out", str(tmp_path / "parity.json")]) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    rows = found["rows"]
    assert all(row["ok"] for row in rows)
    samplers = {row["name"] for row in rows if row["kind"] in ("sampler", "grid")}
    assert samplers == set(golden("samplers")) - INPUTS
    assert len(rows) - len(samplers) == 1 + sum(len(set(golden(file)) - INPUTS) for file in ("unet", "vae", "text", "vision", "dpt"))  # 1: the tokens
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


def test_without_diffusers_one_line_says_what_to_install(no_diffusers, monkeypatch, capsys):
    for command, arguments in ((parity.main, ["--full"]), (speed.main, ["--tiny"])):
        monkeypatch.setattr(parity, "require", lambda extra, *modules: peers.require(extra, *modules) if extra == "bench" else None)
        with pytest.raises(SystemExit) as left:
            command(arguments)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.endswith("pip install '.[bench]'\n")
        assert said.count("\n") == 1


@pytest.mark.parametrize("config", [TINY, speed.TINY], ids=["two levels", "four levels"])
def test_the_networks_agree_with_diffusers_and_transformers(config):
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    rows = list(parity.peer_rows(config, cells=8))
    assert len(rows) == 4
    for row in rows:
        assert row.ok, row


def test_peers_share_the_weights():
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    model = peers.seeded_model(TINY)
    theirs = peers.peer(model)
    addresses = {p.data_ptr() for p in model.parameters()}
    for network in (theirs.unet, theirs.vae, theirs.text):
        assert {p.data_ptr() for p in network.parameters()} <= addresses


def test_peers_of_full_size_have_the_same_names_and_shapes():
    """Without memory for them: what `parity --full` and `speed` will build."""
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    with torch.device("meta"):
        theirs = peers.peer(LatentDiffusion(FAMILIES["sd1"]))
    assert sum(p.numel() for p in theirs.unet.parameters()) == 859_520_964


def test_speed_times_every_stage(tmp_path, capsys):
    assert speed.main(["--tiny", "--peer=none", "--repeats=2", "--steps=1", f"--out={tmp_path / 'speed.json'}"]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [row["stage"] for row in found["rows"]] == list(speed.STAGES)
    for row in found["rows"]:
        assert 0 < row["seconds"]["ldm"]["p10"] <= row["seconds"]["ldm"]["median"] <= row["seconds"]["ldm"]["p90"]
        assert row["same"] is None
        assert "ratio" not in row
    memory = found["memory"]["ldm"]
    if memory["weights"] is not None:
        assert memory["imported"] < memory["weights"] <= memory["peak"]["picture"]
    assert "not compared" in capsys.readouterr().out


def test_speed_takes_turns_with_diffusers_on_the_same_pictures(tmp_path):
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    assert speed.main(["--tiny", "--repeats=1", "--steps=2", f"--out={tmp_path / 'speed.json'}"]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert set(found["memory"]) == {"ldm", "diffusers"}
    for row in found["rows"]:
        assert row["same"], row
        assert row["ratio"] == row["seconds"]["diffusers"]["median"] / row["seconds"]["ldm"]["median"]


def test_a_side_that_computes_something_else_is_rejected():
    out, other = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.0001])
    assert speed.check({"ldm": out, "diffusers": out}, None)["same"]
    assert not speed.check({"ldm": other, "diffusers": out}, None)["same"]
    assert speed.check({"ldm": out}, None)["same"] is None
    assert not speed.check({"ldm": out * torch.inf, "diffusers": out}, None)["same"]
    half = {"ldm": (out * 1.01).bfloat16(), "diffusers": (out * 0.99).bfloat16()}
    assert speed.check(half, out)["same"]
    assert not speed.check({**half, "ldm": (out * 1.05).bfloat16()}, out)["same"]
    picture = torch.full((8, 8, 3), 100, dtype=torch.uint8)
    rounded = picture.clone()
    rounded[0, 0, 0] += 1
    assert speed.check({"ldm": rounded, "diffusers": picture}, None)["same"]
    assert not speed.check({"ldm": picture + 1, "diffusers": picture}, None)["same"]


def test_sides_take_turns():
    order = []
    found = speed.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "cpu")
    assert "".join(order) == "ababab"
    assert set(found["a"]) == {"p10", "median", "p90"}


@pytest.mark.parametrize("arguments", [["--size=100"], ["--size=32"], ["--repeats=0"], ["--steps=1001"], ["--threads=0"], ["--dtype=int8"]])
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        speed.main(arguments)
    assert left.value.code == 2
    assert arguments[0].split("=")[0] in capsys.readouterr().err


def test_a_machine_is_described_but_not_named():
    found = machine.machine(packages=("einops", "no-such-package"))
    assert found["cpu"]
    assert found["torch"] == torch.__version__
    assert found["einops"]
    assert found["no-such-package"] is None
    assert platform.node() not in [str(value) for value in found.values()]


def test_loading_is_timed_beside_others_with_every_tensor_read(tmp_path, capsys):
    assert load.main(["--tiny", "--repeats", "1", "--row", "single", "--cold", "--out", str(tmp_path / "load.json")]) == 0
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert [(row["side"], row["cold"]) for row in rows] == [("raw", True), ("ldm", True)]
    assert all(0 < row["returned"] <= row["read"] and row["peak"] > row["bytes"] > 1e6 for row in rows)
    assert "of raw (" in capsys.readouterr().out


def test_every_form_can_be_loaded_and_converted_by_the_benchmark(tmp_path):
    forms = load.prepare(tmp_path, "sd1", torch.float16, tiny=True)
    sizes = {row: load.one("ldm", row, forms[row.split(" ")[0]], forms["folder"], cold=False)["bytes"] for row in (*load.LOADS, *load.CONVERSIONS)}
    assert len({sizes[row] for row in load.LOADS}) == 1
    assert all(size >= sizes["single"] for size in sizes.values())


def test_a_ratio_says_whether_it_is_what_it_should_be():
    row = {"row": "single", "read": 1.0}
    assert load._against(row, "raw", 0.95) == "1.05 of raw (<= 1.1)"
    assert load._against(row, "diffusers", 1.9) == "0.53 of diffusers (not <= 0.5)"
