"""LoRAs out of two checkpoints, and into one: what is taken out, what cannot be, and what a merged file keeps."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weights
from benchmarks.models.folders import components, single, write_folder
from benchmarks.models.published import tiny
from benchmarks.models.seeded import normal
from ldm.changes.lora import merge
from ldm.config import ModelConfig
from ldm.errors import ArgumentError, FileError, NonFinite, OutputError
from tests.made.checkpoints import TINY, save_safetensors
from tests.made.loras import CONV, FC, HALF, KEYS, Q, adding, product, saved, seeded, shallow, spectrum
from weights.adapters import names as lora_names
from weights.adapters.extract import CONVOLUTION, attention
from weights.adapters.read import load_lora
from weights.names.metadata import CONFIG_KEY, to_json


def lowrank(config: ModelConfig, r: int) -> dict[str, Tensor]:
    """A change of rank r of every matrix and kernel that has factors in a LoRA of some trainer."""
    made = {}
    for name, shape in lora_names.shapes(config).items():
        if attention(name) or CONVOLUTION.fullmatch(name):
            made[name] = 0.05 * (
                normal(f"{name} u", (shape[0], r)) @ normal(f"{name} d", (r, math.prod(shape[1:])))
            ).reshape(shape)
    return made


@pytest.mark.parametrize("family", ["sd1", "sdxl-base"])
def test_a_change_of_known_rank_is_given_back(family: str, tmp_path: Path):
    """To the rounding of the tuned weights, of the difference, and of the decomposition, which loses no more than 64
    roundings of its norm."""
    config = shallow(family)
    known = lowrank(config, 3)
    base, tuned = saved(tmp_path / "a.safetensors", config), saved(tmp_path / "b.safetensors", config, adding(known))
    made = weights.extract_lora(base, tuned, tmp_path / "c.safetensors", rank=3, conv_rank=3, dtype=torch.float32)
    assert made.family == family
    assert made.rest == made.unpaired == ()
    found, after = load_lora(tmp_path / "c.safetensors", config), weights.load(tuned).state_dict()
    assert set(found) == set(known) == {one.parameter for one in made.modules}
    for name, exact in known.items():
        bound = (
            HALF * (after[name].norm() + 65 * exact.norm()) * 2
        )  # twice: what is left out to come to rank 3 is noise of the same size
        assert (product(found[name], exact.shape) - exact.double()).norm() <= bound, name
        assert found[name].alpha == min(3, found[name].down.shape[0])
    assert min(one.energy for one in made.modules) > 1 - 1e-6


@pytest.mark.parametrize("options", [{"rank": 5}, {"variance": 0.8}, {"variance": 0.8, "max_rank": 4}])
def test_of_a_change_of_full_rank_the_nearest_is_taken(options: dict, tmp_path: Path):
    """Eckart and Young 1936, with numpy's singular values of the difference in float64."""
    full = {name: 0.1 * normal(f"{name} full", lora_names.shapes(TINY)[name]) for name in (Q, CONV, FC)}
    base, tuned = saved(tmp_path / "a.safetensors"), saved(tmp_path / "b.safetensors", change=adding(full))
    made = weights.extract_lora(base, tuned, tmp_path / "c.safetensors", conv_rank=7, dtype=torch.float32, **options)
    found, before, after = (
        load_lora(tmp_path / "c.safetensors", TINY),
        weights.load(base).state_dict(),
        weights.load(tuned).state_dict(),
    )
    for one in made.modules:
        exact = after[one.parameter].double() - before[one.parameter].double()
        values = spectrum(exact)
        energies = np.cumsum(values**2)
        enough = int((energies < 0.8 * energies[-1]).sum()) + 1
        conv = one.parameter == CONV
        assert one.rank == (
            (7 if conv else 5) if "rank" in options else min(enough, 7 if conv else options.get("max_rank", 99))
        )
        tail = math.sqrt((values[one.rank :] ** 2).sum())
        left = (product(found[one.parameter], exact.shape) - exact).norm().item()
        assert left == pytest.approx(
            tail, rel=1e-5
        )  # the decomposition's own rounding, 64 * 2^-24, of numbers of the same size
        assert one.energy == pytest.approx(energies[one.rank - 1] / energies[-1], rel=1e-5)
    assert len(made.modules) == 3


