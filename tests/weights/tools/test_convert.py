"""Converting loses nothing: every tensor of every published file comes back from a folder, and the record says where
each one went."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.folders import STATISTIC, components, folder_config, single, write_folder
from benchmarks.models.published import FILES, meaning, narrowed, tiny
from benchmarks.models.seeded import weight
from ldm.config import FAMILIES
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError, LdmError, OutputError
from tests.made.checkpoints import TINY, checkpoint, ema_name, lightning, save_safetensors, save_stream, save_zip
from weights import LEFTOVERS, convert, load, load_vae, open_file
from weights.names.metadata import from_json
from weights.tools.record import Conversion

MODELS = [name for name, family in FILES.items() if family]
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."


def tensors(path: Path) -> dict[str, Tensor]:
    """What a file holds, as copies."""
    with open_file(path) as file:
        return {key: file[key].clone() for key in file}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return set(found) == set(wanted) and all(
        found[key].dtype == value.dtype and found[key].equal(value) for key, value in wanted.items()
    )


def metadata(path: Path) -> dict[str, str]:
    with open_file(path) as file:
        return dict(file.metadata)


@pytest.fixture
def sd1(tmp_path: Path) -> Path:
    return save_safetensors(checkpoint(), tmp_path / "sd1.safetensors")


# --- there and back -------------------------------------------------------------------------------------------------


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published file whose text tower has other names than its family's other files, under theirs."""
    renamed = {}
    for key, value in state.items():
        key = (
            re.sub(r"^conditioner\.embedders\.0\.model\.", "cond_stage_model.model.", key)
            if key in state and "conditioner.embedders.1.model.ln_final.bias" not in state
            else key
        )
        if key.endswith("text_projection.weight") and "transformer." not in key:
            key, value = key.removesuffix(".weight"), value.T.contiguous()
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("file", MODELS)
def test_every_tensor_of_a_published_file_comes_back_from_a_folder(file: str, tmp_path: Path) -> None:
    state, config = narrowed(file), tiny(FILES[file])
    averaged = any(key.startswith("model_ema.diffusion_model") for key in state)
    there = convert(
        save_safetensors(state, tmp_path / "a.safetensors"),
        tmp_path / "b",
        config=config,
        ema=False if averaged else None,
        manifest=tmp_path / "m.json",
    )
    accounted = json.loads((tmp_path / "m.json").read_text())
    assert set(accounted["tensors"]) | set(accounted["dropped"]) == set(state)
    assert not set(accounted["tensors"]) & set(accounted["dropped"])
    assert set(there.dropped) == {key for key in state if averaged and key.startswith("model_ema.")}
    convert(tmp_path / "b", tmp_path / "c.safetensors", config=config)
    wanted = {key: value for key, value in state.items() if key not in there.dropped}
    found = tensors(tmp_path / "c.safetensors")
    if file == "sd2-sgm":  # saved under the names of the published SD 2 files
        unread = {key for key in wanted if "logit_scale" in key}
        assert same(
            {key: value for key, value in found.items() if key not in unread},
            canonical({key: value for key, value in wanted.items() if key not in unread}),
        )
    else:
        assert same(found, canonical(wanted) if file == "ssd-1b-hfscript" else wanted)
    meant, loaded = meaning(state), load(tmp_path / "c.safetensors").state_dict()
    assert same(loaded, {key: value.float() for key, value in meant.items()})


@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "sd2-v", "sd2-depth", "sdxl-refiner", "ssd-1b"])
def test_a_folder_that_diffusers_published_becomes_the_original_file_and_a_folder_again(
    family: str, tmp_path: Path
) -> None:
    """With the first names of the VAE, SD 2's 23 blocks, and no file of ours in it."""
    parts = components(family, single(family))
    write_folder(tmp_path / "a", family, parts)
    made = convert(tmp_path / "a", tmp_path / "b.safetensors", config=folder_config(family))
    read = set(load(tmp_path / "a", folder_config(family)).state_dict())
    meant = {key: value for key, value in meaning(single(family)).items() if key in read}
    assert same(load(tmp_path / "b.safetensors").state_dict(), meant)
    assert set(made.dropped.values()) <= {
        "0 to 76 by definition; stored as integers, as floats, or damaged by merging, under many spellings"
    }
    convert(tmp_path / "b.safetensors", tmp_path / "c", config=folder_config(family))
    assert same(load(tmp_path / "c", folder_config(family)).state_dict(), meant)


