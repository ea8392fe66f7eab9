"""LoRAs of another rank: the nearest there are, of the same scale, in the same dialect."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weights
from benchmarks.models.seeded import normal
from ldm.changes.lora import delta
from ldm.errors import ArgumentError, FileError, NonFinite, OutputError
from tests.made.checkpoints import TINY, save_safetensors
from tests.made.loras import CONV, HADA, HALF, KERNEL, KEYS, Q, product, some_lora, spectrum
from weights.adapters import names as lora_names
from weights.adapters.read import load_lora, read_lora


@pytest.mark.parametrize("r", [1, 3, 5])
def test_a_lora_cut_to_a_rank_is_as_near_as_any_of_that_rank(r: int, tmp_path: Path):
    """Eckart and Young 1936: what is missing has the norm of the singular values left out, here of the full product by
    numpy in float64."""
    source = some_lora(tmp_path / "a.safetensors", rank=6, alpha=3.0)
    made = weights.resize_lora(source, tmp_path / "b.safetensors", rank=r, model_config=TINY)
    before, after, shapes = (
        load_lora(source, TINY),
        load_lora(tmp_path / "b.safetensors", TINY),
        lora_names.shapes(TINY),
    )
    assert {one.parameter for one in made.kept} == set(KEYS)
    for one in made.kept:
        shape = shapes[one.parameter]
        exact, cut = product(before[one.parameter], shape), product(after[one.parameter], shape)
        values = spectrum(exact)
        assert after[one.parameter].down.shape[0] == one.rank == r
        assert after[one.parameter].alpha == 3.0 * r / 6  # the scale, alpha / rank, is as it was
        tail = math.sqrt((values[r:] ** 2).sum())
        assert (cut - exact).norm().item() == pytest.approx(
            tail, abs=8 * HALF * values[0]
        )  # each factor is rounded once to float32
        assert one.energy == pytest.approx((values[:r] ** 2).sum() / (values**2).sum(), rel=1e-12)
        assert one.whole == pytest.approx((values**2).sum(), rel=1e-12)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.999, 1.0])
def test_variance_keeps_the_least_rank_that_is_enough_in_each_module(share: float, tmp_path: Path):
    source = some_lora(tmp_path / "a.safetensors", rank=6)
    made = weights.resize_lora(source, tmp_path / "b.safetensors", variance=share, model_config=TINY)
    before, shapes = load_lora(source, TINY), lora_names.shapes(TINY)
    for one in made.kept:
        energies = np.cumsum(spectrum(product(before[one.parameter], shapes[one.parameter])) ** 2)[:6]
        least = next(i for i in range(1, 7) if i == 6 or energies[i - 1] >= share * energies[-1])
        assert one.rank == least
    bounded = weights.resize_lora(source, tmp_path / "c.safetensors", variance=share, max_rank=2, model_config=TINY)
    assert [one.rank for one in bounded.kept] == [min(one.rank, 2) for one in made.kept]
    assert made.energy >= share - 1e-12
    with weights.open_file(tmp_path / "b.safetensors") as file:
        ranks = {one.rank for one in made.kept}
        assert file.metadata["ss_network_dim"] == (str(ranks.pop()) if len(ranks) == 1 else "Dynamic")


def test_a_rank_beyond_what_is_there_changes_nothing_but_the_factors(tmp_path: Path):
    source = some_lora(tmp_path / "a.safetensors", rank=4)
    made = weights.resize_lora(source, tmp_path / "b.safetensors", rank=64, model_config=TINY)
    assert [(one.rank, round(one.energy, 12)) for one in made.kept] == [(4, 1.0)] * 3


@pytest.mark.parametrize("to", ["diffusers", "peft", None])
def test_the_dialect_of_what_is_resized_is_its_own_or_the_one_asked_for(to: str | None, tmp_path: Path):
    source = some_lora(tmp_path / "a.safetensors", metadata={"ss_output_name": "a"})
    if to:
        weights.convert_lora(source, tmp_path / "b", to, TINY)
    made = weights.resize_lora(tmp_path / "b" if to else source, tmp_path / "c", rank=2, model_config=TINY)
    assert made.dialect == read_lora(tmp_path / "c", TINY).dialect == (to or "kohya")
    back = weights.resize_lora(tmp_path / "c", tmp_path / "d", rank=2, to="kohya", model_config=TINY)
    assert back.dialect == "kohya"
    assert {key.split(".")[0] for key in load_file(tmp_path / "d")} == set(KEYS.values())


def test_the_layers_of_a_core_become_one_and_a_dora_keeps_its_magnitudes(tmp_path: Path):
    tensors = {f"{KEYS[CONV]}.{part}": value for part, value in KERNEL.items()}
    tensors |= {
        f"{KEYS[Q]}.lora_down.weight": normal("d", (4, 32)),
        f"{KEYS[Q]}.lora_up.weight": normal("u", (32, 4)),
        f"{KEYS[Q]}.dora_scale": normal("m", (1, 32)).abs(),
    }
    tensors |= {"lora_unet_down_blocks_0_attentions_0_norm.w_norm": normal("n", (32,))}
    source = save_safetensors(tensors, tmp_path / "a.safetensors")
    made = weights.resize_lora(source, tmp_path / "b.safetensors", rank=2, model_config=TINY)
    after = load_file(tmp_path / "b.safetensors")
    assert made.untouched == ("unet.input_blocks.1.1.norm.weight",)
    assert torch.equal(
        after["lora_unet_down_blocks_0_attentions_0_norm.w_norm"],
        tensors["lora_unet_down_blocks_0_attentions_0_norm.w_norm"],
    )
    assert torch.equal(after[f"{KEYS[Q]}.dora_scale"], tensors[f"{KEYS[Q]}.dora_scale"])
    assert after[f"{KEYS[Q]}.lora_down.weight"].shape == (2, 32)
    exact = delta(load_lora(source, TINY)[CONV], torch.zeros(32, 32, 3, 3)).double()
    assert (
        product(load_lora(tmp_path / "b.safetensors", TINY)[CONV], (32, 32, 3, 3)) - exact
    ).norm() <= 64 * HALF * exact.norm()


def test_factors_may_be_stored_narrower_or_wider(tmp_path: Path):
    source = some_lora(tmp_path / "a.safetensors")
    weights.resize_lora(source, tmp_path / "b.safetensors", rank=2, model_config=TINY, dtype=torch.bfloat16)
    weights.convert_lora(source, tmp_path / "c.safetensors", "kohya", TINY, dtype=torch.float16)
    for name, dtype in (("b", torch.bfloat16), ("c", torch.float16)):
        assert {
            value.dtype for key, value in load_file(tmp_path / f"{name}.safetensors").items() if ".lora_" in key
        } == {dtype}


HUGE = {f"{KEYS[Q]}.lora_down.weight": torch.full((2, 32), math.inf), f"{KEYS[Q]}.lora_up.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("tensors", "what", "error"),
    [
        (HADA, "to_q.weight is a LoHa, which is no plain product", FileError),
        ({"lora_unet_down_blocks_0_attentions_0_norm.w_norm": torch.ones(32)}, "has no module with a rank", FileError),
        (HUGE, "to_q.weight: its change has NaN or infinity", NonFinite),
    ],
)
def test_what_has_no_rank_to_change_is_refused(tensors: dict[str, Tensor], what: str, error: type, tmp_path: Path):
    with pytest.raises(error, match=what):
        weights.resize_lora(
            save_safetensors(tensors, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", rank=2, model_config=TINY
        )
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "give a rank or a share"), ({"rank": 2, "variance": 0.5}, "not both"),
        ({"rank": 0}, "rank 0: give a whole number"), ({"rank": True}, "rank True"),
        ({"variance": 0}, "variance 0: give a share"), ({"variance": 1.01}, "variance 1.01"),
        ({"variance": math.nan}, "variance nan"), ({"rank": 2, "max_rank": 4}, "max_rank bounds what variance chooses"),
        ({"variance": 0.5, "max_rank": 0}, "max_rank 0"),
        ({"rank": 2, "to": "comfy"}, "to 'comfy': there are kohya, diffusers, peft"),
        ({"rank": 2, "dtype": torch.int8}, "cannot hold weights"),
        ({"rank": 2, "model_config": "sd3"}, "config 'sd3' is no family"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_before_the_file_is_read(options: dict, what: str, tmp_path: Path):
    source = some_lora(tmp_path / "a.safetensors") if "model_config" in options else "nowhere.safetensors"
    with pytest.raises(ArgumentError, match=what):
        weights.resize_lora(source, tmp_path / "b.safetensors", **options)
    if "to" in options:
        with pytest.raises(ArgumentError, match=what):
            weights.convert_lora(source, tmp_path / "b.safetensors", options["to"])


def test_what_is_there_is_not_overwritten_unless_asked(tmp_path: Path):
    source = some_lora(tmp_path / "a.safetensors")
    for to in ("kohya", "peft"):
        taken = tmp_path / to
        (taken.mkdir if to == "peft" else taken.touch)()
        with pytest.raises(OutputError, match="exists already"):
            weights.convert_lora("nowhere.safetensors", taken, to, TINY)
        weights.convert_lora(source, taken, to, TINY, overwrite=True)
    with pytest.raises(OutputError, match="not a regular file"):
        weights.convert_lora("nowhere.safetensors", tmp_path / "peft", "kohya", TINY, overwrite=True)
    weights.resize_lora(
        source, source, rank=2, model_config=TINY, overwrite=True
    )  # onto itself: what is mapped is the old file
    assert load_lora(source, TINY)[Q].down.shape == (2, 32)
