"""Vision towers from models that are told pictures and from CLIPs, in each form in which they are published."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import weights
from benchmarks.models.published import inside, meaning, narrowed, tiny
from benchmarks.models.seeded import weight
from ldm.config import VisionConfig
from ldm.errors import ArgumentError, FileError
from ldm.networks.vision import CLIPVision
from tests.made.checkpoints import save_safetensors, save_zip
from tests.made.families import build
from tests.made.families import tiny as tinier
from weights import load_vision

VISION = tiny("sd-image-variations").vision  # of `narrowed` files
CLIP = VisionConfig(
    image=28, patch=7, width=64, layers=2, heads=2, mlp=128, activation="gelu", projection=48
)  # heads that no shape shows
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "hidden_act": "gelu",
}


@pytest.fixture(scope="module")
def tower() -> CLIPVision:
    made = CLIPVision(CLIP)
    made.load_state_dict({name: weight(name, value.shape) for name, value in made.state_dict().items()})
    return made.eval().requires_grad_(False)


def same(network: CLIPVision, state: dict[str, torch.Tensor]) -> bool:
    found = network.state_dict()
    return found.keys() <= state.keys() and all(
        value.equal(state[name].to(value.dtype)) for name, value in found.items()
    )


def test_the_tower_of_a_published_image_variations_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = narrowed("sd-image-variations")
    path = save_zip({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(FileError, match="of other sizes than ViT-L/14's"):
        load_vision(path)
    monkeypatch.setattr(sys.modules["weights.alone"], "VisionConfig", lambda: VISION)
    read = load_vision(path)
    assert read.config == VISION
    assert same(read, inside(meaning(state), "vision."))
    assert not read.training
    assert not any(parameter.requires_grad for parameter in read.parameters())
    state["cond_stage_model.model.visual.odd"] = torch.zeros(1)
    with pytest.raises(FileError, match=r"1 unknown \(cond_stage_model.model.visual.odd\)"):
        load_vision(save_zip({"state_dict": state}, tmp_path / "y.ckpt"))


def test_the_tower_of_a_file_of_ours_has_the_sizes_that_its_metadata_tell(tmp_path: Path):
    model = build(tinier("sd-image-variations"))
    read = load_vision(weights.save(model, tmp_path / "x.safetensors", dtype=None), dtype=torch.bfloat16)
    assert read.config == model.config.vision
    assert same(read, model.vision.state_dict())


@pytest.mark.parametrize("form", ["clip", "vision", "bare", "image_encoder"])
def test_the_tower_of_a_folder_of_hugging_face_is_read(form: str, tower: CLIPVision, tmp_path: Path):
    state = dict(tower.state_dict())
    folder = tmp_path / "image_encoder" if form == "image_encoder" else tmp_path
    folder.mkdir(exist_ok=True)
    config = CONFIG | {"architectures": ["CLIPVisionModelWithProjection"], "projection_dim": 48}
    if form == "clip":
        config = {"architectures": ["CLIPModel"], "projection_dim": 48, "vision_config": CONFIG, "text_config": {}}
        state |= {"text_model.final_layer_norm.weight": torch.ones(8), "text_projection.weight": torch.ones(8, 8),
            "logit_scale": torch.ones(()),
                  "vision_model.embeddings.position_ids": torch.arange(17)[None]}  # fmt: skip
    if form == "bare":
        state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_safetensors(state, folder / "model.safetensors")
    read = load_vision(tmp_path)
    assert read.config == CLIP
    assert same(read, tower.state_dict())


def test_what_holds_no_tower_that_can_be_read_is_refused(tower: CLIPVision, tmp_path: Path):
    state = tower.state_dict()
    with pytest.raises(FileError, match="of other sizes than ViT-L/14's"):
        load_vision(save_safetensors(state, tmp_path / "a.safetensors"))
    with pytest.raises(FileError, match="holds no CLIP vision tower, it begins with lora_x"):
        load_vision(save_safetensors({"lora_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors"))
    without = {name: value for name, value in state.items() if name != "visual_projection.weight"}
    with pytest.raises(FileError, match=r"holds no whole vision tower: .*visual_projection.weight"):
        load_vision(save_safetensors(without, tmp_path / "c.safetensors"))
    with pytest.raises(FileError, match="has no weights that this version knows"):
        load_vision(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    for config, said in {
        "mlp": (CONFIG | {"intermediate_size": 64, "projection_dim": 48}, "or than its config says"),
        "class": ({"architectures": ["BertModel"]}, "is BertModel"),
    }.values():
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(FileError, match=said):
            load_vision(tmp_path)
    with pytest.raises(ArgumentError, match="cannot hold weights"):
        load_vision(tmp_path, dtype=torch.int8)
