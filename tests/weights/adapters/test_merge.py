"""LoRAs merged into a checkpoint: the bits of the merged model, and everything else as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import weights
from benchmarks.models.seeded import normal
from ldm.changes.lora import merge
from ldm.config import ModelConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError, OutputError
from tests.made.checkpoints import TINY, checkpoint, save_safetensors, save_stream, save_zip
from tests.made.loras import FC, published, saved, shallow, some_lora
from weights.adapters import names as lora_names
from weights.adapters.extract import CONVOLUTION, attention
from weights.adapters.kohya import kohya_names
from weights.adapters.read import load_lora


def lora_of(config: ModelConfig, path: Path, r: int = 2) -> Path:
    """A LoRA in kohya's names of every layer that trainers give one."""
    names, tensors = kohya_names(config), {}
    for name, shape in lora_names.shapes(config).items():
        if attention(name) or CONVOLUTION.fullmatch(name):
            key = names[name.removesuffix(".weight")]
            tensors[f"{key}.lora_down.weight"] = normal(f"{name} {path.name} d", (r, *shape[1:])) * 0.1
            tensors[f"{key}.lora_up.weight"] = (
                normal(f"{name} {path.name} u", (shape[0], r, *(1 for _ in shape[2:]))) * 0.1
            )
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return save_safetensors(tensors, path)


@pytest.mark.parametrize(
    ("family", "dtype"), [("sd1", torch.float32), ("sd2-base", torch.float16), ("sdxl-base", torch.float32)]
)
def test_a_merged_file_is_the_merged_model_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path):
    """The towers of SD 2 and SDXL store q, k and v as one matrix, and their projection transposed."""
    config = shallow(family)
    base, one, two = (
        saved(tmp_path / "a.safetensors", config, dtype=dtype),
        lora_of(config, tmp_path / "one.safetensors"),
        lora_of(config, tmp_path / "two.safetensors", 3),
    )
    made = weights.merge_lora(base, [(one, 0.7), (two, -0.3)], tmp_path / "b.safetensors")
    model = weights.load(base, dtype=dtype)
    done = merge(model, [(load_lora(one, config), 0.7), (load_lora(two, config), -0.3)])
    assert made.parameters == done.parameters
    assert made.lines == done.lines
    after = weights.load(made.path, dtype=dtype).state_dict()
    before = weights.load(base, dtype=dtype).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == set(made.parameters)


def test_a_projection_that_is_stored_transposed_is_changed_in_place(tmp_path: Path):
    config = shallow("sdxl-base")
    lora = save_safetensors({"lora_te2_text_projection.diff": normal("p", (48, 80))}, tmp_path / "p.safetensors")
    made = weights.merge_lora(saved(tmp_path / "a.safetensors", config), [(lora, 1)], tmp_path / "b.safetensors")
    before, after = load_file(tmp_path / "a.safetensors"), load_file(made.path)
    key = "conditioner.embedders.1.model.text_projection"
    assert torch.equal(after[key], before[key] + normal("p", (48, 80)).T)


@pytest.mark.parametrize("kind", [save_zip, save_stream])
def test_every_other_tensor_keeps_its_name_type_and_bits(kind: Callable, tmp_path: Path):
    state = checkpoint(dtype=torch.float16, position_ids="F32")
    base = kind({"state_dict": state, "global_step": 3}, tmp_path / "a.ckpt")
    made = weights.merge_lora(
        base, [(some_lora(tmp_path / "l.safetensors"), 1)], tmp_path / "b.ckpt", model_config=TINY
    )
    with weights.open_file(made.path) as file:
        assert file.kind == "zip"
        after = {key: file[key] for key in file}
    assert [*after] == [*state]
    changed = {key for key, tensor in state.items() if not torch.equal(tensor, after[key])}
    assert len(changed) == 3 == len(made.parameters)
    assert all(tensor.dtype == after[key].dtype and tensor.shape == after[key].shape for key, tensor in state.items())


