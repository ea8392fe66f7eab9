"""Merged models hold what plain arithmetic makes of every parameter, whatever containers and layouts they came in."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models.folders import STATISTIC, components, single, write_folder
from benchmarks.models.published import meaning, tiny
from benchmarks.models.seeded import weight
from ldm.config import FAMILIES, ModelConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError, OutputError
from tests.made import families
from tests.made.checkpoints import POSITION_IDS, TINY, checkpoint, save_safetensors, save_stream, save_zip
from weights import convert, load, merge, open_file, original_state
from weights.names.metadata import to_json
from weights.tools.merge import block_of, unet_blocks, weights_of

U = 2.0**-24  # half a unit in the last place of a float32 next to 1: the relative error of one operation
SAVERS = {"x.safetensors": save_safetensors, "x.ckpt": save_zip, "stream.ckpt": save_stream}


def other(state: Mapping[str, Tensor], seed: str) -> dict[str, Tensor]:
    """The same tensors with other numbers; whole numbers stay."""
    return {
        key: weight(seed + key, tuple(value.shape)).to(value.dtype) if value.is_floating_point() else value
        for key, value in state.items()
    }


def little(family: str) -> ModelConfig:
    """The family with tiny networks, and few tokens."""
    config = families.tiny(family)
    return replace(config, text=tuple(replace(tower, vocab=100) for tower in config.text))


def saved(state: Mapping[str, Tensor], path: Path, config: Any = TINY, **metadata: str) -> Path:
    """A .safetensors that says its sizes, which are nobody's."""
    return save_safetensors(
        {key: value.contiguous() for key, value in state.items()}, path, {"ldm.config": to_json(config), **metadata}
    )


def tensors(path: Path) -> dict[str, Tensor]:
    with open_file(path) as file:
        return {key: file.read(key, mapped=False) for key in file}


def same(one: Tensor, two: Tensor) -> bool:
    """Bit by bit, the sign of zero included."""
    bits = [value.reshape(-1).contiguous().view(torch.uint8) for value in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and bits[0].equal(bits[1])


def require_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], error: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    odd = [key for key in wanted if not ((found[key].double() - wanted[key]).abs() <= error[key]).all()]
    assert not odd, odd[:3]


# --- arithmetic -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three small SD 1 models: their tensors, and their files."""
    states = {name: other(checkpoint(), name) for name in "abc"}
    folder = tmp_path_factory.mktemp("models")
    return {"states": states, **{name: saved(state, folder / f"{name}.safetensors") for name, state in states.items()}}


@pytest.mark.parametrize("alpha", [0.3, 0.75])
def test_a_weighted_sum_is_that_of_every_parameter(models, alpha: float, tmp_path: Path) -> None:
    done = merge(models["a"], models["b"], tmp_path / "x.safetensors", alpha=alpha)
    a, b = (meaning(models["states"][name]) for name in "ab")
    found = meaning(tensors(done.path))
    # subtraction, weight, product and sum are each rounded once
    require_close(
        found,
        {k: (1 - alpha) * a[k].double() + alpha * b[k].double() for k in a},
        {k: 4 * U * (a[k].abs() + b[k].abs()) for k in a},
    )


@pytest.mark.parametrize("alpha", [1.0, -0.4])
def test_a_difference_is_added_to_every_parameter(models, alpha: float, tmp_path: Path) -> None:
    done = merge(models["a"], models["b"], tmp_path / "x.ckpt", c=models["c"], method="add-difference", alpha=alpha)
    a, b, c = (meaning(models["states"][name]) for name in "abc")
    wanted = {k: a[k].double() + alpha * (b[k].double() - c[k].double()) for k in a}
    found = meaning(torch.load(done.path, weights_only=True)["state_dict"])
    require_close(found, wanted, {k: 4 * U * (a[k].abs() + abs(alpha) * (b[k].abs() + c[k].abs())) for k in a})


