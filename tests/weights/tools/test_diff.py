"""`weights.diff` and `ldm diff`: what B is to A, for copies, conversions, trainings and merges whose making the test
knows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.folders import components, single, write_folder
from benchmarks.models.seeded import normal, weight
from ldm.cli.differing import DIFFERENT
from ldm.config import FAMILIES
from ldm.errors import ArgumentError, FileError
from tests.made.checkpoints import TINY, checkpoint, ema_name, save_safetensors, save_stream, save_zip
from weights import diff
from weights.tools import closeness
from weights.tools.closeness import nearness, products, rank
from weights.tools.diff import Difference

State = dict[str, Tensor]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


SMALL = replace(  # of SD 1's make: one level, one layer, 295 tensors
    TINY, unet=replace(TINY.unet, channel_mult=(1,), down_depth=((1,),), up_depth=((1, 1),), cross_only=(False,)),
    vae=replace(TINY.vae, channel_mult=(1,)), text=(replace(TINY.text[0], layers=1),),
)  # fmt: skip


@pytest.fixture(scope="module")
def state() -> State:
    """A small SD 1 checkpoint with its noise schedule and the bookkeeping of its moving average."""
    return checkpoint(SMALL)


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, dict[str, State], Path, Path]:
    """All layers of SD 1 inpainting, narrow: a checkpoint and the components of a folder with the VAE's first names,
    and both on the disk."""
    state, directory = single("sd1-inpainting"), tmp_path_factory.mktemp("sd1")
    parts = components("sd1-inpainting", state)
    return (
        state,
        parts,
        save_safetensors(state, directory / "x.safetensors"),
        write_folder(directory / "x", "sd1-inpainting", parts),
    )


@pytest.fixture(scope="module")
def a(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_safetensors(state, tmp_path_factory.mktemp("a") / "a.safetensors")


@pytest.fixture
def against(a: Path, tmp_path: Path) -> Callable[..., Difference]:
    """The difference between `a` and a file of these tensors; or between files of two states."""

    def run(b: State, first: State | None = None, **options) -> Difference:
        one = a if first is None else save_safetensors(first, tmp_path / "first.safetensors")
        return diff(one, save_safetensors(b, tmp_path / "b.safetensors"), **options)

    return run


def changed(state: State, prefix: str, change: Callable[[str, Tensor], Tensor]) -> State:
    """The state with every floating-point tensor under `prefix` changed."""
    return {
        key: change(key, value).contiguous() if key.startswith(prefix) and value.is_floating_point() else value
        for key, value in state.items()
    }


def cast(state: State, dtype: torch.dtype) -> State:
    return changed(state, "", lambda key, value: value.to(dtype))


def noisy(share: float) -> Callable[[str, Tensor], Tensor]:
    """Noise of this share of the tensor's own norm."""
    return lambda key, value: (
        value
        + share
        * value.norm()
        * torch.nn.functional.normalize(normal("noise " + key, value.shape).flatten(), dim=0).view(value.shape)
    )


def low_rank(rank: int, share: float = 0.1) -> Callable[[str, Tensor], Tensor]:
    def change(key: str, value: Tensor) -> Tensor:
        m = value.flatten(1)
        product = normal("up " + key, (m.shape[0], rank)) @ normal("down " + key, (rank, m.shape[1]))
        return value + (share * m.norm() / product.norm() * product).view(value.shape)

    return change