def test_a_moving_average_of_changed_weights_is_left_out_for_a_reason(tmp_path: Path):
    state = checkpoint(ema="full")
    base = save_safetensors(
        state,
        tmp_path / "a.safetensors",
        {"license": "openrail", "sshs_model_hash": "12", "modelspec.hash_sha256": "0x12"},
    )
    lora = some_lora(tmp_path / "l.safetensors")
    made = weights.merge_lora(base, [(lora, 1)], tmp_path / "b.safetensors", model_config=TINY)
    assert set(made.dropped) == {key for key in state if key.startswith("model_ema.")}
    with weights.open_file(made.path) as file:
        assert set(file) == {key for key in state if not key.startswith("model_ema.")}
        assert file.metadata["ldm.dropped"].startswith(
            f"{len(made.dropped)} tensors of model_ema.*: moving average of the weights before"
        )
        assert json.loads(file.metadata["ldm.merged_loras"]) == [{"name": "l.safetensors", "unet": 1.0, "text": 1.0}]
        assert file.metadata["license"] == "openrail"
        assert not {"sshs_model_hash", "modelspec.hash_sha256"} & set(file.metadata)
    made = weights.merge_lora(
        base, [(lora, (0, 1))], tmp_path / "c.safetensors", model_config=TINY
    )  # the text tower has no average
    assert made.dropped == {}
    assert set(load_file(made.path)) == set(state)
    assert made.parameters == (FC,)
    assert made.lines == ("l.safetensors at 0 (UNet) and 1 (text): 3 of 3 modules",)


def test_another_type_is_given_to_the_networks_alone(tmp_path: Path):
    """A schedule in half precision is another schedule, and position_ids are whole numbers even where they are stored
    as floats."""
    state = checkpoint(position_ids="F32")
    base = save_safetensors(state, tmp_path / "a.safetensors")
    after = load_file(
        weights.merge_lora(
            base,
            [(some_lora(tmp_path / "l.safetensors"), 1)],
            tmp_path / "b.safetensors",
            model_config=TINY,
            dtype=torch.bfloat16,
        ).path
    )
    for key, tensor in state.items():
        network = key.startswith(("model.", "first_stage_model.", "cond_stage_model.")) and not key.endswith(
            "position_ids"
        )
        assert after[key].dtype == (torch.bfloat16 if network else tensor.dtype), key
    assert {"betas", "alphas_cumprod"} <= set(state)


def test_what_cannot_be_merged_is_refused(tmp_path: Path):
    base, lora = saved(tmp_path / "a.safetensors"), some_lora(tmp_path / "l.safetensors")
    out = tmp_path / "b.safetensors"
    for loras, what in (
        ([], "no LoRA was named"),
        ([(lora, math.nan)], "l.safetensors: scale nan"),
        ([(lora, (1, True))], "scale"),
        ([(lora, (1, 2, 3))], "scale"),
    ):
        with pytest.raises(ArgumentError, match=what):
            weights.merge_lora("nowhere", loras, out)
    with pytest.raises(ArgumentError, match="cannot hold weights"):
        weights.merge_lora("nowhere", [(lora, 1)], out, dtype=torch.int8)
    with pytest.raises(OutputError, match="exists already"):
        weights.merge_lora("nowhere", [(lora, 1)], base)
    with pytest.raises(AmbiguousCheckpoint, match="of its own sizes"):
        weights.merge_lora(save_safetensors(load_file(base), tmp_path / "bare.safetensors"), [(lora, 1)], out)
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    with pytest.raises(FileError, match="is a diffusers folder; make it one file first"):
        weights.merge_lora(folder, [(lora, 1)], out)
    q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    state = load_file(base)
    for tensors, what in (
        (
            {key: value for key, value in state.items() if key != q},
            "has no unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight, which the LoRA changes",
        ),
        (state | {q: torch.ones(32, 31)}, r"is \[32, 31\] of torch.float32, where \[32, 32\]"),
        (state | {q: torch.ones(32, 32, dtype=torch.int8)}, "of torch.int8, where"),
    ):
        with pytest.raises(FileError, match=what):
            weights.merge_lora(
                save_safetensors(tensors, tmp_path / "c.safetensors"), [(lora, 1)], out, model_config=TINY
            )
    with pytest.raises(OutputError, match="too large for float16"):
        weights.merge_lora(base, [(lora, 1e9)], out, dtype=torch.float16)
    assert not out.exists()


def test_a_lora_for_another_family_is_not_merged(tmp_path: Path):
    lora = save_safetensors(
        {key: value for key, value in published("sd2").items() if "attn2" in key}, tmp_path / "l.safetensors"
    )
    with pytest.raises(FileError, match="is a LoRA for sd2-base"):
        weights.merge_lora(saved(tmp_path / "a.safetensors"), [(lora, 1)], tmp_path / "b.safetensors")