def test_slerp_goes_along_the_arc_of_every_parameter(models, tmp_path: Path) -> None:
    alpha = 0.3
    done = merge(models["a"], models["b"], tmp_path / "x.safetensors", method="slerp", alpha=alpha)
    a, b = (meaning(models["states"][name]) for name in "ab")
    wanted, error = {}, {}
    for key in a:
        p, q = a[key].double(), b[key].double()
        angle = torch.acos((p * q).sum() / (p.norm() * q.norm()))
        assert 0.01 < angle < math.pi - 0.01  # where a float64 acos gives the factors to 1e-12
        of_a, of_b = torch.sin((1 - alpha) * angle) / torch.sin(angle), torch.sin(alpha * angle) / torch.sin(angle)
        wanted[key], error[key] = of_a * p + of_b * q, 3 * U * (of_a * p.abs() + of_b * q.abs())
    require_close(meaning(tensors(done.path)), wanted, error)


@pytest.mark.parametrize("angle", [0.0, 1e-4, math.pi - 1e-4, math.pi])
def test_slerp_is_linear_between_what_is_nearly_parallel(angle: float, tmp_path: Path) -> None:
    state = checkpoint()
    key, flat = "model.diffusion_model.out.0.weight", torch.zeros(32)
    one, two = flat.clone(), flat.clone()
    one[0] = 2.0
    two[0], two[1] = math.cos(angle), math.sin(angle)
    a, b = (saved({**state, key: value}, tmp_path / f"{i}.safetensors") for i, value in enumerate((one, two)))
    merge(a, b, tmp_path / "x.safetensors", method="slerp", alpha=0.25)
    assert torch.allclose(tensors(tmp_path / "x.safetensors")[key], 0.75 * one + 0.25 * two, rtol=0, atol=6 * U)


def test_slerp_is_linear_where_a_tensor_is_zero(tmp_path: Path) -> None:
    state, key = checkpoint(), "model.diffusion_model.out.0.weight"
    a, b = (saved({**state, key: torch.full((32,), value)}, tmp_path / f"{value}.safetensors") for value in (0.0, 8.0))
    merge(a, b, tmp_path / "x.safetensors", method="slerp", alpha=0.25)
    assert tensors(tmp_path / "x.safetensors")[key].equal(torch.full((32,), 2.0))


