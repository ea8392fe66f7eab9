"""Networks that come alone: VAEs in every layout they were published in, and the safety checker."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.models.folders import components, single, write_folder
from benchmarks.models.published import inside, manifest, meaning, narrow, narrowed, seeded, tiny
from ldm.errors import ArgumentError, FileError
from ldm.networks.safety import SafetyChecker
from tests.made.checkpoints import checkpoint, save_safetensors, save_zip
from weights import load_safety, load_vae

VAE = tiny("sd1").vae


@pytest.fixture(scope="module")
def bare():
    """The file `vae-standalone`, narrow."""
    return seeded(
        {key: (narrow(f"vae/{key}", shape, 4), dtype) for key, (shape, dtype) in manifest("vae-standalone").items()}
    )


def same(network, state) -> bool:
    found = network.state_dict()
    return found.keys() <= state.keys() and all(
        value.equal(state[name].to(value.dtype)) for name, value in found.items()
    )


def test_a_vae_loads_in_every_layout(bare, tmp_path: Path) -> None:
    lost = {
        "loss.logvar": torch.zeros(1),
        "loss.discriminator.main.0.weight": torch.zeros(2, 2),
        "model_ema.decoderconv_inweight": torch.zeros(3),
    }
    assert same(load_vae(save_safetensors(bare, tmp_path / "a.safetensors"), VAE), bare)
    assert same(load_vae(save_safetensors(bare | lost, tmp_path / "b.safetensors"), VAE), bare)
    assert same(load_vae(save_zip({"state_dict": bare | lost}, tmp_path / "c.ckpt"), VAE, dtype=torch.float16), bare)
    prefixed = {f"first_stage_model.{key}": value for key, value in (bare | lost).items()}
    vae = load_vae(save_safetensors(prefixed, tmp_path / "d.safetensors"), VAE)
    assert same(vae, bare)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    matrices = {
        key: value[:, :, 0, 0].clone() if ".attn_1." in key and value.ndim == 4 else value
        for key, value in bare.items()
    }
    assert same(load_vae(save_safetensors(matrices, tmp_path / "e.safetensors"), VAE), bare)


@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "x4-upscaler"])  # names of the day, first names, factor 4
def test_a_vae_loads_under_the_names_of_diffusers(family: str, tmp_path: Path) -> None:
    state = single(family)
    parts, meant, config = components(family, state), inside(meaning(state), "vae."), tiny(family).vae
    assert same(load_vae(save_safetensors(parts["vae"], tmp_path / "x.safetensors"), config), meant)
    folder = write_folder(tmp_path / "folder", family, parts)
    assert same(load_vae(folder, config), meant)
    assert same(load_vae(folder / "vae", config), meant)


def test_a_vae_for_another_model_is_refused(bare, tmp_path: Path) -> None:
    path = save_safetensors(bare, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="of another shape"):
        load_vae(path, replace(VAE, channels=64))
    with pytest.raises(FileError, match="unknown"):
        load_vae(path, tiny("x4-upscaler").vae)
    folder = write_folder(
        tmp_path / "folder", "sdxl-base", {"vae": components("sdxl-base", single("sdxl-base"))["vae"]}
    )
    with pytest.raises(FileError, match=r"is a VAE of another scale \(0.13025\), not for this model"):
        load_vae(folder, VAE)
    with pytest.raises(FileError, match="is a VAE of other sizes"):
        load_vae(folder, tiny("x4-upscaler").vae)
    with pytest.raises(FileError, match="1 missing"):
        load_vae(
            save_safetensors(
                {key: value for key, value in bare.items() if key != "quant_conv.bias"}, tmp_path / "y.safetensors"
            ),
            VAE,
        )
    with pytest.raises(ArgumentError, match="cannot hold weights"):
        load_vae(path, VAE, dtype=torch.int8)


OTHERS = {
    "is a whole model, not a VAE; give it as the model": checkpoint(),
    "is a LoRA (lora_unet_x.lora_up.weight), not a VAE; use a file of a VAE":
        {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)},
    "is a Flux or SD 3 transformer, not a VAE; use a file of a VAE": {"double_blocks.0.x": torch.zeros(2)},
    "is a VAE whose names this version does not know; use a file of a VAE of the original code or of diffusers":
        {f"{half}.conv_in.weight": torch.zeros(8, 3, 3, 3) for half in ("encoder", "decoder")},
    "begins with some.weight: that is not a VAE; use a file of a VAE":
        {f"some.weight{i or ''}": torch.zeros(2) for i in range(5)},
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_vae_is_refused_by_what_it_is(what: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        load_vae(save_safetensors(OTHERS[what], tmp_path / "x.safetensors"), VAE)
    assert str(caught.value).endswith(f": {what}")


# -- the safety checker ------------------------------------------------------------------------------------------------


VISION = tiny("sd-image-variations").vision


@pytest.fixture(scope="module", params=["sd1", "sd-image-variations"])
def checker(request):
    """The published names of a safety checker, narrow."""
    found = manifest(f"diffusers/{request.param}/safety_checker")
    return seeded(
        {key: (tuple(n // 16 if n >= 768 else n for n in shape), dtype) for key, (shape, dtype) in found.items()}
    )


def folder_of(checker, path: Path, **config) -> Path:
    (path / "safety_checker").mkdir(parents=True)
    vision = {
        key: value // 16 if key in ("hidden_size", "intermediate_size", "projection_dim") else value
        for key, value in json.loads(VISION_JSON).items()
    }
    text = {"architectures": ["StableDiffusionSafetyChecker"], "projection_dim": 48, "vision_config": vision} | config
    (path / "safety_checker" / "config.json").write_text(json.dumps(text))
    save_zip(checker, path / "safety_checker" / "pytorch_model.bin")
    return path


VISION_JSON = json.dumps({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
                          "hidden_act": "quick_gelu", "projection_dim": 768})  # fmt: skip


def test_the_safety_checker_loads_from_its_folder_the_model_s_folder_and_a_file(
    checker, tmp_path: Path, monkeypatch
) -> None:
    folder = folder_of(checker, tmp_path / "model")
    for path in (folder, folder / "safety_checker"):
        loaded = load_safety(path)
        assert isinstance(loaded, SafetyChecker)
        assert loaded.config == VISION
        assert same(loaded, checker)
    file = save_safetensors(checker, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="is a safety checker of other sizes"):
        load_safety(file)
    monkeypatch.setattr(sys.modules["weights.alone"], "VisionConfig", lambda: VISION)
    assert same(load_safety(file, dtype=torch.bfloat16), checker)
    once = {key.replace("vision_model.vision_model.", "vision_model."): value for key, value in checker.items()}
    meant = load_safety(file).state_dict()
    found = load_safety(save_safetensors(once, tmp_path / "y.safetensors")).state_dict()
    assert all(value.equal(meant[name]) for name, value in found.items())


def test_what_is_no_safety_checker_is_refused(checker, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a whole model, not a safety checker"):
        load_safety(save_safetensors(narrowed("sd1"), tmp_path / "x.safetensors"))
    with pytest.raises(FileError, match="is a VAE alone, not a safety checker"):
        load_safety(save_safetensors(inside(narrowed("sd1"), "first_stage_model."), tmp_path / "y.safetensors"))
    with pytest.raises(FileError, match="is CLIPModel; this version knows StableDiffusionSafetyChecker"):
        load_safety(folder_of(checker, tmp_path / "a", architectures=["CLIPModel"]))
    with pytest.raises(FileError, match="or than its config"):
        load_safety(folder_of(checker, tmp_path / "b", projection_dim=64))