def test_containers_and_layouts_do_not_matter(tmp_path: Path):
    """A diffusers folder and a single file, and the same with the checkpoint as .ckpt."""
    state = single("sd1")
    folder = write_folder(tmp_path / "base", "sd1", components("sd1", state))
    name = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
    described = {CONFIG_KEY: to_json(tiny("sd1"))}
    same = save_safetensors(state, tmp_path / "same.safetensors", described)
    with pytest.raises(FileError, match=r"same\.safetensors: differs from base in nothing that a LoRA changes"):
        weights.extract_lora(folder, same, tmp_path / "c.safetensors", rank=2)
    state[name] = state[name] + torch.outer(normal("u", (len(state[name]),)), normal("d", (state[name].shape[1],)))
    made = weights.extract_lora(
        folder, save_safetensors(state, tmp_path / "tuned.safetensors", described), tmp_path / "c.safetensors", rank=2
    )
    assert [one.parameter for one in made.modules] == ["unet.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"]
    assert next(iter(load_file(tmp_path / "c.safetensors"))).startswith(
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_k"
    )


REST = {
    "unet.input_blocks.1.1.norm.weight": (32,), "unet.input_blocks.1.1.proj_in.bias": (32,),
    "unet.out.2.weight": (4, 32, 3, 3), "text.0.text_model.embeddings.token_embedding.weight": (1000, 64),
    "vae.decoder.conv_in.weight": (64, 4, 3, 3),
}  # fmt: skip


def test_what_low_rank_cannot_carry_is_reported_and_kept_where_asked(tmp_path: Path):
    change = {name: 0.1 * normal(name, shape) for name, shape in REST.items()} | {
        Q: normal("q", (32, 32)),
        CONV: normal("c", (32, 32, 3, 3)),
    }
    base, tuned = saved(tmp_path / "a.safetensors"), saved(tmp_path / "b.safetensors", change=adding(change))
    made = weights.extract_lora(base, tuned, tmp_path / "c.safetensors", rank=64)
    assert {one.parameter: (one.size, one.kept) for one in made.rest} == {
        name: (4 * math.prod(shape), False) for name, shape in {**REST, CONV: (32, 32, 3, 3)}.items()
    }
    made = weights.extract_lora(base, tuned, tmp_path / "d.safetensors", rank=64, full_rest=True, dtype=torch.float32)
    assert [one.parameter for one in made.rest if not one.kept] == ["vae.decoder.conv_in.weight"]
    keys = {key for key in load_file(tmp_path / "d.safetensors") if ".lora_" not in key and ".alpha" not in key}
    assert keys == {
        "lora_unet_down_blocks_0_attentions_0_norm.w_norm", "lora_unet_down_blocks_0_attentions_0_proj_in.diff_b",
        "lora_unet_conv_out.diff", "lora_te_text_model_embeddings_token_embedding.diff", f"{KEYS[CONV]}.diff",
    }  # fmt: skip
    model, after = weights.load(base), weights.load(tuned).state_dict()
    merge(model, [(load_lora(tmp_path / "d.safetensors", TINY), 1)])
    for name, tensor in model.state_dict().items():
        if not name.startswith("vae."):
            assert (tensor - after[name]).abs().max() <= 66 * HALF * after[name].norm(), name


def test_a_change_that_no_lora_carries_is_refused_with_what_keeps_it(tmp_path: Path):
    name = "unet.input_blocks.1.1.norm.weight"
    base, tuned = (
        saved(tmp_path / "a.safetensors"),
        saved(tmp_path / "b.safetensors", change=adding({name: torch.ones(32)})),
    )
    with pytest.raises(FileError, match="in 1 parameters that a LoRA does not carry; --full-rest keeps them"):
        weights.extract_lora(base, tuned, tmp_path / "c.safetensors", rank=2)
    made = weights.extract_lora(base, tuned, tmp_path / "c.safetensors", rank=2, full_rest=True)
    assert made.modules == ()
    assert list(load_file(tmp_path / "c.safetensors")) == ["lora_unet_down_blocks_0_attentions_0_norm.w_norm"]


def test_text_towers_can_be_left_out(tmp_path: Path):
    change = adding({Q: normal("q", (32, 32)), FC: normal("f", (256, 64))})
    base, tuned = saved(tmp_path / "a.safetensors"), saved(tmp_path / "b.safetensors", change=change)
    made = weights.extract_lora(base, tuned, tmp_path / "c.safetensors", rank=2, text=False)
    assert [one.parameter for one in made.modules] == [Q]


def test_rounding_to_half_is_no_difference(tmp_path: Path):
    base = saved(tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"differs from a\.safetensors in nothing"):
        weights.extract_lora(
            base, saved(tmp_path / "b.safetensors", dtype=torch.float16), tmp_path / "c.safetensors", rank=2
        )
    half = saved(tmp_path / "d.safetensors", change=adding({Q: normal("q", (32, 32))}), dtype=torch.float16)
    made = weights.extract_lora(base, half, tmp_path / "c.safetensors", rank=2)
    assert [one.parameter for one in made.modules] == [Q]
    assert made.unchanged == len(seeded(TINY).state_dict()) - 1


