"""Every key of a checkpoint is loaded, ignored for a written reason, or an error; nothing is guessed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.models.published import manifest, original_name
from benchmarks.models.seeded import weight
from ldm.config import FAMILIES
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError
from ldm.model import LatentDiffusion
from tests.made.checkpoints import (
    TINY,
    accounted,
    checkpoint,
    ema_name,
    lightning,
    save_safetensors,
    save_stream,
    save_zip,
)
from weights import load
from weights.checkpoint import AVERAGED, RAW
from weights.names import places as names
from weights.names.detect import detect
from weights.names.metadata import CONFIG_KEY, from_json, to_json

SD1_FILES = ["sd1", "sd1-full", "sd1-pruned-fp16", "sd1-pruned-fp16-posids16"]


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in manifest(name).items()}


def wanted(config=FAMILIES["sd1"]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in LatentDiffusion(config).state_dict().items()}


def same(model: LatentDiffusion, state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> bool:
    """Is every parameter bit by bit the checkpoint's, converted to `dtype`?"""
    found = model.state_dict()
    return len(found) > 300 and all(value.equal(state[original_name(name)].to(dtype)) for name, value in found.items())


@pytest.fixture(scope="module")
def state():
    return checkpoint()


# -- accounting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SD1_FILES)
def test_every_key_of_a_published_file_is_loaded_or_ignored_for_a_reason(file):
    found = shapes_of(file)
    config = detect(found, {}, None, "x.ckpt")
    assert config == FAMILIES["sd1"]
    made = accounted(found, wanted())
    assert len(made.places) == 686 + 248 + 196
    assert all(made.ignored.values())
    assert {original_name(ours): place.key for ours, place in made.places.items()} == {
        key: key for key in set(found) - set(made.ignored)
    }


def test_the_moving_average_takes_the_place_of_the_unet_and_of_nothing_else():
    found = shapes_of("sd1-full")
    made = accounted(found, wanted(), ema=True)
    assert {place.key for place in made.places.values()} | set(made.ignored) == set(found)
    for ours, place in made.places.items():
        assert place.key == (ema_name(original_name(ours)) if ours.startswith("unet.") else original_name(ours))
    assert sum(reason == AVERAGED for reason in made.ignored.values()) == 686
    assert sum(reason == RAW for reason in accounted(found, wanted()).ignored.values()) == 686


def test_dotless_names_are_unambiguous():
    keys = [key for key in shapes_of("sd1") if key.startswith("model.")]
    assert len({names.ema(key) for key in keys}) == len(keys) == 686