def test_position_ids_are_made_for_towers_that_had_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "sd1", components("sd1", single("sd1")))
    made = convert(tmp_path / "a", tmp_path / "b.ckpt", config=folder_config("sd1"), manifest=tmp_path / "m.json")
    assert tensors(tmp_path / "b.ckpt")[f"{TEXT}embeddings.position_ids"].equal(torch.arange(77)[None])
    (entry,) = json.loads((tmp_path / "m.json").read_text())["synthesised"]
    assert entry["target"] == f"{TEXT}embeddings.position_ids"
    assert made.route.files[""][f"{TEXT}embeddings.position_ids"].sources == ()


# --- containers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_zip, save_stream])
@pytest.mark.parametrize("target", ["x.safetensors", "x.ckpt"])
def test_what_a_trainer_leaves_in_a_pickle_is_left_behind_and_its_tensors_are_not(
    save, target: str, tmp_path: Path
) -> None:
    state = checkpoint(ema="full")
    with lightning(state) as contents:
        save(contents, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / target, config=TINY)
    assert same(tensors(tmp_path / target), state)
    assert metadata(tmp_path / target)["global_step"] == "470000"
    assert metadata(tmp_path / target)["ldm.weights"] == "raw weights and their moving average"


@pytest.mark.parametrize("target", ["x.safetensors", "x.ckpt"])
def test_files_of_any_kind_change_their_container(target: str, tmp_path: Path) -> None:
    """A model that this version does not know, a LoRA, an embedding, a checkpoint with keys that nobody knows."""
    sources = {
        "unclip": checkpoint()
        | {"embedder.model.ln_final.weight": torch.randn(8), "noise_augmentor.data_mean": torch.randn(8)},
        "lora": {
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(4, 8),
            "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(4.0),
        },
        "embedding": {"emb_params": torch.randn(2, 768)},
        "odd": checkpoint() | {"my.own.tensor": torch.randn(3)},
    }
    for name, state in sources.items():
        source = save_safetensors(
            state, tmp_path / f"{name}.safetensors", {"ss_network_dim": "4", "sshs_model_hash": "0" * 64}
        )
        made = convert(source, tmp_path / f"{name}-{target}")
        assert same(tensors(tmp_path / f"{name}-{target}"), state), name
        assert made.config is None
        facts = metadata(tmp_path / f"{name}-{target}")
        assert facts["ss_network_dim"] == "4"
        assert "sshs_model_hash" not in facts  # of other bytes than these
        assert facts["ldm.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_a_lora_or_a_bare_network_has_no_folder(tmp_path: Path) -> None:
    source = save_safetensors({"lora_unet_x.lora_down.weight": torch.randn(4, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(FileError, match="only those have a folder layout"):
        convert(source, tmp_path / "folder")
    with pytest.raises(FileError, match="ema, prune and only have nothing to choose from"):
        convert(source, tmp_path / "b.safetensors", prune=True)
    assert {path.name for path in tmp_path.iterdir()} == {"lora.safetensors"}


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["b.safetensors", "b.ckpt", "b"])
def test_the_model_is_converted_and_its_bookkeeping_is_not(
    target: str, dtype: torch.dtype, sd1: Path, tmp_path: Path
) -> None:
    state = checkpoint()
    convert(sd1, tmp_path / target, config=TINY, dtype=dtype)
    if target == "b":
        assert {
            value.dtype for value in tensors(tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors").values()
        } == {dtype}
        kept = tensors(tmp_path / "b" / LEFTOVERS)
        assert all(kept[key].equal(state[key]) and kept[key].dtype == state[key].dtype for key in kept)
        return
    found = tensors(tmp_path / target)
    for key, value in state.items():
        model = key.startswith((UNET, "first_stage_model.", f"{TEXT}")) and "position_ids" not in key
        assert found[key].equal(value.to(dtype) if model else value), key
    assert found["alphas_cumprod"].dtype == torch.float32


def test_numbers_that_float16_cannot_hold_stop_a_conversion_and_leave_nothing(tmp_path: Path) -> None:
    state = checkpoint()
    state[f"{UNET}out.2.bias"] = torch.full((4,), 1e6)
    source = save_safetensors(state, tmp_path / "a.safetensors")
    for target in ("b.safetensors", "b"):
        with pytest.raises(OutputError, match=r"has numbers too large for float16; write float32 or bfloat16"):
            convert(source, tmp_path / target, config=TINY, dtype=torch.float16)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}


# --- which tensors --------------------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return save_safetensors(checkpoint(ema="full"), tmp_path / "full.safetensors")


@pytest.mark.parametrize("target", ["b.safetensors", "b"])
@pytest.mark.parametrize("ema", [True, False])
def test_the_moving_average_or_the_raw_weights_as_asked(ema: bool, target: str, full: Path, tmp_path: Path) -> None:
    state = checkpoint(ema="full")
    made = convert(full, tmp_path / target, config=TINY, ema=ema)
    wanted = load(full, TINY, ema=ema).state_dict()
    assert same(load(tmp_path / target, TINY).state_dict(), wanted)
    assert not wanted["unet.out.2.weight"].equal(load(full, TINY, ema=not ema).state_dict()["unet.out.2.weight"])
    gone = {key for key in state if (key.startswith(UNET) if ema else key.startswith("model_ema."))} | {
        "model_ema.decay",
        "model_ema.num_updates",
    }
    assert set(made.dropped) == gone
    path = (
        tmp_path / target
        if target.endswith("s")
        else tmp_path / target / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert metadata(path)["ldm.weights"] == ("moving average" if ema else "raw weights")
    if target == "b.safetensors":
        assert not any(key.startswith("model_ema.") for key in tensors(path))


def test_a_target_for_one_set_of_weights_needs_the_choice(full: Path, sd1: Path, tmp_path: Path) -> None:
    for target, options in (("b", {}), ("b.safetensors", {"prune": True}), ("b.safetensors", {"only": "unet"})):
        with pytest.raises(
            FileError,
            match=r"raw weights and their moving average, of which the target takes one: say ema=True or ema=False",
        ):
            convert(full, tmp_path / target, config=TINY, **options)
    convert(full, tmp_path / "vae.safetensors", config=TINY, only="vae")
    with pytest.raises(FileError, match="has no moving average"):
        convert(sd1, tmp_path / "b", config=TINY, ema=True)
    assert convert(sd1, tmp_path / "c.safetensors", config=TINY, ema=False).dropped.keys() == {
        "model_ema.decay",
        "model_ema.num_updates",
    }


def test_pruned_is_what_pictures_are_computed_from(sd1: Path, tmp_path: Path) -> None:
    state = checkpoint()
    made = convert(sd1, tmp_path / "b.safetensors", config=TINY, prune=True)
    found = tensors(tmp_path / "b.safetensors")
    assert (
        set(state) - set(found)
        == set(made.dropped)
        == {key for key in state if "." not in key or key.startswith("model_ema.")}
    )
    assert all(found[key].equal(state[key]) for key in found)
    convert(sd1, tmp_path / "c", config=TINY, prune=True)
    assert tensors(tmp_path / "c" / LEFTOVERS).keys() == {f"{TEXT}embeddings.position_ids"}
    convert(sd1, tmp_path / "d", config=TINY)
    convert(tmp_path / "d", tmp_path / "e.safetensors", config=TINY, prune=True)
    assert same(tensors(tmp_path / "e.safetensors"), found)


def test_what_sd2_does_not_read_is_pruned_from_its_folder(tmp_path: Path) -> None:
    source = save_safetensors(single("sd2-base"), tmp_path / "a.safetensors")
    made = convert(source, tmp_path / "b", config=tiny("sd2-base"), prune=True)
    assert not (tmp_path / "b" / LEFTOVERS).exists()
    assert made.dropped["cond_stage_model.model.transformer.resblocks.23.ln_1.weight"] == "read by nothing in a folder"
    assert set(made.dropped) | {
        key for moves in made.route.files.values() for move in moves.values() for key in move.sources
    } == set(single("sd2-base"))


@pytest.mark.parametrize("only", ["unet", "vae", "text"])
def test_one_network_has_its_own_bare_names(only: str, sd1: Path, tmp_path: Path) -> None:
    state = checkpoint()
    made = convert(sd1, tmp_path / "b.safetensors", config=TINY, only=only)
    prefix = {"unet": UNET, "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}[only]
    wanted = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and "position_ids" not in key
    }
    assert same(tensors(tmp_path / "b.safetensors"), wanted)
    assert set(made.dropped) == {key for key in state if not key.startswith(prefix) or "position_ids" in key}
    folder = tmp_path / "folder"
    convert(sd1, folder, config=TINY, only=only)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert names == {"config.json", "model.safetensors" if only == "text" else "diffusion_pytorch_model.safetensors"}


def test_two_text_towers_keep_what_tells_them_apart(tmp_path: Path) -> None:
    source = save_safetensors(single("sdxl-base"), tmp_path / "a.safetensors")
    convert(source, tmp_path / "b.safetensors", config=tiny("sdxl-base"), only="text")
    assert {".".join(key.split(".")[:3]) for key in tensors(tmp_path / "b.safetensors")} == {
        "conditioner.embedders.0",
        "conditioner.embedders.1",
    }
    convert(source, tmp_path / "c", config=tiny("sdxl-base"), only="text")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"text_encoder", "text_encoder_2"}
    with pytest.raises(FileError, match="has no text tower: a model of family sd-image-variations has none"):
        convert(
            save_safetensors(single("sd-image-variations"), tmp_path / "v.safetensors"),
            tmp_path / "d",
            config=tiny("sd-image-variations"),
            only="text",
        )


def test_a_vae_alone_goes_to_its_folder_and_back(tmp_path: Path) -> None:
    config = tiny("sd1")
    state = {
        key.removeprefix("first_stage_model."): value
        for key, value in narrowed("sd1").items()
        if key.startswith("first_stage_model.")
    }
    state |= {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.tensor(0.9999)}
    source = save_safetensors(state, tmp_path / "vae.safetensors")
    with pytest.raises(ArgumentError, match="does not tell the scale of its latents"):
        convert(source, tmp_path / "b")
    convert(source, tmp_path / "b", config=config)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["scaling_factor"] == config.vae.scale
    assert load_vae(tmp_path / "b", config.vae).decoder.conv_in.weight.equal(state["decoder.conv_in.weight"].float())
    convert(tmp_path / "b", tmp_path / "c.ckpt")
    assert same(tensors(tmp_path / "c.ckpt"), state)
    prefixed = save_safetensors(
        {f"first_stage_model.{key}": value for key, value in state.items()}, tmp_path / "p.safetensors"
    )
    convert(prefixed, tmp_path / "q.safetensors", only="vae")
    assert same(tensors(tmp_path / "q.safetensors"), state)
    with pytest.raises(FileError, match="is the folder of one network, and the target a folder too"):
        convert(tmp_path / "b", tmp_path / "d")


def test_keys_are_dropped_only_on_purpose(tmp_path: Path) -> None:
    state = checkpoint()
    source = save_safetensors(state | {"my.own.tensor": torch.randn(3)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"1 unknown \(my\.own\.tensor\)"):
        convert(source, tmp_path / "b", config=TINY)
    made = convert(source, tmp_path / "b", config=TINY, drop=[r"my\..+"])
    assert made.dropped == {"my.own.tensor": "dropped as asked"}
    assert same(
        load(tmp_path / "b", TINY).state_dict(),
        load(save_safetensors(state, tmp_path / "c.safetensors"), TINY).state_dict(),
    )
    with pytest.raises(FileError, match=r"has no key that matches 'your\.\.\+', which is to be dropped"):
        convert(source, tmp_path / "d", config=TINY, drop=[r"my\..+", "your..+"])
    with pytest.raises(ArgumentError, match=r"drop: '\(' is no regular expression"):
        convert(source, tmp_path / "d", config=TINY, drop=["("])


# --- folders --------------------------------------------------------------------------------------------------------


def test_shards_are_no_larger_than_asked_and_read_as_one(sd1: Path, tmp_path: Path) -> None:
    made = convert(sd1, tmp_path / "b", config=TINY, shard_size=2**20)
    shards = sorted((tmp_path / "b" / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    assert all(
        sum(value.numel() * value.element_size() for value in tensors(path).values()) <= 2**20 for path in shards
    )
    index = json.loads((tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: path.name for path in shards for key in tensors(path)}
    assert index["metadata"]["total_size"] == sum(
        move.pending.size
        for name, moves in made.route.files.items()
        if name.startswith("unet/")
        for move in moves.values()
    )
    assert same(load(tmp_path / "b", TINY).state_dict(), load(sd1, TINY).state_dict())
    convert(tmp_path / "b", tmp_path / "c.safetensors", config=TINY)
    assert same(tensors(tmp_path / "c.safetensors"), checkpoint())


def test_a_folder_keeps_its_own_configs_its_safety_checker_and_its_first_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "sd1-inpainting", components("sd1-inpainting", single("sd1-inpainting")), kind="bin")
    (tmp_path / "a" / "tokenizer").mkdir()
    (tmp_path / "a" / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "a" / "tokenizer" / "evil.py").write_text("raise SystemExit")
    (tmp_path / "a" / "safety_checker").mkdir()
    save_safetensors({"concept_embeds": torch.randn(3, 4)}, tmp_path / "a" / "safety_checker" / "model.safetensors")
    made = convert(tmp_path / "a", tmp_path / "b", dtype=torch.float16)
    assert (tmp_path / "b" / "tokenizer" / "vocab.json").read_text() == '{"a": 0}'
    assert not (tmp_path / "b" / "tokenizer" / "evil.py").exists()
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "a" / name).read_text()
    assert tensors(tmp_path / "b" / "safety_checker" / "model.safetensors")["concept_embeds"].dtype == torch.float16
    assert not any(
        ".query." in key for key in tensors(tmp_path / "b" / "vae" / "diffusion_pytorch_model.safetensors")
    )  # the names of the day
    assert not made.dropped
    assert (
        tensors(tmp_path / "b" / "text_encoder" / "model.safetensors")["text_model.embeddings.position_ids"].dtype
        == torch.int64
    )
    assert (
        "safety_checker/concept_embeds"
        in convert(tmp_path / "a", tmp_path / "c.safetensors", config=folder_config("sd1-inpainting")).dropped
    )


def test_the_variant_of_a_folder_can_be_chosen(tmp_path: Path) -> None:
    parts = components("sd1", single("sd1"))
    write_folder(tmp_path / "a", "sd1", parts)
    raw = {key: value + 1 for key, value in parts["unet"].items()}
    save_safetensors(raw, tmp_path / "a" / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    for variant, wanted in ((None, parts["unet"]), ("non_ema", raw)):
        target = tmp_path / f"{variant}.safetensors"
        convert(tmp_path / "a", target, config=folder_config("sd1"), variant=variant)
        assert tensors(target)[f"{UNET}out.2.bias"].equal(wanted["conv_out.bias"])
        assert (
            load(tmp_path / "a", folder_config("sd1"), variant=variant).unet.out[2].bias.equal(wanted["conv_out.bias"])
        )
    with pytest.raises(FileError, match="has no fp16 weights in any component"):
        convert(tmp_path / "a", tmp_path / "b.safetensors", variant="fp16")
    with pytest.raises(
        ArgumentError, match=r"variant: 'fp16' is one of a diffusers folder's, and None\.safetensors is a file"
    ):
        convert(tmp_path / "None.safetensors", tmp_path / "b.safetensors", variant="fp16")


def test_a_part_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "sd1", components("sd1", single("sd1")))
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    (tmp_path / "a" / "model_index.json").write_text(
        json.dumps(index | {"controlnet": ["diffusers", "ControlNetModel"]})
    )
    with pytest.raises(
        FileError, match=r"lists controlnet, a part that this version does not copy; convert to a single file"
    ):
        convert(tmp_path / "a", tmp_path / "b", config=folder_config("sd1"))
    convert(tmp_path / "a", tmp_path / "b.safetensors", config=folder_config("sd1"))


def test_a_folder_that_says_a_tensor_twice_is_refused(sd1: Path, tmp_path: Path) -> None:
    convert(sd1, tmp_path / "b", config=TINY)
    (tmp_path / "b" / LEFTOVERS).unlink()
    save_safetensors({f"{UNET}out.2.bias": torch.zeros(4)}, tmp_path / "b" / LEFTOVERS)
    with pytest.raises(
        FileError,
        match=r"has model\.diffusion_model\.out\.2\.bias in original_only\.safetensors and among its n.*remove that "
        "file",
    ):
        convert(tmp_path / "b", tmp_path / "c.safetensors", config=TINY)


def test_a_folder_must_say_whether_sd2_predicts_eps_or_v(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "sd2-base", tiny("sd2-base"))
    monkeypatch.setitem(FAMILIES, "sd2-v", tiny("sd2-v"))
    state = single("sd2-base")
    state[STATISTIC] = torch.tensor([1.0, -1.0] * (len(state[STATISTIC]) // 2)) * 0.09
    source = save_safetensors(state, tmp_path / "a.safetensors")
    with pytest.raises(
        AmbiguousCheckpoint, match=r"may predict eps or v \(norm1\.bias std 0\.090\), and a folder has to say which"
    ):
        convert(source, tmp_path / "b")
    convert(source, tmp_path / "b", prediction="v")
    assert (
        json.loads((tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
        == "v_prediction"
    )
    convert(source, tmp_path / "c.safetensors")
    assert "modelspec.prediction_type" not in metadata(tmp_path / "c.safetensors")


# --- what is said of it ---------------------------------------------------------------------------------------------


def test_the_metadata_say_what_it_is_and_where_it_comes_from(tmp_path: Path) -> None:
    source = save_safetensors(
        checkpoint(),
        tmp_path / "a.safetensors",
        {"modelspec.license": "CreativeML OpenRAIL-M", "modelspec.title": "mine", "modelspec.hash_sha256": "0x1"},
    )
    convert(source, tmp_path / "b.safetensors", config=TINY)
    facts = metadata(tmp_path / "b.safetensors")
    assert facts["modelspec.prediction_type"] == "epsilon"
    assert facts["modelspec.license"] == "CreativeML OpenRAIL-M"
    assert facts["modelspec.title"] == "mine"
    assert facts["ldm.source"] == "a.safetensors"
    assert facts["ldm.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert "modelspec.hash_sha256" not in facts
    assert load(tmp_path / "b.safetensors").config == TINY
    convert(source, tmp_path / "c", config=TINY, licence="MIT")
    for path in (tmp_path / "c").rglob("*.safetensors"):
        assert metadata(path)["modelspec.license"] == "MIT"


def test_what_is_said_goes_through_a_folder(tmp_path: Path) -> None:
    source = save_safetensors(
        checkpoint(ema="full"), tmp_path / "a.safetensors", {"modelspec.license": "MIT", "modelspec.title": "mine"}
    )
    convert(source, tmp_path / "b", config=TINY, ema=True)
    convert(tmp_path / "b", tmp_path / "c.safetensors", config=TINY)
    convert(tmp_path / "c.safetensors", tmp_path / "d.ckpt")
    for path in (tmp_path / "c.safetensors", tmp_path / "d.ckpt"):
        facts = metadata(path)
        assert (facts["modelspec.license"], facts["modelspec.title"], facts["ldm.weights"]) == (
            "MIT",
            "mine",
            "moving average",
        )
    convert(source, tmp_path / "vae.safetensors", config=TINY, only="vae")
    assert not {"ldm.weights", "modelspec.prediction_type"} & set(metadata(tmp_path / "vae.safetensors"))


def test_a_doubtful_prediction_stays_in_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "sd2-base", tiny("sd2-base"))
    monkeypatch.setitem(FAMILIES, "sd2-v", tiny("sd2-v"))
    state = single("sd2-base")
    state[STATISTIC] = torch.tensor([1.0, -1.0] * (len(state[STATISTIC]) // 2)) * 0.09
    convert(save_safetensors(state, tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert "ldm.config" not in metadata(tmp_path / "b.safetensors")


def test_what_is_asked_for_overrules_the_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "sd2-base", components("sd2-base", single("sd2-base")))
    convert(tmp_path / "a", tmp_path / "b", prediction="v")
    assert (
        json.loads((tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text())["prediction_type"]
        == "v_prediction"
    )
    assert (tmp_path / "b" / "unet" / "config.json").read_text() == (
        tmp_path / "a" / "unet" / "config.json"
    ).read_text()


def test_marks_of_the_training_survive_both_ways(tmp_path: Path) -> None:
    state = single("sdxl-base") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    source = save_safetensors(state, tmp_path / "a.safetensors")
    convert(source, tmp_path / "b", config=tiny("sdxl-base"), prediction="v", prune=True)
    scheduler = json.loads((tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (
        "v_prediction",
        True,
        "trailing",
    )
    (tmp_path / "b" / LEFTOVERS).unlink()  # as a folder of diffusers' own has none
    made = convert(tmp_path / "b", tmp_path / "c.safetensors")
    assert made.config.schedule.zero_snr
    assert {"v_pred", "ztsnr"} <= set(
        tensors(tmp_path / "c.safetensors")
    )  # which other programs read together or not at all
    assert from_json(metadata(tmp_path / "c.safetensors")["ldm.config"]).schedule.zero_snr


def test_a_mark_that_cannot_be_is_refused_and_can_be_dropped(tmp_path: Path) -> None:
    source = save_safetensors(single("sd1") | {"ztsnr": torch.zeros(0)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"has ztsnr \(zero terminal SNR\) and predicts eps, .*drop the mark"):
        convert(source, tmp_path / "b", config=tiny("sd1"))
    convert(source, tmp_path / "b", config=tiny("sd1"), drop=["ztsnr"])
    assert "rescale_betas_zero_snr" not in json.loads(
        (tmp_path / "b" / "scheduler" / "scheduler_config.json").read_text()
    )
    convert(source, tmp_path / "c.ckpt")  # another container for the same tensors, whatever they are
    assert "ztsnr" in tensors(tmp_path / "c.ckpt")


def test_rows_that_are_apart_on_both_sides_stay_apart(tmp_path: Path) -> None:
    source = save_safetensors(single("sd2-depth"), tmp_path / "a.safetensors")
    convert(source, tmp_path / "b", config=tiny("sd2-depth"))
    path = tmp_path / "b" / "depth_estimator" / "model.safetensors"
    state = tensors(path)
    key = "dpt.encoder.layer.0.attention.attention.key.weight"
    save_safetensors(state | {key: state[key].half()}, path)
    convert(tmp_path / "b", tmp_path / "c", manifest=tmp_path / "m.json", config=folder_config("sd2-depth"))
    found = tensors(tmp_path / "c" / "depth_estimator" / "model.safetensors")
    assert same(found, state | {key: state[key].half()})
    assert len(json.loads((tmp_path / "m.json").read_text())["tensors"][f"depth_estimator/{key}"]) == 1


def test_the_record_says_what_was_done_to_every_key(tmp_path: Path) -> None:
    state = single("sd2-depth")
    source = save_safetensors(state, tmp_path / "a.safetensors")
    made = convert(source, tmp_path / "b", config=tiny("sd2-depth"), dtype=torch.float16, manifest=tmp_path / "m.json")
    record = json.loads((tmp_path / "m.json").read_text())
    written = {
        path.relative_to(tmp_path / "b").as_posix(): tensors(path) for path in (tmp_path / "b").rglob("*.safetensors")
    }
    assert sum(map(len, written.values())) == made.tensors
    targets = {}
    for entries in record["tensors"].values():
        for entry in entries:
            targets[entry["target"]] = entry
    assert set(targets) == {f"{path}:{key}" for path, found in written.items() for key in found}
    for target, entry in targets.items():
        value = written[target.split(":")[0]][target.split(":")[1]]
        assert entry["sha256"] == hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        assert entry["shape"] == list(value.shape)
    done = {key: sorted({entry["done"] for entry in entries}) for key, entries in record["tensors"].items()}
    block = "cond_stage_model.model.transformer.resblocks"
    assert done[f"{block}.0.attn.in_proj_weight"] == [f"{part} split from q, k, v" for part in "kqv"]
    assert done[f"{block}.23.attn.in_proj_weight"] == ["kept beside the networks, in which it has no place"]
    assert done["depth_model.model.pretrained.model.blocks.0.attn.qkv.weight"] == [
        f"{part} split from q, k, v" for part in "kqv"
    ]
    assert done["first_stage_model.decoder.mid.attn_1.q.weight"] == ["1x1 convolution to matrix"]
    assert done[f"{UNET}out.2.weight"] == ["copied"]
    assert record["tensors"][f"{UNET}out.2.weight"][0]["from"] == "F32"
    assert record["tensors"][f"{UNET}out.2.weight"][0]["dtype"] == "F16"
    convert(tmp_path / "b", tmp_path / "c.safetensors", config=tiny("sd2-depth"), manifest=tmp_path / "n.json")
    back = {
        key: {entry["done"] for entry in entries}
        for key, entries in json.loads((tmp_path / "n.json").read_text())["tensors"].items()
    }
    assert back["text_encoder/text_model.encoder.layers.0.self_attn.q_proj.weight"] == {"q, k, v joined"}
    assert back["vae/decoder.mid_block.attentions.0.to_q.weight"] == {"matrix to 1x1 convolution"}
    assert back["depth_estimator/dpt.encoder.layer.0.attention.attention.query.weight"] == {"q, k, v joined"}


def test_a_projection_is_transposed_on_its_way_to_a_folder(tmp_path: Path) -> None:
    state = single("sdxl-base")
    made = convert(save_safetensors(state, tmp_path / "a.safetensors"), tmp_path / "b", config=tiny("sdxl-base"))
    move = made.route.files["text_encoder_2/model.safetensors"]["text_projection.weight"]
    assert (move.done, move.sources) == ("transposed", ("conditioner.embedders.1.model.text_projection",))
    assert tensors(tmp_path / "b" / "text_encoder_2" / "model.safetensors")["text_projection.weight"].equal(
        state["conditioner.embedders.1.model.text_projection"].T
    )


# --- all or nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["b.safetensors", "b"])
def test_an_interrupted_conversion_leaves_what_was_there(target: str, sd1: Path, tmp_path: Path) -> None:
    convert(sd1, tmp_path / target, config=TINY)
    before = load(tmp_path / target, TINY).state_dict()
    other = checkpoint()
    other[f"{UNET}out.2.bias"] = torch.ones(4)
    source = save_safetensors(other, tmp_path / "other.safetensors")
    count = 0

    def interrupt(written) -> None:
        nonlocal count
        count += 1
        if count == 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / target, config=TINY, overwrite=True, on_write=interrupt)
    assert same(load(tmp_path / target, TINY).state_dict(), before)
    with pytest.raises(OutputError, match="exists already; choose another name or overwrite=True"):
        convert(source, tmp_path / target, config=TINY)
    convert(source, tmp_path / target, config=TINY, overwrite=True)
    assert load(tmp_path / target, TINY).unet.out[2].bias.equal(torch.ones(4))
    assert {path.name for path in tmp_path.iterdir()} == {"sd1.safetensors", "other.safetensors", target}


def test_a_folder_that_holds_other_things_is_never_replaced(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="is a directory with other things in it, no model's folder; name a new one"):
        convert(sd1, tmp_path / "mine", config=TINY, overwrite=True)
    with pytest.raises(ArgumentError, match="dst: SRC lies in it, or it in SRC"):
        convert(sd1, tmp_path, config=TINY, overwrite=True)
    convert(sd1, tmp_path / "b", config=TINY)
    with pytest.raises(ArgumentError, match="dst: SRC lies in it, or it in SRC"):
        convert(tmp_path / "b", tmp_path / "b" / "unet", config=TINY, overwrite=True)
    for manifest in (sd1, tmp_path / "c.safetensors", tmp_path / "b" / "m.json"):
        source, target = (
            (tmp_path / "b", tmp_path / "c.safetensors")
            if manifest.parent.name == "b"
            else (sd1, tmp_path / "c.safetensors")
        )
        with pytest.raises(ArgumentError, match="manifest: is SRC or DST, or lies in one of them"):
            convert(source, target, config=TINY, manifest=manifest, overwrite=True)
    (tmp_path / "empty").mkdir()
    convert(sd1, tmp_path / "empty", config=TINY, overwrite=True)
    assert (tmp_path / "mine" / "precious.txt").exists()


def test_nothing_is_no_conversion(sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="has nothing left to write"):
        convert(
            save_safetensors({"w": torch.ones(1)}, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", drop=[".*"]
        )


def test_progress_is_of_the_whole(sd1: Path, tmp_path: Path) -> None:
    reports = []
    made = convert(sd1, tmp_path / "b", config=TINY, on_write=reports.append)
    assert [report.total for report in reports] == [made.bytes] * made.tensors
    assert reports[-1].done == made.bytes
    assert [report.done for report in reports] == sorted(report.done for report in reports)


WRONG: dict[str, tuple[str, dict, type[LdmError], str]] = {
    "misspelt ending": ("b.safetensor", {}, ArgumentError, r"ends in \.safetensor \(meant \.safetensors\?\)"),
    "another format": ("b.gguf", {}, ArgumentError, r"\.gguf files are not written"),
    "shards of a file": ("b.safetensors", {"shard_size": 2**30}, ArgumentError, "a single file has no shards"),
    "tiny shards": ("b", {"shard_size": 10}, ArgumentError, "shard_size: 10 bytes; give at least"),
    "unknown part": ("b", {"only": "clip"}, ArgumentError, "only: 'clip' is unknown; there are unet, vae, text"),
    "unknown family": ("b", {"config": "sd9"}, ArgumentError, "config 'sd9' is no family"),
    "unknown prediction": ("b", {"prediction": "x0"}, ArgumentError, "give 'eps', 'v' or None"),
    "whole numbers": ("b", {"dtype": torch.int8}, ArgumentError, "cannot hold weights"),
    "no such directory": ("no/b.safetensors", {}, OutputError, "does not exist; make it first"),
    "no directory for the record": (
        "b.safetensors",
        {"manifest": "no/m.json"},
        OutputError,
        "does not exist; make it first",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_noticed_before_the_source_is_opened(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, options, kind, text = WRONG[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=text) as caught:
        convert("not there.safetensors", target, **options)
    assert len(str(caught.value)) <= 200
    assert not list(tmp_path.iterdir())


def test_what_was_done_can_be_counted(sd1: Path, tmp_path: Path) -> None:
    made = convert(sd1, tmp_path / "b.safetensors", config=TINY, prune=True)
    assert isinstance(made, Conversion)
    found = tensors(tmp_path / "b.safetensors")
    assert made.tensors == len(found)
    assert made.bytes == sum(value.numel() * value.element_size() for value in found.values())
    assert made.config == TINY


def test_a_network_whose_average_is_stored_is_found_by_its_names_alone(tmp_path: Path) -> None:
    """Of a family whose text tower is renamed on the way."""
    state = single("sd2-base")
    averages = {
        ema_name(key): weight("ema " + key, value.shape) for key, value in state.items() if key.startswith(UNET)
    }
    source = save_safetensors(state | averages, tmp_path / "a.safetensors")
    convert(source, tmp_path / "b", config=tiny("sd2-base"), ema=True)
    found, wanted = (
        load(tmp_path / "b", folder_config("sd2-base")).state_dict(),
        load(source, tiny("sd2-base"), ema=True).state_dict(),
    )
    assert same(found, {name: value for name, value in wanted.items() if name in found})
    assert found["unet.out.2.weight"].equal(averages[ema_name(f"{UNET}out.2.weight")])