def with_odd_zeros(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with a negative zero in every floating-point tensor: arithmetic loses its sign."""
    changed = {key: value.clone() for key, value in state.items()}
    for value in changed.values():
        if value.is_floating_point():
            value.view(-1)[0] = -0.0
    return changed


@pytest.mark.parametrize("method", ["weighted", "slerp"])
def test_the_ends_are_the_models_themselves_bit_by_bit(models, method: str, tmp_path: Path) -> None:
    states = {name: with_odd_zeros(models["states"][name]) for name in "ab"}
    a, b = (saved(states[name], tmp_path / f"{name}.safetensors") for name in "ab")
    for alpha, name in ((0.0, "a"), (1, "b")):
        found = tensors(merge(a, b, tmp_path / f"{alpha}.safetensors", method=method, alpha=alpha).path)
        assert found.keys() == states["a"].keys()
        networks = meaning(states[name])
        assert networks
        assert all(same(value, networks[key]) for key, value in meaning(found).items())
        assert all(
            same(found[key], states["a"][key])
            for key in found
            if "." not in key or key.startswith("model_ema.") or key == POSITION_IDS
        )


def test_no_difference_changes_nothing_bit_by_bit(models, tmp_path: Path) -> None:
    state = with_odd_zeros(models["states"]["a"])
    a = saved(state, tmp_path / "a.safetensors")
    for i, (c, alpha) in enumerate(((models["b"], 0.7), (models["c"], 0.0))):
        found = tensors(
            merge(a, models["b"], tmp_path / f"{i}.safetensors", c=c, method="add-difference", alpha=alpha).path
        )
        assert found.keys() == state.keys()
        assert all(same(found[key], value) for key, value in state.items())


def test_what_is_the_same_in_both_stays_so_bit_by_bit(models, tmp_path: Path) -> None:
    done = merge(models["a"], models["a"], tmp_path / "x.safetensors", alpha=0.3)
    assert all(same(value, models["states"]["a"][key]) for key, value in tensors(done.path).items())


def test_half_precision_is_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    states = [other(checkpoint(dtype=torch.float16), seed) for seed in "ab"]
    a, b = (saved(state, tmp_path / f"{i}.safetensors") for i, state in enumerate(states))
    found = meaning(tensors(merge(a, b, tmp_path / "x.safetensors", alpha=0.3).path))
    p, q = map(meaning, states)
    assert all(value.dtype == torch.float16 for value in found.values())
    wanted = {
        k: 0.7 * p[k].double() + 0.3 * q[k].double() for k in p
    }  # the last rounding: 11 bits, or half the smallest step of 2^-24
    require_close(
        found,
        wanted,
        {k: 2.0**-11 * wanted[k].abs() + 2.0**-25 + 4 * U * (p[k].abs() + q[k].abs()).double() for k in p},
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_asked_for_is_that_of_the_parameters_alone(models, dtype: torch.dtype, tmp_path: Path) -> None:
    found = tensors(merge(models["a"], models["b"], tmp_path / "x.safetensors", dtype=dtype).path)
    plain = tensors(merge(models["a"], models["b"], tmp_path / "plain.safetensors").path)
    assert all(
        same(value, plain[key].to(dtype)) for key, value in meaning(found).items() for key in [key] if key in plain
    )
    assert all(value.dtype == dtype for value in meaning(found).values())
    assert all(
        same(found[key], plain[key]) for key in (POSITION_IDS, "betas", "model_ema.decay", "model_ema.num_updates")
    )


# --- containers, layouts, families ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVERS)
def test_every_container_will_do(models, name: str, tmp_path: Path) -> None:
    paths = []
    for letter in "ab":
        (tmp_path / letter).mkdir()
        paths.append(SAVERS[name](models["states"][letter], tmp_path / letter / name))
    found = tensors(merge(*paths, tmp_path / "x.safetensors", config=TINY, alpha=0.3).path)
    assert load(tmp_path / "x.safetensors").config == TINY  # which the result says, though its sources did not
    wanted = tensors(merge(models["a"], models["b"], tmp_path / "y.safetensors", alpha=0.3).path)
    assert found.keys() == wanted.keys()
    assert all(same(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("family", ["sd-image-variations", "x4-upscaler", "sdxl-base"])
def test_a_model_of_every_make_is_merged(family: str, tmp_path: Path) -> None:
    config = little(family)
    states = [original_state(families.build(config))]
    states.append(other(states[0], "b"))
    done = merge(
        *(saved(state, tmp_path / f"{i}.safetensors", config) for i, state in enumerate(states)),
        tmp_path / "x.safetensors",
        alpha=0.3,
    )
    a, b = map(meaning, states)
    wanted = {key: 0.7 * a[key].double() + 0.3 * b[key].double() for key in a}
    require_close(meaning(tensors(done.path)), wanted, {key: 4 * U * (a[key].abs() + b[key].abs()) for key in a})
    assert set(done.merged) == set(states[0])
    assert load(done.path).config == config


def test_a_folder_gives_the_same_as_its_single_file(tmp_path: Path) -> None:
    """Its names are others, its q, k and v are matrices of their own, its kernels are matrices, its last text block is
    not there."""
    family = "sd2-depth"
    state = single(family)
    changed = other(state, "b")
    a = saved(state, tmp_path / "a.safetensors", tiny(family))
    b = write_folder(tmp_path / "b", family, components(family, changed))
    done = merge(a, b, tmp_path / "x.safetensors", method="slerp", alpha=0.3)
    one = tensors(done.path)
    two = tensors(
        merge(
            a,
            saved(changed, tmp_path / "b.safetensors", tiny(family)),
            tmp_path / "y.safetensors",
            method="slerp",
            alpha=0.3,
        ).path
    )
    left_out = {key for key in state if re.search(r"resblocks\.23\.|^cond_stage.+text_projection$", key)}
    assert {key for key, why in done.kept.items() if why.startswith("nothing reads")} == left_out
    assert one.keys() == two.keys() == state.keys()
    assert all(same(one[key], state[key] if key in left_out else two[key]) for key in one)
    assert not same(one[done.merged[0]], state[done.merged[0]])
    assert load(done.path).config.name == family


def test_projections_under_two_spellings_are_merged_as_the_same_matrix(tmp_path: Path) -> None:
    """OpenCLIP's parameter, x @ w, in one; the matrix of a Linear layer, as files made by way of transformers have it,
    in the other."""
    config, key = little("sdxl-base"), "conditioner.embedders.1.model.text_projection"
    state = original_state(families.build(config))
    changed = other(state, "b")
    turned = changed.pop(key).T
    a, b = (
        saved(state, tmp_path / "a.safetensors", config),
        saved({**changed, f"{key}.weight": turned}, tmp_path / "b.safetensors", config),
    )
    assert same(tensors(merge(a, b, tmp_path / "x.safetensors", alpha=1).path)[key], turned.T)
    assert same(tensors(merge(b, a, tmp_path / "y.safetensors", alpha=1).path)[f"{key}.weight"], state[key].T)


# --- what is not merged ---------------------------------------------------------------------------------------------


def test_what_is_no_parameter_is_as_in_a(tmp_path: Path) -> None:
    a = {**checkpoint(), "logit_scale_of_nobody": torch.ones(3), "cond_stage_model.logit_scale": torch.tensor(4.6)}
    b = {**other(checkpoint(position_ids="wrong"), "b"), "nobody": torch.ones(2)}
    done = merge(saved(a, tmp_path / "a.safetensors"), saved(b, tmp_path / "b.safetensors"), tmp_path / "x.safetensors")
    found = tensors(done.path)
    parameters = {
        key
        for key in a
        if key.startswith(("model.", "first_stage_model.", "cond_stage_model.transformer.")) and key != POSITION_IDS
    }
    assert set(done.merged) == parameters
    assert set(done.kept) == set(a) - parameters
    assert all(same(found[key], a[key]) for key in done.kept)
    assert done.unused == {"B": ("nobody",)}
    assert any("1 of B unused: A has no place for them (nobody)" in line for line in done.lines())
    assert any("1 kept as in A: no parameter of this family" in line for line in done.lines())


def test_the_moving_average_of_a_is_dropped_and_of_b_not_used(tmp_path: Path) -> None:
    state = checkpoint(ema="full")
    paths = [saved(state if i == 0 else other(state, "b"), tmp_path / f"{i}.safetensors") for i in range(2)]
    done = merge(*paths, tmp_path / "x.safetensors")
    found = tensors(done.path)
    averages = {
        key for key in state if key.startswith("model_ema.") and key not in ("model_ema.decay", "model_ema.num_updates")
    }
    assert set(done.dropped) == averages
    assert found.keys() == state.keys() - averages
    assert "model_ema.decay" in found
    with open_file(done.path) as file:
        assert json.loads(file.metadata["ldm.merge"])["moving_average"].startswith("dropped")
    assert "B has a moving average, which was not used" in done.notes
    assert done.unused == {"B": ()}


def test_the_recipe_and_the_config_go_into_the_metadata(models, tmp_path: Path) -> None:
    a = saved(
        models["states"]["a"],
        tmp_path / "a.safetensors",
        **{"modelspec.license": "CreativeML", "modelspec.hash_sha256": "of a"},
    )
    for name in ("x.safetensors", "x.ckpt"):
        done = merge(a, models["b"], tmp_path / name, alpha=0.25, blocks={"in01": 0.75, "TEXT": 0})
        with open_file(done.path) as file:
            metadata = file.metadata
        assert metadata["ldm.config"] == to_json(TINY)
        assert metadata["modelspec.license"] == "CreativeML"
        assert "modelspec.hash_sha256" not in metadata
        recipe = json.loads(metadata["ldm.merge"])
        assert recipe["blocks"] == {"IN01": 0.75, "TEXT": 0}
        assert (recipe["method"], recipe["alpha"], recipe["arithmetic"]) == ("weighted", 0.25, "float32")
        assert [source["sha256"] for source in recipe["sources"]] == [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in (a, models["b"])
        ]
        assert load(done.path).config == TINY


# --- blocks ---------------------------------------------------------------------------------------------------------


def test_each_block_gets_its_weight(models, tmp_path: Path) -> None:
    """0 and 1 tell bit by bit which weight a tensor got: four models in which the blocks' weights are the digits of
    their numbers."""
    prefixes = {**{f"IN0{i}": (f"unet.input_blocks.{i}.",) for i in range(4)}, "MID": ("unet.middle_block.",),
                **{f"OUT0{i}": (f"unet.output_blocks.{i}.",) for i in range(4)}, "TEXT": ("text.",),
                "VAE": ("vae.",)}  # fmt: skip
    prefixes |= {"IN00": ("unet.input_blocks.0.", "unet.time_embed."), "OUT03": ("unet.output_blocks.3.", "unet.out.")}
    a, b = (meaning(models["states"][name]) for name in "ab")
    for digit in range(4):
        blocks = {
            block: i >> digit & 1 for i, block in enumerate(prefixes, start=1) if block != "OUT00"
        }  # which gets alpha
        found = meaning(
            tensors(
                merge(models["a"], models["b"], tmp_path / f"{digit}.safetensors", alpha=digit % 2, blocks=blocks).path
            )
        )
        for block, begin in prefixes.items():
            wanted = b if blocks.get(block, digit % 2) else a
            keys = [key for key in found if key.startswith(begin)]
            assert keys
            assert all(same(found[key], wanted[key]) for key in keys), block
    assert sum(key.startswith(tuple(begin for each in prefixes.values() for begin in each)) for key in a) == len(a)


def test_blocks_are_given_by_name_or_as_numbers_alone(models, tmp_path: Path) -> None:
    names = ["IN00", "IN01", "IN02", "IN03", "M00", "OUT00", "OUT01", "OUT02", "OUT03"]
    one, two = ([i / 8 for i in range(9)], {name: i / 8 for i, name in enumerate(names)})
    one, two = (
        tensors(merge(models["a"], models["b"], tmp_path / f"{i}.safetensors", blocks=blocks).path)
        for i, blocks in enumerate((one, two))
    )
    assert all(same(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("family", "last"),
    [("sd1", 11), ("sd2-v", 11), ("x4-upscaler", 11), ("sdxl-base", 8), ("ssd-1b", 8), ("sdxl-refiner", 11)],
)
def test_families_have_the_blocks_that_people_know(family: str, last: int) -> None:
    config = FAMILIES[family]
    count = last + 1
    assert unet_blocks(config) == [*(f"IN{i:02}" for i in range(count)), "MID", *(f"OUT{i:02}" for i in range(count))]
    assert block_of(f"unet.output_blocks.{last}.0.in_layers.0.weight", config) == f"OUT{last:02}"
    assert block_of("unet.out.2.bias", config) == f"OUT{last:02}"
    assert block_of("unet.label_emb.0.0.weight", config) == "IN00"
    assert weights_of([0.5] * (2 * count + 1), config).keys() == set(unet_blocks(config))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"IN12": 0.5},
            "blocks: IN12 is no block of sd1 (meant IN11?); there are IN00 to IN11, MID, OUT00 to OUT11, TEXT, VAE",
        ),
        ({"TEX": 0.5}, "blocks: TEX is no block of sd1 (meant TEXT?)"),
        ({"VISION": 0.5}, "is no block of sd1"),
        ({"MID": 0.5, "M00": 0.5}, "blocks: MID is given twice"),
        ([0.5] * 19, "blocks: 19 numbers; the UNet of sd1 has 25 blocks (IN00 to OUT11): give as many, or name blocks"),
    ],
)
def test_blocks_that_are_not_there_are_refused(blocks: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        weights_of(blocks, FAMILIES["sd1"])
    assert message in str(error.value)


# --- inpainting -----------------------------------------------------------------------------------------------------


def inpainting(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "model.diffusion_model.input_blocks.0.0.weight": weight("nine channels", (32, 9, 3, 3))}


INPAINTING = replace(
    TINY, name="sd1-inpainting", unet=replace(TINY.unet, in_channels=9), concat=("mask", "masked_image")
)


def test_an_inpainting_model_gets_the_difference_of_two_others(models, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    state = inpainting(models["states"]["a"])
    a = saved(state, tmp_path / "a.safetensors", INPAINTING)
    done = merge(a, models["b"], tmp_path / "x.safetensors", c=models["c"], method="add-difference", alpha=1)
    found = tensors(done.path)
    b, c = (models["states"][name][key] for name in "bc")
    assert torch.allclose(
        found[key][:, :4], state[key][:, :4] + (b - c), rtol=0, atol=4 * U * 4 * state[key].abs().max().item()
    )
    assert not found[key][:, :4].equal(state[key][:, :4])
    assert same(found[key][:, 4:], state[key][:, 4:])
    assert "the 4 latent channels of the UNet's input got the difference, its other channels are A's" in done.lines()
    assert load(done.path).config == INPAINTING


def test_an_inpainting_model_is_merged_with_no_other_in_any_other_way(models, tmp_path: Path) -> None:
    a = saved(inpainting(models["states"]["a"]), tmp_path / "a.safetensors", INPAINTING)
    for sides, options in (
        ((a, models["b"]), {}),
        ((models["b"], a), {}),
        ((a, models["b"]), {"c": a, "method": "add-difference"}),
        ((models["a"], a), {"c": models["c"], "method": "add-difference"}),
    ):
        with pytest.raises(FileError, match=r"an SD 1 inpainting model.*merge models of one family"):
            merge(*sides, tmp_path / "x.safetensors", **options)
    assert not (tmp_path / "x.safetensors").exists()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "average"}, "method: 'average'; there are weighted, add-difference, slerp"),
        ({"method": "add-difference"}, "method: add-difference needs a third model, C"),
        ({"c": "c.safetensors"}, "takes two models; the third is for add-difference"),
        ({"alpha": 1.5}, "alpha: 1.5; give 0 to 1 for weighted"),
        ({"alpha": float("nan")}, "alpha: nan; give 0 to 1"),
        ({"alpha": "0.5"}, "alpha: 0.5; give 0 to 1"),
        ({"alpha": -2.5, "method": "add-difference", "c": "c"}, "alpha: -2.5; give -2 to 2 for add-difference"),
        ({"blocks": {"IN00": -1}}, "blocks: IN00: -1; give 0 to 1"),
        ({"blocks": [0.5, 3]}, "blocks: 1: 3; give 0 to 1"),
        ({"dtype": torch.int8}, "cannot hold weights"),
        ({"prediction": "x0"}, "prediction is 'x0'"),
    ],
)
def test_arguments_are_checked_before_files_are_opened(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError) as error:
        merge("nowhere.safetensors", "nowhere.safetensors", tmp_path / "x.safetensors", **options)
    assert message in str(error.value)


def test_the_output_is_checked_before_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        merge("nowhere.safetensors", "nowhere.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="does not exist"):
        merge("nowhere.safetensors", "nowhere.safetensors", tmp_path / "x.safetensors", overwrite=True)
    assert (tmp_path / "x.safetensors").read_bytes() == b"mine"


def test_a_folder_as_a_is_refused_with_what_to_do(models, tmp_path: Path) -> None:
    (tmp_path / "folder" / "unet").mkdir(parents=True)
    with pytest.raises(FileError, match=r"is a diffusers folder.*convert it first \(ldm convert\)"):
        merge(tmp_path / "folder", models["b"], tmp_path / "x.safetensors")


def test_models_of_two_families_are_refused_with_both_names(models, tmp_path: Path) -> None:
    sd2 = replace(TINY, name="sd2-base", unet=replace(TINY.unet, linear_proj=True))
    b = saved(
        models["states"]["b"]
        | {
            key: value[:, :, 0, 0]
            for key, value in models["states"]["b"].items()
            if ".proj_" in key and value.ndim == 4 and "first" not in key
        },
        tmp_path / "b.safetensors",
        sd2,
    )
    with pytest.raises(
        FileError, match=r"B is an SD 2 model and A \(a.safetensors\) is an SD 1 model; merge models of one family"
    ):
        merge(models["a"], b, tmp_path / "x.safetensors")


def test_models_that_predict_different_things_are_refused(models, tmp_path: Path) -> None:
    b = saved(models["states"]["b"], tmp_path / "b.safetensors", replace(TINY, prediction="v"))
    with pytest.raises(FileError, match="B predicts v and A predicts eps; no average of the two works"):
        merge(models["a"], b, tmp_path / "x.safetensors")
    assert merge(models["a"], b, tmp_path / "x.safetensors", prediction="eps").merged


def test_sd_2_models_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    state = single("sd2-base")
    a = saved(state, tmp_path / "a.safetensors", tiny("sd2-base"))
    parts = components("sd2-base", state)
    b = write_folder(tmp_path / "b", "sd2-base", parts)
    shutil.rmtree(b / "scheduler")  # which would tell
    key = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    assert same(parts["unet"][key], state[STATISTIC])
    for factor, error, message in (
        (10, FileError, "B predicts v and A predicts eps"),
        (4.5, AmbiguousCheckpoint, r"may predict eps or v .*pass prediction='eps' or 'v'"),
    ):
        save_safetensors(
            {**parts["unet"], key: parts["unet"][key] * factor}, b / "unet" / "diffusion_pytorch_model.safetensors"
        )
        with pytest.raises(error, match=message):
            merge(a, b, tmp_path / "x.safetensors")


def test_models_of_two_schedules_are_refused(models, tmp_path: Path) -> None:
    v, said = (
        replace(TINY, prediction="v"),
        replace(TINY, prediction="v", schedule=replace(TINY.schedule, zero_snr=True)),
    )
    plain = saved(models["states"]["a"], tmp_path / "a.safetensors", v)
    marked = saved({**models["states"]["b"], "ztsnr": torch.zeros(0)}, tmp_path / "b.safetensors", v)
    for second in (marked, saved(models["states"]["b"], tmp_path / "d.safetensors", said)):
        with pytest.raises(FileError, match="B was trained with another noise schedule than A"):
            merge(plain, second, tmp_path / "x.safetensors")
        done = merge(marked, second, tmp_path / "y.safetensors", overwrite=True)
        assert "ztsnr" in tensors(done.path)
        with open_file(done.path) as file:
            assert file.metadata["ldm.config"] == to_json(said)
    longer = saved(
        models["states"]["b"], tmp_path / "c.safetensors", replace(TINY, schedule=replace(TINY.schedule, end=0.02))
    )
    with pytest.raises(FileError, match="B was trained with another noise schedule than A"):
        merge(models["a"], longer, tmp_path / "z.safetensors")


def test_what_b_lacks_is_an_error_unless_partial(models, tmp_path: Path) -> None:
    gone = {key for key in models["states"]["b"] if key.startswith("first_stage_model.decoder.mid.")}
    b = saved(
        {key: value for key, value in models["states"]["b"].items() if key not in gone}, tmp_path / "b.safetensors"
    )
    with pytest.raises(
        FileError,
        match=rf"B lacks {len(gone)} parameters that A has \(.+block_1.norm1.weight.+; partial=True keeps A's",
    ):
        merge(models["a"], b, tmp_path / "x.safetensors")
    done = merge(models["a"], b, tmp_path / "x.safetensors", partial=True, dtype=torch.float16)
    assert {key for key, why in done.kept.items() if "partial" in why} == gone
    found = tensors(done.path)
    assert all(same(found[key], models["states"]["a"][key].half()) for key in gone)
    assert f"{len(gone)} kept as in A: not every model has it (partial)" in done.lines()


def test_what_a_lacks_the_result_lacks_too(models, tmp_path: Path) -> None:
    state = {key: value for key, value in models["states"]["a"].items() if not key.startswith("first_stage_model.")}
    done = merge(
        save_safetensors(state, tmp_path / "a.safetensors"), models["b"], tmp_path / "x.safetensors", config=TINY
    )
    assert tensors(done.path).keys() == state.keys()
    assert set(done.unused["B"]) == models["states"]["a"].keys() - state.keys()
    with open_file(done.path) as file:
        assert "ldm.config" not in file.metadata


def test_a_tensor_of_another_shape_is_refused_by_name(models, tmp_path: Path) -> None:
    key = "model.diffusion_model.time_embed.2.weight"
    b = saved({**models["states"]["b"], key: torch.zeros(128, 64)}, tmp_path / "b.safetensors")
    with pytest.raises(
        FileError, match=r"time_embed.2.weight is \[128, 64\] in B, \[128, 128\] would go with A"
    ) as error:
        merge(models["a"], b, tmp_path / "x.safetensors")
    assert error.value.key == key


def test_numbers_that_are_no_weights_and_names_that_are_there_twice_are_refused(models, tmp_path: Path) -> None:
    key = "model.diffusion_model.time_embed.2.weight"
    b = saved({**models["states"]["b"], key: torch.zeros(128, 128, dtype=torch.int8)}, tmp_path / "b.safetensors")
    with pytest.raises(FileError, match=f"{key} holds torch.int8 numbers.*quantised"):
        merge(models["a"], b, tmp_path / "x.safetensors")
    text = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    b = saved({**models["states"]["b"], text.replace("text_model.", ""): torch.zeros(64)}, tmp_path / "c.safetensors")
    with pytest.raises(FileError, match=r"final_layer_norm.bias twice, also as .+; which is right cannot be known"):
        merge(models["a"], b, tmp_path / "x.safetensors")


def test_a_source_that_changes_meanwhile_leaves_nothing(models, tmp_path: Path) -> None:
    b = shutil.copy(models["b"], tmp_path / "b.safetensors")
    before = sorted(tmp_path.iterdir())

    def spoil(written: Any) -> None:
        with open(b, "r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")

    with pytest.raises(FileError, match="changed while it was being read"):
        merge(models["a"], b, tmp_path / "x.safetensors", on_write=spoil)
    assert sorted(tmp_path.iterdir()) == before


# --- command line ---------------------------------------------------------------------------------------------------


def test_the_command_merges_and_says_what_it_did(models, ldm, tmp_path: Path) -> None:
    line = (
        f"merge {models['a']} {models['b']} {models['c']} --out {tmp_path}/x.ckpt --method add-difference --alpha "
        "0.4 --blocks IN01=0.2,TEXT=0 --dtype bf16"
    )
    code, out, err = ldm(line)
    assert (code, out) == (0, [f"{tmp_path}/x.ckpt"])
    assert (
        "ldm: 12 kept as in A: noise schedule: computed anew in float64, because stored copies may be float16 or absent"
        in err
    )
    options = {
        "c": models["c"],
        "method": "add-difference",
        "alpha": 0.4,
        "blocks": {"IN01": 0.2, "TEXT": 0},
        "dtype": torch.bfloat16,
    }
    wanted = tensors(merge(models["a"], models["b"], tmp_path / "y.safetensors", **options).path)
    assert all(same(value, wanted[key]) for key, value in tensors(tmp_path / "x.ckpt").items())
    assert ldm(line)[0::2] == (
        3,
        [f"ldm: error: {tmp_path}/x.ckpt: exists already; choose another name or --overwrite"],
    )
    assert ldm(f"{line} --overwrite")[0] == 0
    numbers = ",".join(["0.25"] * 9)
    assert (
        ldm(f"merge {models['a']} {models['b']} --out {tmp_path}/z.safetensors --blocks {numbers} --alpha 0.25")[0] == 0
    )
    wanted = tensors(merge(models["a"], models["b"], tmp_path / "w.safetensors", alpha=0.25).path)
    assert all(same(value, wanted[key]) for key, value in tensors(tmp_path / "z.safetensors").items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--blocks IN00=0.2,0.3", "--blocks: '0.3' is no weight of a block"),
        ("--blocks IN00=0.2,IN00=0.3", "--blocks: IN00 is given twice"),
        ("--blocks IN00=x", "--blocks: 'x' is not a number"),
        ("--blocks IN04=1", "blocks: IN04 is no block of sd1 (meant IN0"),
        ("--alpha 3", "alpha: 3.0; give 0 to 1 for weighted"),
        ("--dtype int8", "--dtype: 'int8' is unknown; use fp32, fp16 or bf16"),
        ("--method mean", "--method: invalid choice: 'mean'"),
    ],
)
def test_the_command_refuses_in_a_line(models, ldm, arguments: str, message: str, tmp_path: Path) -> None:
    code, out, err = ldm(f"merge {models['a']} {models['b']} --out {tmp_path}/x.safetensors {arguments}")
    assert (code, out, len(err)) == (2, [], 1)
    assert message in err[0]
    assert not list(tmp_path.iterdir())


def test_the_command_names_its_options_in_errors(models, ldm, tmp_path: Path) -> None:
    b = saved(
        {key: value for key, value in models["states"]["b"].items() if "decoder.mid" not in key},
        tmp_path / "b.safetensors",
    )
    line = f"merge {models['a']} {b} --out {tmp_path}/x.safetensors"
    code, _, err = ldm(line)
    assert code == 2
    assert err[0].endswith("--partial keeps A's")
    assert ldm(f"{line} --partial")[0] == 0


def test_models_of_the_same_networks_go_together_whatever_they_are_called(tmp_path):
    """A folder does not keep the name that a file of its own sizes gives itself."""
    source = save_safetensors(checkpoint(), tmp_path / "source.safetensors")
    paths = [
        convert(source, tmp_path / f"{name}.safetensors", config=replace(TINY, name=name)).path
        for name in ("mine", "sd1")
    ]
    merge(*paths, tmp_path / "out.safetensors", alpha=0.5)
    odd = replace(TINY, name="odd", text=(replace(TINY.text[0], heads=2),))
    other = convert(source, tmp_path / "odd.safetensors", config=odd).path
    with pytest.raises(FileError, match="merge models of one family"):
        merge(paths[0], other, tmp_path / "no.safetensors")