NOT_MODELS = {
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320), "lora_te_x.alpha": ()},
    "a LoRA (base": {"base_model.model.unet.down_blocks.0.attn1.to_q.lora_A.weight": (4, 320)},
    "a textual-inversion embedding": {"emb_params": (2, 768)},
    "embedding (string_to_param.*)": {"string_to_param.*": (3, 768)},
    "a VAE alone": {
        "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    },
    "a diffusers UNet": {"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
    "a bare UNet": {"input_blocks.0.0.weight": (320, 4, 3, 3), "out.2.weight": (4, 320, 3, 3), "a": (1,), "b": (1,)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a safety checker": {"special_care_embeds": (3, 768), "concept_embeds": (17, 768)},
    "a text tower alone": {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)},
    "a Flux or SD 3": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
    "has no UNet": {f"layer.{i}.weight": (3, 3) for i in range(5)},
}


@pytest.mark.parametrize("what", NOT_MODELS)
def test_what_is_no_model_is_refused_by_what_it_is(what, tmp_path):
    path = save_safetensors(
        {key: torch.zeros(shape) for key, shape in NOT_MODELS[what].items()}, tmp_path / "x.safetensors"
    )
    for config in (None, "sd1", TINY):
        with pytest.raises(FileError, match=re.escape(what)):
            load(path, config)


# -- containers and damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_zip, save_stream])
def test_a_training_checkpoint_loads_bit_by_bit(save, state, tmp_path):
    with lightning(state) as contents:
        path = save(contents, tmp_path / "x.ckpt")
    assert same(load(path, TINY), state)


VARIANTS = {
    "as published": {},
    "float16": {"dtype": torch.float16},
    "position_ids float16": {"position_ids": "F16"},
    "position_ids float32": {"position_ids": "F32"},
    "position_ids wrong": {"position_ids": "wrong"},
    "position_ids missing": {"position_ids": None},
    "no schedule buffers": {"buffers": False},
    "no EMA leftovers": {"ema": None},
    "full EMA": {"ema": "full"},
    "no text_model. in the names": {"text_model": False},
    "community float16": {"dtype": torch.float16, "buffers": False, "ema": None, "position_ids": "F16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_known_variants_and_damage_load_bit_by_bit(variant, tmp_path):
    state = checkpoint(**VARIANTS[variant])
    path = save_safetensors(state, tmp_path / "x.safetensors")
    expected = {
        key
        if "cond_stage" not in key or "text_model" in key
        else key.replace("transformer.", "transformer.text_model."): v
        for key, v in state.items()
    }
    assert same(load(path, TINY), expected)
    assert same(load(path, TINY, dtype=torch.float16), expected, torch.float16)
    assert same(load(path, TINY, dtype=torch.bfloat16), expected, torch.bfloat16)


def test_mixed_precisions_load(state, tmp_path):
    kinds = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
    mixed = {
        key: value.to(kinds[i % 4]) if value.is_floating_point() else value
        for i, (key, value) in enumerate(state.items())
    }
    assert same(load(save_safetensors(mixed, tmp_path / "x.safetensors"), TINY), mixed)


@pytest.mark.parametrize("extra", [
    "cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight",
    "first_stage_model.loss.discriminator.main.0.weight", "embedding_manager.initial_embeddings", "logvar",
    "cond_stage_model.transformer.vision_model.embeddings.position_ids",
])  # fmt: skip
def test_known_extras_are_ignored(extra, state, tmp_path):
    path = save_safetensors({**state, extra: torch.zeros(2)}, tmp_path / "x.safetensors")
    assert same(load(path, TINY), state)


def test_the_moving_average_loads_when_asked_for(tmp_path):
    state = checkpoint(ema="full")
    path = save_safetensors(state, tmp_path / "x.safetensors")
    assert same(load(path, TINY), state)
    averaged = {
        key: weight("ema " + key, value.shape) if key.startswith("model.") else value for key, value in state.items()
    }
    assert same(load(path, TINY, ema=True), averaged)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_moving_average_that_is_not_there_is_an_error(state, tmp_path):
    with pytest.raises(FileError, match="only its decay and num_updates: the average is already in the weights"):
        load(save_safetensors(state, tmp_path / "a.safetensors"), TINY, ema=True)
    with pytest.raises(FileError, match=r"no model_ema\.\* at all"):
        load(save_safetensors(checkpoint(ema=None), tmp_path / "b.safetensors"), TINY, ema=True)
    half = {
        key: value
        for i, (key, value) in enumerate(checkpoint(ema="full").items())
        if i % 2 or not key.startswith("model_ema.diff")
    }
    with pytest.raises(FileError, match=r"a moving average of \d+ of \d+ tensors"):
        load(save_safetensors(half, tmp_path / "c.safetensors"), TINY, ema=True)
    assert same(load(tmp_path / "c.safetensors", TINY), state)


TEXT_KEY = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
UNET_KEY = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


def test_missing_unknown_and_misshapen_tensors_are_counted_and_named(state, tmp_path):
    def refusal(**changes) -> FileError:
        changed = {
            key: value
            for key, value in {**state, **changes.pop("set", {})}.items()
            if key not in changes.get("drop", ())
        }
        with pytest.raises(FileError) as caught:
            load(save_safetensors(changed, tmp_path / "x.safetensors"), TINY)
        assert len(str(caught.value)) <= 200
        return caught.value

    gone = [key for key in state if "input_blocks.1.0" in key]
    assert (missing := refusal(drop=gone)).key == gone[0]
    assert re.search(r"10 missing \(.*in_layers.0.weight, .*in_layers.0.bias, ", str(missing))
    assert (
        unknown := refusal(set={"model.diffusion_model.extra": torch.zeros(1), "cond_stage_model.odd": torch.zeros(1)})
    ).key in ("model.diffusion_model.extra", "cond_stage_model.odd")
    assert re.search(r"2 unknown \(.*extra.*\)", str(unknown))
    assert "[32, 32, 1, 1] instead of [32, 32, 3, 3]" in str(refusal(set={UNET_KEY: torch.zeros(32, 32, 1, 1)}))
    assert "has no VAE (no first_stage_model.*" in str(
        refusal(drop=[key for key in state if key.startswith("first_stage_model.")])
    )
    assert "has no text tower" in str(refusal(drop=[key for key in state if key.startswith("cond_stage_model.")]))
    assert re.search(
        r"final_layer_norm.bias twice, also as .+; which is right cannot be known",
        str(refusal(set={TEXT_KEY.replace(".text_model", ""): torch.zeros(64)})),
    )
    assert "quantised" in str(refusal(set={UNET_KEY: torch.zeros(32, 32, 3, 3, dtype=torch.int8)}))


def test_an_unknown_part_of_a_moving_average_is_an_error(state, tmp_path):
    path = save_safetensors({**state, "model_ema.something": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"1 unknown \(model_ema.something\)"):
        load(path, TINY)


def test_a_model_of_unpublished_sizes_needs_a_config(state, tmp_path):
    path = save_safetensors(state, tmp_path / "x.safetensors")
    with pytest.raises(AmbiguousCheckpoint, match="pass config=") as caught:
        load(path)
    assert caught.value.path == path
    assert same(load(path, TINY), state)
    with pytest.raises(FileError, match="of another shape"):
        load(path, "sd1")


def test_metadata_say_what_shapes_cannot(state, tmp_path):
    odd = replace(TINY, unet=replace(TINY.unet, heads=2), prediction="v", vae=replace(TINY.vae, scale=0.5))
    model = load(save_safetensors(state, tmp_path / "x.safetensors", {CONFIG_KEY: to_json(odd)}))
    assert model.config == odd
    assert load(tmp_path / "x.safetensors", TINY).config == TINY  # the caller overrules the file
    wider = to_json(replace(TINY, unet=replace(TINY.unet, model_channels=64)))
    with pytest.raises(FileError, match="shapes of its UNet disagree"):
        load(save_safetensors(state, tmp_path / "y.safetensors", {CONFIG_KEY: wider}))


GOOD = to_json(TINY)
BAD_CONFIGS = {
    "not JSON": GOOD[:-1],
    "a list": "[]",
    "no name": "{}",
    "unknown field": GOOD.replace('"size":', '"sise":'),
    "text for a number": GOOD.replace('"model_channels":32', '"model_channels":"32"'),
    "bool for a number": GOOD.replace('"model_channels":32', '"model_channels":true'),
    "negative": GOOD.replace('"model_channels":32', '"model_channels":-32'),
    "absurd": GOOD.replace('"layers":3', '"layers":1000000000'),
    "zero heads": GOOD.replace('"heads":4', '"heads":0'),
    "heads that do not divide": GOOD.replace('"heads":4', '"heads":5'),
    "width that cannot be normalised": GOOD.replace('"model_channels":32', '"model_channels":40'),
    "infinite scale": GOOD.replace("0.18215", "1e999"),
    "NaN scale": GOOD.replace("0.18215", "NaN"),
    "unknown prediction": GOOD.replace('"eps"', '"epsilon"'),
    "heads and head_dim": GOOD.replace('"head_dim":null', '"head_dim":8'),
    "schedule backwards": GOOD.replace('"start":0.00085', '"start":0.5'),
    "very long": GOOD + " " * 200_000,
    "nested": "[" * 50_000,
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_impossible_metadata_are_refused_before_anything_is_built(kind, state, tmp_path):
    assert BAD_CONFIGS[kind] != GOOD
    with pytest.raises(FileError, match=r"ldm\.config|levels|heads"):
        load(save_safetensors(state, tmp_path / "x.safetensors", {CONFIG_KEY: BAD_CONFIGS[kind]}))


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_config_survives_its_metadata(config):
    assert from_json(to_json(config)) == config


def test_arguments_are_checked(tmp_path, state):
    path = save_safetensors(state, tmp_path / "x.safetensors")
    with pytest.raises(ArgumentError, match=r"'sd2-bse' is no family .meant sd2-base"):
        load(path, "sd2-bse")
    with pytest.raises(FileError, match="config is 'sdxl-base'"):
        load(path, "sdxl-base")
    for dtype in (torch.int8, "float16", torch.float8_e4m3fn):
        with pytest.raises(ArgumentError, match="cannot hold weights"):
            load(path, TINY, dtype=dtype)


# -- the model that comes out ------------------------------------------------------------------------------------------


def test_a_loaded_model_is_ready_for_inference(state, tmp_path):
    model = load(save_safetensors(state, tmp_path / "x.safetensors"), TINY)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(value.device.type == "cpu" for value in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        tokens, _ = model.text[0](torch.tensor([[998, 5, 999]]))
        out = model.unet(torch.zeros(1, 4, 8, 8), torch.tensor([500]), tokens)
        picture = model.vae.decode(out)
    assert out.isfinite().all()
    assert picture.shape == (1, 3, 16, 16)


def test_loading_draws_no_random_numbers_and_leaves_torch_as_it_was(state, tmp_path):
    path = save_safetensors(state, tmp_path / "x.safetensors")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load(path, TINY, dtype=torch.float16)
    assert torch.get_rng_state().equal(before)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.nn.Linear(2, 2).weight.abs().sum() > 0  # initial values are back


def test_two_models_from_one_file_do_not_share_weights(state, tmp_path):
    path = save_safetensors(state, tmp_path / "x.safetensors")
    one, two = load(path, TINY), load(path, TINY)
    one.unet.time_embed[0].weight.zero_()
    assert same(two, state)
