"""diffusers folders: every family loads as its single file does, and nothing in a folder is believed before it was
checked."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.models.folders import FOLDERS, STATISTIC, components, folder_config, single, write_folder
from benchmarks.models.published import MANIFESTS, meaning, tiny
from ldm.config import FAMILIES, ScheduleConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError
from tests.made.checkpoints import save_safetensors, save_zip
from weights import load

# -- every family ------------------------------------------------------------------------------------------------------


def test_every_row_of_the_manifests_is_in_a_test():
    rows = {
        str(path.relative_to(MANIFESTS / "diffusers")).removesuffix(".json.gz")
        for path in MANIFESTS.glob("diffusers/*/*.gz")
    }
    used = {row for parts in FOLDERS.values() for row in parts.values()} - {""}
    # those two are in test_alone.py
    assert rows - used == {"sd1/safety_checker", "sd-image-variations/safety_checker"}


@pytest.mark.parametrize("family", FOLDERS)
def test_a_folder_and_a_single_file_of_the_same_weights_give_the_same_tensors(family: str, tmp_path: Path) -> None:
    state = single(family)
    folder = load(write_folder(tmp_path / "folder", family, components(family, state)))
    assert folder.config == folder_config(family)
    file = load(save_safetensors(state, tmp_path / "x.safetensors"), tiny(family))
    found, meant = folder.state_dict(), file.state_dict()
    unread = {
        name
        for name in meant
        if family.startswith(("sd2", "x4")) and (".layers.23." in name or "text_projection" in name)
    }
    assert set(found) == set(meant) - unread
    assert not [name for name, value in found.items() if not value.equal(meant[name])]


@pytest.fixture(scope="module")
def sd1():
    """The components of a folder, and the tensors that they mean."""
    state = single("sd1")
    return components("sd1", state), meaning(state)


def same(model, meant) -> bool:
    return all(value.equal(meant[name].to(value.dtype)) for name, value in model.state_dict().items())


# -- which file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "kind"), [("", "safetensors"), (".fp16", "safetensors"), ("", "bin"), (".fp16", "bin")]
)
def test_each_kind_of_file_is_read_where_it_is_the_only_one(variant: str, kind: str, sd1, tmp_path: Path) -> None:
    parts, meant = sd1
    assert same(load(write_folder(tmp_path / "x", "sd1", parts, variant=variant, kind=kind)), meant)


def test_safetensors_come_first_and_the_others_are_not_opened(sd1, tmp_path: Path) -> None:
    parts, meant = sd1
    path = write_folder(tmp_path / "x", "sd1", parts)
    for name, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        for other in (
            f"{stem}.fp16.safetensors",
            f"{stem}.bin",
            "pytorch_model.bin",
            f"{stem}.safetensors.index.json",
            "flax_model.msgpack",
        ):
            (path / name / other).write_bytes(b"not even a file of weights")
    (path / "unet" / "evil.py").write_text("raise SystemExit")
    assert same(load(path), meant)


def test_a_folder_of_links_into_a_cache_loads(sd1, tmp_path: Path) -> None:
    parts, meant = sd1
    path = write_folder(tmp_path / "snapshot", "sd1", parts)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate([*path.glob("*/*")]):
        file.rename(blobs / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    assert same(load(path), meant)


def shard(path: Path, tensors: dict[str, torch.Tensor], *, variant: str = "") -> Path:
    """The UNet in three files with an index, as diffusers writes them."""
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        name = f"diffusion_pytorch_model{variant}-0000{i + 1}-of-00003.safetensors"
        part = {key: value for j, (key, value) in enumerate(tensors.items()) if j % 3 == i}
        save_safetensors(part, path / "unet" / name)
        weight_map |= dict.fromkeys(part, name)
    index = path / "unet" / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_load(variant: str, sd1, tmp_path: Path) -> None:
    parts, meant = sd1
    path = write_folder(tmp_path / "x", "sd1", parts)
    shard(path, parts["unet"], variant=variant)
    assert same(load(path), meant)


def test_an_index_that_lies_is_refused(sd1, tmp_path: Path) -> None:
    parts, _ = sd1
    path = write_folder(tmp_path / "x", "sd1", parts)
    index = shard(path, parts["unet"])
    good = json.loads(index.read_text())
    first = next(iter(good["weight_map"]))

    def refused(weight_map, match: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FileError, match=match) as caught:
            load(path)
        assert caught.value.path == index

    for name in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..", "", "a/b", "a\\b", "C:x", "a\0b"):
        refused(good["weight_map"] | {first: name}, "not a plain name in its own folder")
    refused(good["weight_map"] | {first: "gone.safetensors"}, "names gone.safetensors, which is not there")
    refused(good["weight_map"] | {"more": good["weight_map"][first]}, "more is not in it")
    refused({key: name for key, name in good["weight_map"].items() if key != first}, f"{first} is in it unannounced")
    refused({}, "no weight_map")
    refused({"a": 1}, "no weight_map")
    refused({f"k{i}": f"f{i}" for i in range(1001)}, "the limit is 1000")
    for text in ("[]", "{", '{"weight_map": {"a": NaN}}', '{"a": 1, "a": 2}', "[" * 50_000, "\xff"):
        index.write_text(text, encoding="latin-1")
        with pytest.raises(FileError, match="JSON"):
            load(path)


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_incomplete_folders_are_refused(sd1, tmp_path: Path) -> None:
    parts, meant = sd1
    path = write_folder(tmp_path / "x", "sd1", parts)
    (path / "unet").rename(path / "other")
    with pytest.raises(FileError, match=r"model_index.json lists unet, and there is no folder"):
        load(path)
    (path / "model_index.json").write_text("{}")
    with pytest.raises(FileError, match="has no unet/ with weights"):
        load(path)
    (path / "other").rename(path / "unet")
    (path / "model_index.json").unlink()
    assert same(load(path), meant)  # the index is not needed
    (path / "text_encoder").rename(path / "other")
    with pytest.raises(FileError, match="has 0 text encoders, a model of family sd1 has 1"):
        load(path)
    (path / "other").rename(path / "text_encoder")
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileError, match=r"vae/ has no weights that this version knows"):
        load(path)
    with pytest.raises(FileError, match="is a directory; name the"):
        load(path / "vae")
    os.mkfifo(path / "vae" / "diffusion_pytorch_model.safetensors")
    start = time.monotonic()
    with pytest.raises(FileError, match="is a FIFO"):
        load(path)
    assert time.monotonic() - start < 10


def test_missing_unknown_and_misshapen_tensors_are_named_with_their_folder(sd1, tmp_path: Path) -> None:
    parts, _ = sd1
    unet = dict(parts["unet"])
    key = "down_blocks.0.resnets.0.norm1.bias"
    value = unet.pop(key)
    with pytest.raises(FileError, match=r"1 missing \(.*resnets.0.norm1.bias\)") as caught:
        load(write_folder(tmp_path / "a", "sd1", parts | {"unet": unet}))
    assert caught.value.key == f"unet/{key}"
    with pytest.raises(FileError, match=r"1 unknown \(unet/odd\)"):
        load(write_folder(tmp_path / "b", "sd1", parts | {"unet": unet | {key: value, "odd": torch.zeros(1)}}))
    with pytest.raises(FileError, match=r"1 of another shape \(.*norm1.bias \[31\] instead of \[32\]\)"):
        load(write_folder(tmp_path / "c", "sd1", parts | {"unet": unet | {key: value[:31].clone()}}))
    query = "encoder.mid_block.attentions.0.query.weight"
    with pytest.raises(FileError, match=r"to_q.weight twice, also as .+query.weight"):
        load(
            write_folder(
                tmp_path / "d",
                "sd1",
                parts | {"vae": parts["vae"] | {query: parts["vae"][query.replace("query", "to_q")].clone()}},
            )
        )
    with pytest.raises(FileError, match="this layout never holds one"):
        load(write_folder(tmp_path / "e", "sd1", parts), ema=True)


# -- config.json -------------------------------------------------------------------------------------------------------

BAD = {
    "unet": {
        "another class": ({"_class_name": "SD3Transformer2DModel"},
            "_class_name is SD3Transformer2DModel; this version knows UNet2DConditionModel"),
        "huge": ({"block_out_channels": [10**9] * 4}, "not a whole number from 1 to"),
        "text for a number": ({"in_channels": "4"}, "in_channels is 4, not a whole number"),
        "true for a number": ({"in_channels": True}, "in_channels is True, not a whole number"),
        "a list too long": ({"block_out_channels": [32] * 17}, "not a list of 1 to 16 items"),
        "odd widths": ({"block_out_channels": [32, 65, 128, 128]}, "not multiples of 32 and of the first"),
        "heads that do not divide": ({"attention_head_dim": 7}, "does not divide the widths"),
        "heads of no rule": ({"attention_head_dim": [2, 8, 8, 8]}, "neither the heads nor their width are the same"),
        "a class of block": ({"down_block_types": ["AttnDownBlock2D"] * 4}, "has AttnDownBlock2D; this version knows"),
        "another middle": ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            "this version knows UNetMidBlock2DCrossAttn, UNetMidBlock2D"),
        "another activation": ({"act_fn": "gelu"}, "act_fn is gelu; this version knows silu"),
        "an LCM's guidance": ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        "unCLIP": ({"class_embed_type": "projection"}, "class_embed_type is projection"),
        "another number of channels": ({"in_channels": 9},
            "does not describe the tensors beside it; in_channels is 9 there, 4 here"),
        "another depth": ({"transformer_layers_per_block": 2}, "down_depth is .* there"),
        "depths of another length": ({"transformer_layers_per_block": [[1], 1, 1, 1]},
            "has 1 entries for a level of 2 blocks"),
        "unequal blocks": ({"layers_per_block": [1, 2, 2, 2]}, "differs from level to level"),
    },
    "vae": {
        "another class": ({"_class_name": "AutoencoderTiny"},
            "_class_name is AutoencoderTiny; this version knows AutoencoderKL"),
        "no scale": ({"scaling_factor": 0}, "scaling_factor is 0, not a number from"),
        "a shift": ({"shift_factor": 0.1}, "shift_factor is 0.1; this version knows None"),
        "another block": ({"down_block_types": ["X"] * 4}, "not all DownEncoderBlock2D"),
        "another width": ({"block_out_channels": [64, 128, 256, 256]}, "channels is 64 there, 32 here"),
    },
    "text_encoder": {
        "another class": ({"architectures": ["T5EncoderModel"]}, "is T5EncoderModel; this version knows CLIP"),
        "another layer count": ({"num_hidden_layers": 11}, "layers is 11 there, 12 here"),
        "heads that do not divide": ({"num_attention_heads": 7}, "num_attention_heads is 7, which does not divide 48"),
        "another activation": ({"hidden_act": "relu"}, "hidden_act is relu; this version knows quick_gelu, gelu"),
    },
}  # fmt: skip
CASES = [(name, what) for name, cases in BAD.items() for what in cases]


@pytest.fixture(scope="module")
def folder(sd1, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folders") / "x", "sd1", sd1[0])


@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_config_that_is_wrong_is_refused_before_anything_is_built(
    name: str, what: str, folder: Path, monkeypatch
) -> None:
    change, match = BAD[name][what]
    path = folder / name / "config.json"
    text = path.read_text()
    monkeypatch.setattr(sys.modules["weights.models"], "built", lambda make: pytest.fail("something was built"))
    try:
        path.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(FileError, match=match) as caught:
            load(folder)
        assert caught.value.path == path
        assert len(str(caught.value)) <= 200
    finally:
        path.write_text(text)


SCHEDULERS = {
    "EDM": (
        {"_class_name": "EDMEulerScheduler"},
        FileError,
        "EDMEulerScheduler, a schedule that this version does not know",
    ),
    "another schedule": (
        {"beta_schedule": "linear"},
        FileError,
        "beta_schedule is linear; this version knows scaled_linear",
    ),
    "betas of its own": ({"trained_betas": [0.1]}, FileError, "trained_betas"),
    "backwards": ({"beta_start": 0.5, "beta_end": 0.1}, FileError, "above beta_end"),
    "infinite": ({"beta_start": 1e400}, FileError, "beta_start is inf, not a number from"),
    "sample": ({"prediction_type": "sample"}, FileError, "predicts 'sample'; this version knows eps and v"),
    "zero terminal SNR of eps": (
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": True},
        FileError,
        r"has rescale_betas_zero_snr \(zero terminal SNR\) and predicts eps",
    ),
}


@pytest.mark.parametrize("what", SCHEDULERS)
def test_a_schedule_that_is_not_known_is_refused(what: str, folder: Path) -> None:
    change, error, match = SCHEDULERS[what]
    path = folder / "scheduler" / "scheduler_config.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(text) | change).replace("Infinity", "1e400"))
        with pytest.raises(error, match=match):
            load(folder)
        path.write_text(json.dumps(json.loads(text) | {"prediction_type": "v_prediction", "beta_start": 0.001}))
        config = load(folder).config
        assert (config.prediction, config.schedule, config.name) == ("v", ScheduleConfig(start=0.001), "sd1")
        path.unlink()
        assert load(folder).config == folder_config("sd1")
    finally:
        path.write_text(text)


def test_options_overrule_a_folder(folder: Path) -> None:
    own = replace(tiny("sd1"), size=128, unet=replace(tiny("sd1").unet, heads=4))
    assert load(folder, own).config == own
    assert load(folder, "sd1", dtype=torch.float16).dtype == torch.float16
    with pytest.raises(FileError, match="is an SD 1 model and config is 'sd2-v'"):
        load(folder, "sd2-v")
    with pytest.raises(ArgumentError, match="is no family"):
        load(folder, "sd3")


def test_a_scheduler_against_the_weights_is_a_clash_and_a_close_call_is_asked(tmp_path: Path) -> None:
    state = single("sd2-base")
    ours = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    parts = components("sd2-base", state)
    parts["unet"][ours] = parts["unet"][ours] * 10
    path = write_folder(tmp_path / "x", "sd2-base", parts)
    assert STATISTIC in state
    with pytest.raises(AmbiguousCheckpoint, match=r"scheduler_config.json says eps, its weights v .*pass prediction="):
        load(path)
    assert load(path, prediction="eps").config.name == "sd2-base"
    (path / "scheduler" / "scheduler_config.json").unlink()
    assert load(path).config == replace(folder_config("sd2-v"), prediction="v")


def test_other_families_in_folders_are_refused_by_name(sd1, tmp_path: Path) -> None:
    parts, _ = sd1
    eight = dict(parts["unet"])
    eight["conv_in.weight"] = torch.zeros(32, 8, 3, 3)
    path = write_folder(tmp_path / "x", "sd1", parts | {"unet": eight})
    config = json.loads((path / "unet" / "config.json").read_text())
    (path / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 8}))
    with pytest.raises(FileError, match="is an InstructPix2Pix-like model"):
        load(path)
    (path / "cc_projection").mkdir()
    with pytest.raises(FileError, match="is a Zero123 model"):
        load(path)


def test_the_first_image_variations_held_a_whole_clip(tmp_path: Path) -> None:
    state = single("sd-image-variations")
    parts = components("sd-image-variations", state)
    whole = parts["image_encoder"] | {
        "text_model.embeddings.token_embedding.weight": torch.zeros(3, 3),
        "text_projection.weight": torch.zeros(2, 2),
        "logit_scale": torch.zeros(()),
    }
    path = write_folder(tmp_path / "x", "sd-image-variations", parts | {"image_encoder": whole})
    config = json.loads((path / "image_encoder" / "config.json").read_text())
    vision = {key: value for key, value in config.items() if key != "projection_dim"}
    (path / "image_encoder" / "config.json").write_text(
        json.dumps(
            {"architectures": ["CLIPModel"], "projection_dim": config["projection_dim"], "vision_config": vision}
        )
    )
    assert same(load(path), meaning(state))


def test_a_folder_may_hold_old_pickles(sd1, tmp_path: Path) -> None:
    parts, meant = sd1
    path = write_folder(tmp_path / "x", "sd1", parts)
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    save_zip(parts["unet"], path / "unet" / "diffusion_pytorch_model.bin")
    assert same(load(path), meant)
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    with pytest.raises(FileError, match="pickle"):
        load(path)


def test_the_families_are_those_of_the_configs():
    assert set(FOLDERS) == set(FAMILIES)