def only(pattern: str, change: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """The change, of matrices with `pattern` in their names."""
    return lambda key, value: change(key, value) if pattern in key and value.ndim > 1 else value


def counts(found: Difference) -> dict[str, tuple[int, int, int]]:
    return {one.name: (one.equal, one.rounded, one.different) for one in found.components if one.shared}


# -- the same tensors --------------------------------------------------------------------------------------------------


def test_a_file_is_identical_to_itself(a: Path, state: State) -> None:
    found = diff(a, a)
    assert found.verdict.kind == "identical"
    assert found.same
    assert found.verdict.text == f"A and B hold the same {len(state)} tensors, bit by bit."
    assert counts(found) == {"unet": (168, 0, 0), "vae": (92, 0, 0), "text.0": (20, 0, 0), "other": (15, 0, 0)}


@pytest.mark.parametrize("save", [save_zip, save_stream])
def test_another_container_is_a_conversion(save, a: Path, state: State, tmp_path: Path) -> None:
    found = diff(a, save({"state_dict": state}, tmp_path / "b.ckpt"))
    assert found.verdict.kind == "converted"
    assert found.same
    assert "torch checkpoint" in found.verdict.text
    assert not found.different
    assert not found.only_a
    assert not found.only_b


@pytest.mark.parametrize("family", ["sd2-depth", "ssd-1b", "sd-image-variations"])
def test_a_folder_of_the_same_tensors_is_a_conversion_both_ways(family: str, tmp_path: Path) -> None:
    state = single(family)
    one, two = (
        save_safetensors(state, tmp_path / "x.safetensors"),
        write_folder(tmp_path / "x", family, components(family, state)),
    )
    found = diff(one, two)
    assert found.verdict.kind == "converted"
    assert found.same
    assert found.names == "parameters"
    assert found.verdict.text.startswith("B is A, bit by bit, as a diffusers folder")
    assert all(one.different == one.rounded == 0 for one in found.components)
    assert all(found.only_a.values()), "every key that the folder lacks is a known leftover"
    others = {"sd2-depth": {"text.0", "depth"}, "ssd-1b": {"text.0", "text.1"}, "sd-image-variations": {"vision"}}[
        family
    ]
    assert set(counts(found)) - {"other"} == {"unet", "vae", *others}
    if family == "sd2-depth":  # one row of the matrix that OpenCLIP stacks q, k and v in: the first of k
        stacked = state["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"]
        stacked[len(stacked) // 3] += 1
        found = diff(save_safetensors(state, one), two)
        assert [entry.name for entry in found.different] == [
            "text.0.text_model.encoder.layers.3.self_attn.k_proj.weight"
        ]
        assert found.different[0].near.largest == pytest.approx(1, abs=1e-6)
        assert not found.same
        assert found.verdict.text == "B is A with a LoRA of rank about 1 merged into 1 weights of its text tower 0."


def test_the_other_way_round_the_folder_is_the_copy(inpainting) -> None:
    *_, file, folder = inpainting
    found = diff(file, folder)
    assert found.verdict.text == "B is A, bit by bit, as a diffusers folder, without 14 leftovers."
    assert counts(found) == {"unet": (686, 0, 0), "vae": (248, 0, 0), "text.0": (196, 0, 0), "other": (1, 0, 0)}
    assert diff(folder, file).verdict.text == "A is B, bit by bit, as a diffusers folder, without 14 leftovers."


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_a_rounded_copy_is_known_in_both_directions(dtype: torch.dtype, name: str, state: State, against) -> None:
    narrow = cast(state, dtype)
    found = against(narrow)
    assert found.verdict.kind == "rounded"
    assert found.verdict.text == f"B is A in {name}."
    assert not found.same
    assert counts(found)["unet"] == (0, 168, 0)
    assert found.retyped == {f"float32 -> {name}": sum(value.is_floating_point() for value in state.values())}
    assert against(state, narrow).verdict.text == f"A is B in {name}."
    back = against(cast(narrow, torch.float32))  # a copy in float32 of the copy in float16
    assert back.verdict.text == f"B is A rounded to {name}."
    wider = against(cast(narrow, torch.float32), narrow)
    assert wider.verdict.text == "B is A in a wider type (nothing was lost)."


def test_float16_and_bfloat16_copies_of_one_file_are_the_same_but_for_rounding(state: State, against) -> None:
    found = against(cast(state, torch.bfloat16), cast(state, torch.float16))
    assert found.verdict.text == "B is A in bfloat16."
    assert not found.different


def test_another_order_of_sums_is_rounding(state: State, against) -> None:
    found = against(changed(state, VAE, lambda key, value: 0.7 * value + 0.3 * value))
    assert found.verdict.kind == "rounded"
    assert found.verdict.text.startswith("B is A up to rounding: ")
    assert counts(found)["vae"][2] > 0


def test_zeros_of_two_signs_are_not_the_same_bits() -> None:
    near = nearness(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert (near.relation, near.within, near.distance) == ("different", True, 0.0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint64, torch.int32])
def test_whole_numbers_are_compared_exactly_in_every_type(dtype: torch.dtype) -> None:
    ones = torch.tensor([0, 1]).to(dtype)
    assert nearness(ones, torch.tensor([0.0, 1.0])).relation == "rounded"
    assert nearness(ones, torch.tensor([0.0, 1.5])).relation == "different"
    assert nearness(ones, torch.tensor([1, 0]).to(dtype)).largest == 1


def test_sums_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal("a", (3, 41)), normal("b", (3, 41))
    whole = nearness(a, b), products([a, b, a + 1])
    monkeypatch.setattr(closeness, "CHUNK", 10)
    pieces = nearness(a, b), products([a, b, a + 1])
    assert (pieces[0].norm, pieces[0].distance) == pytest.approx((whole[0].norm, whole[0].distance), rel=1e-14)
    assert pieces[0].largest == whole[0].largest == (b.double() - a.double()).abs().max().item()
    assert pieces[1] == pytest.approx(whole[1], rel=1e-13)


@pytest.mark.parametrize("shape", [(40, 40), (40, 200), (200, 40), (16, 4, 3, 3)])
def test_the_rank_of_a_difference_is_that_of_its_factors(shape: tuple[int, ...]) -> None:
    a, inner = normal("a", shape), math.prod(shape[1:])
    product = 0.05 * (normal("up", (shape[0], 3)) @ normal("down", (3, inner))).view(shape)
    assert (
        torch.linalg.matrix_rank(product.flatten(1)) == 3
    )  # torch's own count, of the product without rounding to a sum
    for dtype in (torch.float32, torch.float16):
        assert rank(a, (a + product).to(dtype)) == 3
    assert rank(a, a + 0.05 * normal("noise", shape)) == min(shape[0], inner)
    assert rank(a, a.half()) == 0, "rounding alone has no rank"


# -- less than the same ------------------------------------------------------------------------------------------------


def test_a_pruned_copy_lacks_the_moving_average_and_leftovers(against) -> None:
    full = checkpoint(SMALL, ema="full")
    pruned = {key: value for key, value in full.items() if "model_ema" not in key}
    found = against(pruned, full)
    assert found.verdict.kind == "pruned"
    assert found.verdict.text == "B is A, bit by bit, without the moving average (168 tensors) and 2 leftovers."
    assert set(found.only_a) == set(full) - set(pruned)
    assert sum(reason == "moving average of the weights" for reason in found.only_a.values()) == 168
    assert against(full, pruned).verdict.text.startswith("A is B, bit by bit, without the moving average")
    assert (
        against(cast(pruned, torch.float16), full).verdict.text
        == "B is A in float16, without the moving average (168 tensors) and 2 leftovers."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_moving_average_as_weights_is_found_out(dtype: torch.dtype, against) -> None:
    full = checkpoint(SMALL, ema="full")
    averaged = {key: full.get(ema_name(key), value) for key, value in full.items() if "model_ema" not in key}
    found = against(cast(averaged, dtype), full)
    assert found.verdict.kind == "averaged"
    assert found.verdict.text == "B is A with the moving average as its weights."
    assert against(full, averaged).verdict.text == "A is B with the moving average as its weights."
    averaged[f"{UNET}out.2.weight"] = averaged[f"{UNET}out.2.weight"] + 1  # all but one tensor are not enough
    assert against(averaged, full).verdict.kind != "averaged"


def test_a_part_is_known_by_what_it_lacks(state: State, against, tmp_path: Path) -> None:
    vae = {key.removeprefix(VAE): value for key, value in state.items() if key.startswith(VAE)}
    found = against(vae)
    assert found.verdict.kind == "part"
    assert found.verdict.text == "B is a part of A: its VAE."
    assert (found.a.title, found.b.title) == ("an SD 1 model", "a VAE")
    unet = {key.removeprefix(UNET): value for key, value in state.items() if key.startswith(UNET)}
    assert against(unet).verdict.text == "B is a part of A: its UNet."
    assert against(state, unet).verdict.text == "A is a part of B: its UNet."


def test_a_vae_alone_is_compared_with_diffusers_names_for_it(inpainting, tmp_path: Path) -> None:
    state, _, whole, folder = inpainting
    original = save_safetensors(
        {key.removeprefix(VAE): value for key, value in state.items() if key.startswith(VAE)},
        tmp_path / "vae.safetensors",
    )
    found = diff(original, folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert found.verdict.text == "B is A, bit by bit, under other names."
    assert found.same
    assert counts(found) == {"vae": (248, 0, 0)}
    assert (
        diff(whole, folder / "unet" / "diffusion_pytorch_model.safetensors").verdict.text
        == "B is a part of A: its UNet."
    )


def test_a_model_that_lacks_tensors_is_compared_by_its_keys_or_as_config_says(inpainting, tmp_path: Path) -> None:
    state, parts, *_ = inpainting
    less = {key: value for key, value in state.items() if key != f"{UNET}out.2.weight"}
    unet = {key: value for key, value in parts["unet"].items() if key != "conv_out.weight"}
    one, two = (
        save_safetensors(less, tmp_path / "x.safetensors"),
        write_folder(tmp_path / "x", "sd1-inpainting", parts | {"unet": unet}),
    )
    without = diff(one, two)
    assert without.names == "keys"
    assert without.verdict.kind == "unrelated"
    assert diff(one, one).verdict.kind == "identical"
    for config in ("sd1-inpainting", FAMILIES["sd1-inpainting"]):
        found = diff(one, two, config=config, quick=True)
        assert (found.names, found.verdict.kind, found.a.title) == (
            "parameters",
            "converted",
            "an SD 1 inpainting model",
        )


def test_tensors_missing_from_one_file_are_counted(state: State, against) -> None:
    less = {key: value for key, value in state.items() if "self_attn.v_proj" not in key}
    found = against(less)
    assert found.verdict.kind == "overlapping"
    assert found.verdict.text == "B is a part of A: 2 tensors are missing, the rest is the same."
    assert set(found.only_a.values()) == {""}
    more = {key: value for key, value in state.items() if "self_attn.k_proj" not in key}
    assert against(less, more).verdict.text == "What A and B both have is the same."


# -- trained, merged, swapped ------------------------------------------------------------------------------------------


def test_a_fine_tune_is_near_and_all_of_it_moved(state: State, against) -> None:
    tuned = changed(state, UNET, noisy(0.02))
    found = against(tuned)
    assert found.verdict.kind == "fine-tune"
    assert found.verdict.text == "B looks like a fine-tune of A, or A of B: all of its UNet moved, its matrices by 2 %."
    assert counts(found) == {"unet": (0, 0, 168), "vae": (92, 0, 0), "text.0": (20, 0, 0), "other": (15, 0, 0)}
    keys = [key for key in state if key.startswith(UNET)]
    apart = torch.cat([(tuned[key].double() - state[key].double()).flatten() for key in keys])
    norm = torch.cat([state[key].double().flatten() for key in keys]).norm()
    unet = found.components[0]
    assert unet.relative == pytest.approx((apart.norm() / norm).item(), rel=1e-12)  # both are sums in float64
    assert unet.largest == apart.abs().max().item()
    worst = max(
        keys, key=lambda key: ((tuned[key].double() - state[key].double()).norm() / state[key].double().norm()).item()
    )
    assert found.different[0].name == "unet." + worst.removeprefix(UNET)


def test_a_training_of_few_tensors_counts_them(state: State, against) -> None:
    found = against(changed(state, UNET, only("attn2.to_k", noisy(0.05))))
    assert found.verdict.kind == "fine-tune"
    moved = sum("attn2.to_k" in key for key in state)
    assert f"{moved} of 168 tensors of its UNet moved" in found.verdict.text
    assert all(one.rank > 0.9 * one.highest for one in found.ranks), "noise has full rank"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merged_lora_is_known_by_the_rank_of_the_difference(dtype: torch.dtype, state: State, against) -> None:
    merged = changed(changed(state, UNET, only("attn", low_rank(4))), TEXT, only("_proj.weight", low_rank(4)))
    found = against(cast(merged, dtype))
    assert found.verdict.kind == "lora"
    assert [one.rank for one in found.ranks] == [4] * 6
    assert "a LoRA of rank about 4" in found.verdict.text
    assert "its UNet and text tower 0" in found.verdict.text or "its text tower 0 and UNet" in found.verdict.text
    assert "no norm and no bias moved, and no convolution wider than 1x1" in found.verdict.evidence


def test_a_lora_of_convolutions_is_one_too_and_a_moved_norm_is_not(state: State, against) -> None:
    merged = changed(state, UNET, only("layers.", low_rank(4)))
    found = against(merged)
    assert found.verdict.kind == "lora"
    assert any("convolutions did" in line for line in found.verdict.evidence)
    merged[f"{UNET}out.0.weight"] = merged[f"{UNET}out.0.weight"] * 1.01
    assert against(merged).verdict.kind == "fine-tune"


def test_another_vae_or_text_tower_is_named(state: State, against) -> None:
    other = changed(state, VAE, lambda key, value: weight("other " + key, value.shape))
    found = against(other)
    assert (found.verdict.kind, found.verdict.text) == ("swapped", "B is A with another VAE.")
    assert against(cast(other, torch.float16)).verdict.text == "B is A with another VAE in float16."
    assert (
        against(changed(other, TEXT, noisy(0.01))).verdict.text
        == "B is A with its text tower 0 changed by 1 %, with another VAE."
    )
    lora = against(changed(other, UNET, only("attn", low_rank(2))))
    assert lora.verdict.kind == "lora"
    assert lora.verdict.text.endswith(", with another VAE.")


def test_a_merge_shows_its_weights_when_the_third_file_is_given(state: State, a: Path, tmp_path: Path) -> None:
    third = changed(changed(state, UNET, noisy(0.3)), VAE, lambda key, value: weight("other " + key, value.shape))
    c = save_safetensors(third, tmp_path / "c.safetensors")

    def merged(w: float, vae: float = 0.0) -> Path:
        state_b = changed(state, UNET, lambda key, value: ((1 - w) * value + w * third[key]).half())
        return save_safetensors(
            changed(state_b, VAE, lambda key, value: (1 - vae) * value + vae * third[key]), tmp_path / "b.safetensors"
        )

    found = diff(a, merged(0.3), third=c)
    assert found.verdict.kind == "merge"
    assert found.verdict.text == "B is a merge: 0.7 A + 0.3 C in its UNet (VAE 0)."
    unet = next(one for one in found.weights if one.component == "unet")
    # What rounding leaves of w is its projection on C - A: |error| / |C - A|, with errors of 2**-11 |B| at most, and |C
    # - A| = 0.3 |A|.
    assert unet.weight == pytest.approx(0.3, abs=2**-11 / 0.3)
    assert unet.fits
    assert unet.residual < 2 * unet.rounding
    both = diff(a, merged(0.5, 1.0), third=c)
    assert both.verdict.text == "B is a merge: 0.5 A + 0.5 C in its UNet (VAE 1)."
    assert diff(a, merged(0.0, 1.0), third=c).verdict.text == "B is A with the VAE of C in float16."
    by_block = changed(
        state, UNET, lambda key, value: torch.lerp(value, third[key], 0.2 if "input_blocks" in key else 0.6)
    )
    odd = diff(a, save_safetensors(by_block, tmp_path / "b.safetensors"), third=c)
    assert odd.verdict.kind == "fine-tune"
    assert not next(one for one in odd.weights if one.component == "unet").fits
    assert diff(a, merged(0.3)).weights == ()
    text = next(one for one in found.weights if one.component == "text.0")
    assert (text.weight, text.residual, text.fits) == (None, 0.0, True)


def test_far_and_farther_is_undecided_and_unrelated(state: State, against) -> None:
    assert against(changed(state, UNET, noisy(0.7))).verdict.kind == "undecided"
    found = against(changed(state, UNET, lambda key, value: weight("other " + key, value.shape)))
    assert found.verdict.kind == "unrelated"
    assert "trained apart" in found.verdict.text
    # Independent matrices of the same norm: sqrt(2), with a spread of a few percent for the smallest of them.
    matrices = [one.near.relative for one in found.different if len(one.shape) > 1 and math.prod(one.shape) > 1000]
    assert sum(matrices) / len(matrices) == pytest.approx(math.sqrt(2), rel=0.02)


# -- other things ------------------------------------------------------------------------------------------------------


def test_an_inpainting_model_differs_in_the_shape_of_one_tensor(state: State, against) -> None:
    wider = changed(state, UNET, noisy(0.01))
    first = f"{UNET}input_blocks.0.0.weight"
    wider[first] = torch.cat([wider[first], torch.zeros(32, 5, 3, 3)], dim=1)
    found = against(wider)
    assert (found.a.title, found.b.title) == ("an SD 1 model", "an SD 1 inpainting model")
    assert found.verdict.kind == "fine-tune"
    assert [(one.name, one.a, one.b) for one in found.reshaped] == [
        ("unet.input_blocks.0.0.weight", (32, 4, 3, 3), (32, 9, 3, 3))
    ]
    assert any("another shape" in line for line in found.verdict.evidence)
    untrained = against({**state, first: wider[first]})
    assert (untrained.verdict.kind, untrained.verdict.text) == ("overlapping", "What A and B both have is the same.")
    assert any("another shape" in line for line in untrained.verdict.evidence)


def test_families_and_kinds_that_differ_are_a_result(a: Path, state: State, inpainting, tmp_path: Path) -> None:
    sd2 = replace(
        SMALL, unet=replace(SMALL.unet, linear_proj=True, context_dim=96)
    )  # SD 1's names, one shape in ten another
    other = save_safetensors(checkpoint(sd2), tmp_path / "x.safetensors")
    found = diff(a, other)
    assert found.verdict.kind == "unrelated"
    assert found.verdict.text == "B is another network than A: A is an SD 1 model, B is an SD 2 model."
    assert "their VAE is the same" in found.verdict.evidence
    assert diff(inpainting[3], other, quick=True).verdict.kind == "unrelated"
    lora = save_safetensors(
        {"lora_unet_x.lora_up.weight": torch.ones(4, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 4)},
        tmp_path / "l.safetensors",
    )
    found = diff(a, lora)
    assert found.verdict.text == "A and B have no network in common: A is an SD 1 model, B is a LoRA."
    assert len(found.only_a) == len(state)
    assert len(found.only_b) == 2


def test_loras_are_compared_by_their_own_keys(against) -> None:
    names = [
        f"lora_{where}_{i}.lora_{part}.weight"
        for where in ("unet_x", "te_text_model")
        for i in range(3)
        for part in ("up", "down")
    ]
    one = {name: normal(name, (8, 4)) for name in names} | {"lora_unet_x_0.alpha": torch.tensor(4.0)}
    assert against(one, one).verdict.kind == "identical"
    found = against(cast(one, torch.float16), one)
    assert (found.names, found.verdict.text) == ("keys", "B is A in float16.")
    assert {part.name for part in found.components} == {"unet", "text.0"}
    assert against(changed(one, "lora", noisy(0.1)), one).verdict.kind == "fine-tune"
    assert (
        against(changed(one, "lora", lambda key, value: normal("other " + key, value.shape)), one).verdict.kind
        == "unrelated"
    )
    less = {key: value for key, value in one.items() if "unet" in key}
    assert against(less, one).verdict.text == "B is a part of A: its UNet."
    reshaped = {key: value if value.ndim == 0 else value[:, :2].contiguous() for key, value in one.items()}
    assert against(reshaped, one).verdict.kind == "unrelated", "equal alphas alone are no likeness"


def test_position_ids_are_compared_exactly_whatever_their_type(state: State, against) -> None:
    floats = {**state, POSITION_IDS: state[POSITION_IDS].half()}
    found = against(floats)
    assert not found.different
    assert found.retyped == {"int64 -> float16": 1}
    damaged = {**state, POSITION_IDS: state[POSITION_IDS].flip(1).contiguous()}
    found = against(damaged)
    assert found.verdict.kind == "leftovers"
    assert not found.same
    assert [one.name for one in found.different] == ["text.0.position_ids"]
    assert any("text.0.position_ids" in line for line in found.verdict.evidence)
    off = state[POSITION_IDS].clone()
    off[0, -1] += 1
    assert [one.name for one in against({**state, POSITION_IDS: off.to(torch.float32)}).different] == [
        "text.0.position_ids"
    ]


def test_numbers_that_are_not_finite_are_named_and_left_out_of_sums(state: State, against) -> None:
    bad = {key: value.clone() for key, value in state.items()}
    bad[f"{UNET}out.2.weight"][0, 0] = math.nan
    bad[f"{VAE}decoder.conv_in.bias"][0] = math.inf
    found = against(bad)
    assert found.not_finite == {"unet.out.2.weight": "b", "vae.decoder.conv_in.bias": "b"}
    assert [(one.name, one.near.largest) for one in found.different] == [
        ("unet.out.2.weight", 0.0),
        ("vae.decoder.conv_in.bias", 0.0),
    ]
    assert against(bad, bad).verdict.kind == "identical"
    assert set(against(bad, bad).not_finite.values()) == {"both"}
    json.dumps(found.as_dict(), allow_nan=False)


def test_quick_reads_a_few_tensors_of_each_component_and_says_which(state: State, a: Path, tmp_path: Path) -> None:
    b = save_safetensors(changed(state, UNET, noisy(0.02)), tmp_path / "b.safetensors")
    read: list[str] = []
    found = diff(a, b, quick=True, on_read=lambda one: read.append(one.name))
    assert tuple(read) == found.quick
    assert sum(name.startswith("unet.") for name in read) == 8
    assert len(read) < 40
    assert found.verdict.kind == "fine-tune"
    assert f"only {len(read)} of {len(state)} tensors were compared" in found.verdict.evidence
    assert diff(a, a, quick=True).verdict.kind == "identical"
    narrow = save_safetensors(cast(state, torch.float16), tmp_path / "c.safetensors")
    assert diff(a, narrow, quick=True).retyped == diff(a, narrow).retyped, "types of all tensors"
    assert diff(a, a).quick is None


def test_progress_counts_the_bytes_of_all_files(state: State, a: Path) -> None:
    told = []
    diff(a, a, third=a, on_read=told.append)
    networks = sum(
        value.nbytes for key, value in state.items() if key.startswith((UNET, VAE, TEXT)) and value.is_floating_point()
    )
    assert told[-1].done == told[-1].total == 2 * sum(value.nbytes for value in state.values()) + 3 * networks
    assert [one.done for one in told] == sorted(one.done for one in told)


def test_a_file_that_changes_meanwhile_is_refused(state: State, a: Path, tmp_path: Path) -> None:
    b = save_safetensors(state, tmp_path / "b.safetensors")
    with pytest.raises(FileError, match="changed while it was being read"):
        diff(a, b, quick=True, on_read=lambda read: os.utime(b, (1, 1)))


def test_unreadable_files_and_unknown_configs_are_errors(a: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        diff(a, tmp_path / "gone.safetensors")
    with pytest.raises(ArgumentError, match="config 'sd9' is no family"):
        diff(a, a, config="sd9")
    with pytest.raises(ArgumentError, match="neither a ModelConfig nor the name"):
        diff(a, a, config=1)  # type: ignore[arg-type]


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_gives_the_verdict_first_and_0_for_any_result(state: State, a: Path, tmp_path: Path, ldm) -> None:
    b = save_safetensors(changed(state, UNET, noisy(0.02)), tmp_path / "b.safetensors")
    code, out, err = ldm(f"diff {a} {b}")
    assert (code, err) == (0, [])
    assert out[0].startswith("B looks like a fine-tune of A")
    row = next(line.split() for line in out if line.startswith("unet "))
    assert row[:5] == ["unet", "168", "0", "0", "168"]
    assert any(line.startswith("differ most, of 168") for line in out)
    assert all(len(line) <= 200 for line in out)


def test_fail_on_difference_tells_the_same_tensors_from_others(state: State, a: Path, tmp_path: Path, ldm) -> None:
    copy = save_zip(state, tmp_path / "b.ckpt")
    assert ldm(f"diff {a} {copy} --fail-on-difference")[0] == 0
    half = save_safetensors(cast(state, torch.float16), tmp_path / "h.safetensors")
    assert ldm(f"diff {a} {half} --fail-on-difference")[0] == DIFFERENT == 6
    assert ldm(f"diff {a} {half}")[0] == 0


def test_json_is_one_document_with_every_number(state: State, a: Path, tmp_path: Path, ldm) -> None:
    other = changed(state, UNET, noisy(0.2))
    b = save_safetensors({**other, "extra": torch.zeros(2)}, tmp_path / "b.safetensors")
    code, out, _ = ldm(f"diff {a} {b} --third {b} --json")
    told = json.loads("\n".join(out))
    assert code == 0
    assert told["verdict"]["kind"] == "merge"
    assert told["same"] is False
    assert told["only_b"] == {"extra": ""}
    assert {one["name"] for one in told["components"]} == {"unet", "vae", "text.0", "other"}
    assert len(told["different"]) == 168
    assert set(told["different"][0]) == {"name", "component", "shape", "a", "b", "largest", "relative"}
    assert told["quick"] is None
    assert told["weights"][0]["weight"] == pytest.approx(1.0, abs=1e-12)
    code, out, _ = ldm(f"diff {a} {b} --quick --json")
    assert len(json.loads("\n".join(out))["quick"]) < 40


def test_the_report_lists_what_is_in_one_alone_and_what_is_odd(state: State, a: Path, tmp_path: Path, ldm) -> None:
    bad = {key: value.clone() for key, value in state.items() if not key.startswith("model_ema")}
    bad[f"{UNET}out.2.weight"] = bad[f"{UNET}out.2.weight"].half()
    bad[f"{UNET}out.2.bias"][0] = math.inf
    bad[f"{UNET}input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)
    bad["\x1b[31mred"] = torch.zeros(1)
    text = "\n".join(ldm(f"diff {a} {save_safetensors(bad, tmp_path / 'b.safetensors')} --quick")[1])
    assert "only in A: 2\n      2  bookkeeping of the moving average: model_ema.decay, model_ema.num_updates" in text
    assert "only in B: 1\n      1  no known reason: \\u001b[31mred" in text
    assert "other types: float32 -> float16 (1)" in text
    assert "other shapes: 1\n  unet.input_blocks.0.0.weight: [32, 4, 3, 3] -> [32, 9, 3, 3]" in text
    assert "NaN or infinity in: unet.out.2.bias (B)" in text
    assert "compared, because of --quick, only: " in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("diff {a} gone.safetensors", "gone.safetensors: does not exist"),
        ("diff {a} {a} --third gone.ckpt", "gone.ckpt: does not exist"),
        ("diff {a} {page}", "is a web page"),
        ("diff {a} {empty}", "is a directory"),
        ("diff {a} {a} --config sd9", "config 'sd9' is no family"),
        ("diff {a}", "the following arguments are required: B"),
        ("diff {a} {a} --fast", "--fast: unknown to ldm diff"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(line: str, message: str, a: Path, tmp_path: Path, ldm) -> None:
    page, empty = tmp_path / "page.ckpt", tmp_path / "empty"
    page.write_text("<!doctype html><title>404</title>")
    empty.mkdir()
    code, out, err = ldm(line.format(a=a, page=page, empty=empty))
    assert (code, out, len(err)) == (2, [], 1)
    assert message in err[0]