def test_the_file_says_what_it_is_for(tmp_path: Path):
    base, tuned = (
        saved(tmp_path / "a.safetensors"),
        saved(tmp_path / "b.safetensors", change=adding({Q: normal("q", (32, 32))})),
    )
    weights.extract_lora(base, tuned, tmp_path / "c.safetensors", rank=2)
    with weights.open_file(tmp_path / "c.safetensors") as file:
        assert file.metadata == {
            "format": "pt", "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_sd_model_name": "a.safetensors",
            "ldm.family": "sd1", "ldm.tuned": "b.safetensors",
            "ss_new_sd_model_hash": hashlib.sha256(base.read_bytes()).hexdigest(), "ss_network_module": "networks.lora",
            "ss_network_dim": "2", "ss_network_alpha": "2.0",
        }  # fmt: skip
        assert {spec.dtype for spec in file.specs.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("family", "version", "two"), [("sd2-v", "sd_v2_v", "True"), ("sdxl-base", "sdxl_base_v1-0", "False")]
)
def test_kohyas_words_for_the_base_are_used(family: str, version: str, two: str, tmp_path: Path):
    config = shallow(family)
    name = "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    base, tuned = (
        saved(tmp_path / "a.safetensors", config),
        saved(tmp_path / "b.safetensors", config, adding({name: normal("q", (32, 32))})),
    )
    weights.extract_lora(base, tuned, tmp_path / "c.safetensors", rank=2)
    with weights.open_file(tmp_path / "c.safetensors") as file:
        assert (file.metadata["ss_base_model_version"], file.metadata["ss_v2"]) == (version, two)


def test_two_families_or_predictions_have_no_lora_between_them(tmp_path: Path):
    one, two, v = (saved(tmp_path / f"{name}.safetensors", shallow(name)) for name in ("sd1", "sd2-base", "sd2-v"))
    with pytest.raises(
        FileError,
        match=r"sd2-base\.safetensors: is sd2-base, sd1\.safetensors is sd1; a LoRA takes a model to another of its "
        "family",
    ):
        weights.extract_lora(one, two, tmp_path / "c.safetensors", rank=2)
    with pytest.raises(FileError, match=r"sd2-v\.safetensors: predicts v, sd2-base\.safetensors predicts eps"):
        weights.extract_lora(two, v, tmp_path / "c.safetensors", rank=2)


def test_checkpoints_that_do_not_fit_together_are_refused(tmp_path: Path):
    base = saved(tmp_path / "a.safetensors")
    state = load_file(base)
    with weights.open_file(base) as file:
        metadata = file.metadata
    q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    token = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    lacking = {key: value for key, value in state.items() if key != q}
    broken = {
        "lacking": (lacking, FileError, "has no unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"),
        "nan": (state | {q: torch.full((32, 32), math.nan)}, NonFinite, "to_q.weight: its change has NaN"),
        "integers": (state | {q: torch.ones(32, 32, dtype=torch.int8)}, FileError, "quantised weights are not read"),
        "twice": (state | {token.replace("text_model.", ""): state[token].clone()}, FileError, "twice"),
    }
    for name, (tensors, error, what) in broken.items():
        with pytest.raises(error, match=what):
            weights.extract_lora(
                base,
                save_safetensors(tensors, tmp_path / f"{name}.safetensors", metadata),
                tmp_path / "c.safetensors",
                rank=2,
            )
    longer = replace(TINY, text=(replace(TINY.text[0], vocab=1001),))
    with pytest.raises(FileError, match=r"token_embedding.weight is \[1001, 64\].*text=False"):
        weights.extract_lora(base, saved(tmp_path / "longer.safetensors", longer), tmp_path / "c.safetensors", rank=2)
    with pytest.raises(ArgumentError, match="conv_rank 0"):
        weights.extract_lora("nowhere", "nowhere", tmp_path / "c.safetensors", rank=2, conv_rank=0)
    with pytest.raises(OutputError, match="exists already"):
        weights.extract_lora("nowhere", "nowhere", base, rank=2)
    assert not (tmp_path / "c.safetensors").exists()


def test_layers_that_only_one_of_two_towers_has_are_left_out_and_named(tmp_path: Path):
    """SD 2 files of some trainers end their tower where the conditioning is taken."""
    config = shallow("sd2-base")
    tower = config.text[0]
    shorter = replace(config, text=(replace(tower, layers=tower.layers - 1, skip=0, projection=None),))
    name = "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    base, tuned = (
        saved(tmp_path / "a.safetensors", config),
        saved(tmp_path / "b.safetensors", shorter, adding({name: normal("q", (32, 32))})),
    )
    made = weights.extract_lora(base, tuned, tmp_path / "c.safetensors", rank=2)
    assert [one.parameter for one in made.modules] == [name]
    assert {
        part for part in made.unpaired if not part.startswith(f"text.0.text_model.encoder.layers.{tower.layers - 1}.")
    } == {"text.0.text_projection.weight"}
