"""What files are reported to be: every published one at its size, with the numbers its makers state, and everything
that goes with models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import resource
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import weights
from benchmarks.models.folders import FOLDERS, STATISTIC, STEMS, config_json, write_index
from benchmarks.models.published import FILES, manifest, narrow
from ldm.__main__ import main
from ldm.config import FAMILIES, VisionConfig
from ldm.errors import ArgumentError, FileError
from ldm.networks.safety import SafetyChecker
from tests.made import sparse
from tests.made.checkpoints import (
    POSITION_IDS,
    TINY,
    checkpoint,
    ema_name,
    lightning,
    save_safetensors,
    save_stream,
    save_zip,
)
from tests.made.loras import blank_lora
from tests.made.words import FORMS
from weights import Report, inspect
from weights.files.hashes import Published
from weights.files.source import Source
from weights.names.instead import instead
from weights.names.places import hugging_face_vision

# tensors and parameters of the published networks, as FACTS.md states them; position_ids count as a tensor and not as
# parameters
UNETS = {
    "sd1": (686, 859_520_964), "sd1-inpainting": (686, 859_535_364), "sd-image-variations": (686, 859_520_964),
    "sd2-base": (686, 865_910_724), "sd2-v": (686, 865_910_724), "sd2-inpainting": (686, 865_925_124),
    "sd2-depth": (686, 865_913_604), "x4-upscaler": (687, 473_398_020), "sdxl-base": (1680, 2_567_463_684),
    "sdxl-inpainting": (1680, 2_567_478_084), "sdxl-refiner": (1220, 2_259_526_660), "ssd-1b": (944, 1_331_334_404),
}  # fmt: skip
CLIP_L, OPENCLIP_H, BIGG = (197, 123_060_480), (294, 354_032_641), (390, 694_659_841)
TEXT = {
    "sd1": [CLIP_L],
    "sd2": [OPENCLIP_H],
    "x4-": [OPENCLIP_H],
    "sdxl-refiner": [BIGG],
    "sdxl-base": [CLIP_L, BIGG],
    "sdxl-inpainting": [CLIP_L, BIGG],
    "ssd": [CLIP_L, BIGG],
}
F32 = torch.float32
STATES = {
    "sd2-base": 0.02,
    "sd2-v": 0.2,
    "sd2-sgm": 0.02,
}  # standard deviation of the tensor that tells SD 2's models apart


def statistic(deviation: float, width: int = 320) -> Tensor:
    """Numbers of this standard deviation."""
    return torch.tensor([deviation, -deviation] * (width // 2))


def by_name(report: Report) -> dict[str, tuple[int, int]]:
    return {each.name: (each.tensors, each.parameters) for each in report.components}


def safety_checker() -> sparse.Listed:
    """The published safety checker."""
    with torch.device("meta"):
        state = SafetyChecker(VisionConfig()).state_dict()
    return {hugging_face_vision(name)[0].key: (tuple(value.shape), torch.float32) for name, value in state.items()}


def of_folder(family: str, name: str) -> sparse.Listed:
    """A component of a published folder."""
    return manifest(f"diffusers/{FOLDERS[family][name]}")


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
    """How many bytes each call reads of a file; a mapped tensor counts whole."""
    counts: list[int] = []
    for name in ("read", "copied", "mapped", "crc32"):
        original = getattr(Source, name)

        def counting(self, start, count, *rest, original=original):
            counts.append(count)
            return original(self, start, count, *rest)

        monkeypatch.setattr(Source, name, counting)
    return counts


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name]])
def test_every_published_file_is_known_at_its_size_from_its_header(name: str, tmp_path, bytes_read):
    state = {STATISTIC: statistic(STATES[name])} if name in STATES else None
    path = sparse.published(name, tmp_path / "a.safetensors", state)
    report = inspect(path)
    family = "sd2-v" if name == "sd2-v" else FILES[name]
    assert (report.what, report.kind, report.family, report.loadable, report.problem) == (
        "model",
        "safetensors",
        family,
        True,
        None,
    )
    assert report.bytes == path.stat().st_size
    found = by_name(report)
    assert found["unet"] == UNETS[family]
    assert found["vae"] == ((204, 55_325_927) if family == "x4-upscaler" else (248, 83_653_863))
    if name == "ssd-1b-hfscript":  # without logit_scale, and with position_ids in both towers
        assert (found["text.0"], found["text.1"]) == (CLIP_L, (390, 694_659_840))
    elif family == "sd-image-variations":
        assert found["vision"] == (296, 303_966_208)
    else:
        assert [found[key] for key in sorted(found) if key.startswith("text.")] == next(
            TEXT[start] for start in TEXT if family.startswith(start)
        )
    assert ("depth" in found) == (family == "sd2-depth")
    assert found.get("depth", (368, 123_146_985)) == (368, 123_146_985)
    assert (report.missing, report.missing_keys, report.unknown_keys) == ((), (), ())
    assert sum(tensors for tensors, _ in found.values()) == len(manifest(name)) == len(report.tensors)
    assert report.prediction.value == FAMILIES[family].prediction
    assert report.prediction.conflict is None
    assert report.ema.kind == (
        "full" if name == "sd1-full" else "leftover" if "model_ema.decay" in manifest(name) else "none"
    )
    halves = [
        key for key, (_, dtype) in manifest(name).items() if key.endswith("position_ids") and dtype == torch.float16
    ]
    assert [(damage.key, damage.what) for damage in report.damage] == [(key, "is stored as float16") for key in halves]
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert sum(bytes_read) <= header + 2**17, (
        "more than the header, the 64 KiB of A1111's hash and a few small tensors was read"
    )


def test_a_file_of_14_gb_is_inspected_in_little_memory_and_time(tmp_path):
    """Of the processor's time, since the machine may be busy; the file is a hole, and reading it would still take
    seconds."""
    path = sparse.published("sdxl-base-0.9", tmp_path / "a.safetensors")
    assert path.stat().st_size > 13_800_000_000
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert inspect(path).family == "sdxl-base"
    assert time.process_time() - begun < 2
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200 * 2**20


def test_a_family_that_is_refused_is_named(tmp_path):
    report = inspect(sparse.published("sd21-unclip-h", tmp_path / "a.safetensors"))
    assert (report.what, report.family, report.title, report.loadable) == ("model", "unclip", "unCLIP model", False)
    assert report.problem.startswith("is an unCLIP model, ")
    assert report.missing_keys == report.unknown_keys == ()  # of what it should have, nothing is known
    with pytest.raises(FileError) as refused:
        weights.load(tmp_path / "a.safetensors")
    assert str(refused.value).endswith(report.problem)


def test_a_model_of_its_own_sizes_is_reported_with_what_to_pass(tmp_path):
    path = save_safetensors(checkpoint(), tmp_path / "a.safetensors")
    report = inspect(path)
    assert (report.family, report.loadable) == ("sd1", False)
    assert report.problem.endswith("pass config=ModelConfig(...)")
    assert (
        report.missing_keys == report.unknown_keys == ()
    )  # SD 1 has more layers: its names say nothing about this one's
    known = inspect(path, config=TINY)
    assert (known.loadable, known.problem, known.prediction.evidence) == (True, None, ("the config given: eps",))


def test_a_narrow_model_with_the_layers_of_its_family_is_compared_by_name(tmp_path):
    listed = {key: (narrow(key, shape, 10), dtype) for key, (shape, dtype) in manifest("sd2-v").items()}
    gone = listed.popitem()[0]
    report = inspect(
        sparse.sparse(tmp_path / "a.safetensors", {**listed, "stray": ((1,), F32)}, {STATISTIC: statistic(0.2, 32)})
    )
    assert (report.family, report.prediction.value, report.loadable) == ("sd2-v", "v", False)
    assert (report.missing_keys, report.unknown_keys) == ((gone,), ("stray",))


def test_an_embedding_of_the_web_ui_tells_its_step(tmp_path):
    path = save_zip(
        {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": torch.ones(2, 768)},
            "name": "seal",
            "step": 3000,
            "sd_checkpoint": "7460a6fa",
        },
        tmp_path / "seal.pt",
    )
    report = inspect(path)
    assert (report.training.step, report.metadata["name"]) == (3000, "seal")


@pytest.mark.parametrize("write", [save_zip, save_stream])
def test_a_training_checkpoint_tells_its_step_and_its_average(write, tmp_path):
    with lightning(checkpoint(ema="full")) as contents:
        report = inspect(write(contents, tmp_path / "a.ckpt"), config=TINY)
    assert report.kind == {save_zip: "torch zip", save_stream: "torch stream"}[write]
    assert dataclasses.astuple(report.training) == (470_000, 3, "global_step")
    assert (report.ema.kind, report.ema.tensors, report.ema.expected) == ("full", 208, 208)
    assert report.metadata["pytorch-lightning_version"] == "1.4.2"
    assert report.loadable


def test_half_a_moving_average_is_no_average(tmp_path):
    state = checkpoint(ema="full")
    del state[ema_name("model.diffusion_model.out.2.weight")]
    report = inspect(save_safetensors(state, tmp_path / "a.safetensors"), config=TINY)
    assert (report.ema.kind, report.ema.tensors, report.ema.expected) == ("partial", 207, 208)
    assert dataclasses.astuple(report.training) == (
        470_000,
        None,
        "model_ema.num_updates, the updates of its moving average",
    )
    assert report.unknown_keys == ()


def test_what_is_missing_unknown_and_misshapen_is_what_load_refuses(tmp_path):
    state = checkpoint()
    gone = [key for key in state if key.startswith("first_stage_model.")]
    for change, missing, unknown, problem in (
        (dict.fromkeys(gone), ("vae",), (), "has no VAE"),
        ({gone[3]: None, "a.b": torch.ones(1)}, (), ("a.b",), "tensors 1 missing"),
        ({gone[3]: torch.ones(1)}, (), (), "tensors 1 of another shape"),
        ({gone[0]: state[gone[0]].to(torch.int8)}, (), (), "quantised weights are not read"),
    ):
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        path = save_safetensors(changed, tmp_path / "a.safetensors")
        report = inspect(path, config=TINY)
        assert (report.missing, report.unknown_keys, report.loadable) == (missing, unknown, False)
        assert report.missing_keys == ((gone[3],) if problem == "tensors 1 missing" else ())
        assert problem in report.problem
        with pytest.raises(FileError) as refused:
            weights.load(path, TINY)
        assert problem in str(refused.value)


def test_the_model_that_ships_is_known_by_its_own_config():
    report = inspect()
    assert (report.family, report.loadable, report.prediction.evidence) == (
        "blocks",
        True,
        ("ldm.config in its metadata: eps",),
    )
    assert report.path.endswith(".safetensors")


# --- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deviation", "metadata", "value", "conflict", "loadable"),
    [
        (0.2, {}, "v", None, True),
        (0.02, {"modelspec.prediction_type": "epsilon"}, "eps", None, True),
        (
            0.2,
            {"modelspec.prediction_type": "epsilon"},
            None,
            "modelspec.prediction_type says eps, its weights v (norm1.bias std 0.200",
            False,
        ),
        (0.09, {}, None, "norm1.bias std 0.090 is in between: loading asks the network", True),
        (0.09, {"modelspec.prediction_type": "v"}, "v", None, True),
        (0.2, {"modelspec.prediction_type": "sample"}, None, None, False),
    ],
)
def test_what_sd_2_predicts_is_said_with_its_evidence(deviation, metadata, value, conflict, loadable, tmp_path):
    path = sparse.published("sd2-base", tmp_path / "a.safetensors", {STATISTIC: statistic(deviation)}, metadata)
    report = inspect(path)
    assert (report.prediction.value, report.loadable) == (value, loadable)
    assert report.prediction.conflict is None if conflict is None else conflict in report.prediction.conflict
    if value is not None:
        assert any(f"std {deviation:.3f}" in line for line in report.prediction.evidence)
        assert report.family == {"eps": "sd2-base", "v": "sd2-v"}[value]
    assert inspect(path, config="sd2-v").prediction.value == "v"


@pytest.mark.parametrize(("key", "says"), [("v_pred", "v"), ("ztsnr", None), ("edm_mean", None)])
def test_marks_of_training_are_evidence(key, says, tmp_path):
    listed = {**manifest("sdxl-base"), key: ((), torch.float32)}
    report = inspect(sparse.sparse(tmp_path / "a.safetensors", listed))
    assert report.prediction.value == says
    assert report.loadable == (says is not None)
    assert report.unknown_keys == () if says else key in report.problem


def test_zero_terminal_snr_is_part_of_what_is_said_of_the_prediction(tmp_path):
    listed = {**manifest("sdxl-base"), "v_pred": ((), torch.float32), "ztsnr": ((), torch.float32)}
    report = inspect(sparse.sparse(tmp_path / "a.safetensors", listed))
    assert report.loadable
    assert report.prediction.value == "v"
    assert report.prediction.evidence == (
        "key v_pred: v",
        "trained with zero terminal SNR: its last timestep is pure noise",
    )


# --- damage ---------------------------------------------------------------------------------------------------------


def test_damage_that_loading_puts_right_is_named(tmp_path):
    state = checkpoint(position_ids="wrong", text_model=False)
    halved = {key: value.half() if key in ("betas", "alphas_cumprod") else value for key, value in state.items()}
    report = inspect(save_safetensors(halved, tmp_path / "a.safetensors"), config=TINY)
    assert {damage.key.rpartition(".")[2]: damage.what for damage in report.damage} == {
        "position_ids": "does not count from 0 to 76",
        "alphas_cumprod": "2 buffers of the noise schedule are stored as float16, too coarse to be used",
        "weight": "the names of this text tower lack text_model.",
    }
    assert report.loadable
    assert inspect(save_safetensors(checkpoint(), tmp_path / "b.safetensors"), config=TINY).damage == ()


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        (torch.arange(77.0)[None], "is stored as float32"),
        (torch.arange(77.0)[None] + 0.5, "is stored as float32 and does not count from 0 to 76"),
        (torch.arange(77), r"has the shape [77]"),
    ],
)
def test_position_ids_are_checked_number_by_number(ids: Tensor, what: str, tmp_path):
    report = inspect(save_safetensors({**checkpoint(), POSITION_IDS: ids}, tmp_path / "a.safetensors"), config=TINY)
    assert [(damage.key, damage.what) for damage in report.damage] == [(POSITION_IDS, what)]


# --- folders --------------------------------------------------------------------------------------------------------


def folder(path: Path, family: str, variant: str = "") -> Path:
    """A published diffusers folder at its size, without its depth estimator."""
    path.mkdir()
    for name in filter(FOLDERS[family].get, FOLDERS[family]):
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(config_json(family, name, wide=True)))
        listed = of_folder(family, name)
        numbers = {
            key: torch.arange(shape[-1])[None] for key, (shape, _) in listed.items() if key.endswith("position_ids")
        }
        if name == "unet" and family.startswith("sd2"):
            numbers["up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"] = statistic(
                0.2 if family == "sd2-v" else 0.02
            )
        sparse.sparse(path / name / f"{STEMS.get(name, 'model')}{variant}.safetensors", listed, numbers)
    write_index(path, family, filter(FOLDERS[family].get, FOLDERS[family]))
    return path


@pytest.mark.parametrize(
    "family", ["sd1", "sd-image-variations", "sd2-v", "sd2-depth", "x4-upscaler", "sdxl-refiner", "ssd-1b"]
)
def test_a_published_folder_is_known_at_its_size(family: str, tmp_path, bytes_read):
    path = folder(tmp_path / "model", family, ".fp16" if family == "sd1" else "")
    report = inspect(path)
    assert (report.kind, report.what, report.family) == ("diffusers folder", "model", family)
    assert report.variant == ("fp16" if family == "sd1" else "")
    assert [Path(file.name).parts[0] for file in report.files] == [*filter(FOLDERS[family].get, FOLDERS[family])]
    towers = {"sd-image-variations": {"vision"}, "ssd-1b": {"text.0", "text.1"}}.get(family, {"text.0"})
    assert by_name(report).keys() == {"unet", "vae"} | towers
    assert by_name(report)["unet"] == UNETS[family]
    assert (report.missing, report.loadable) == ((("depth",), False) if family == "sd2-depth" else ((), True))
    assert report.bytes == sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    assert report.prediction.value == FAMILIES[family].prediction
    assert report.prediction.evidence[0] == f"scheduler_config.json: {FAMILIES[family].prediction}"
    assert (report.missing_keys, report.unknown_keys, report.damage) == ((), (), ())
    assert all(file.a1111_old is None for file in report.files)
    assert sum(bytes_read) < 2**20


def test_a_folders_shards_and_its_safety_checker_are_seen_and_its_components_alone(tmp_path):
    path = folder(tmp_path / "model", "sd1")
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    listed = of_folder("sd1", "unet")
    names = {key: f"diffusion_pytorch_model-0000{1 + (i > 300)}-of-00002.safetensors" for i, key in enumerate(listed)}
    for name in set(names.values()):
        sparse.sparse(path / "unet" / name, {key: listed[key] for key in listed if names[key] == name})
    (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (path / "safety_checker").mkdir()
    sparse.sparse(path / "safety_checker" / "model.safetensors", safety_checker())
    report = inspect(path)
    assert (report.sharded, report.variant, len(report.files), report.loadable) == (True, "", 4, True)
    assert by_name(report)["safety"] == (396, 303_981_588)
    assert by_name(report)["unet"] == UNETS["sd1"]
    assert [inspect(path / name).what for name in ("unet", "vae", "text_encoder", "safety_checker")] == [
        "unet",
        "vae",
        "text tower",
        "safety checker",
    ]
    with pytest.raises(FileError, match="is a directory without weights of a known name"):
        inspect(path / "scheduler")
    (path / "vae" / "config.json").write_text("{}")
    report = inspect(path)
    assert (report.family, report.loadable) == ("sd1", False)
    assert "vae/config.json: does not describe the tensors beside it" in report.problem


# --- LoRAs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "modules"),
    [
        ("sd1", "sd1", {"unet": 192, "text.0": 72}),
        ("sd2", "sd2-base", {"unet": 192, "text.0": 138}),
        ("sdxl", "sdxl-base", {"unet": 722, "text.0": 72, "text.1": 192}),
        ("ssd-1b", "ssd-1b", {"unet": 360, "text.0": 72, "text.1": 192}),
    ],
)
def test_a_lora_is_known_by_the_modules_that_it_changes(name, family, modules, tmp_path, bytes_read):
    path = save_safetensors(blank_lora(name), tmp_path / "a.safetensors", {"ss_base_model_version": "of its trainer"})
    report = inspect(path)
    lora, count = report.lora, sum(modules.values())
    assert (report.what, report.title, report.loadable, lora.families) == (
        "lora",
        f"LoRA for {family}",
        True,
        (family,),
    )
    assert (lora.modules, lora.fitting, lora.weights) == (modules, count, count)
    assert (lora.kinds, lora.spellings, lora.ranks, lora.alphas) == (
        {"LoRA": count},
        {"kohya": count},
        {1: count},
        {1.0: count},
    )
    assert report.unknown_keys == ()
    assert "ss_base_model_version: of its trainer" in report.evidence
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(bytes_read) <= 2 * header + 2**17 + 4 * count  # 4 bytes are an alpha


Q, CONV = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_down_blocks_3_resnets_0_conv1",
)  # of SD 1: [320, 320], [1280, 1280, 3, 3]
KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoRA": {f"{Q}.lora_down.weight": (4, 320), f"{Q}.lora_up.weight": (320, 4)},
    "LoCon": {f"{CONV}.lora_down.weight": (4, 1280, 3, 3), f"{CONV}.lora_up.weight": (1280, 4, 1, 1)},
    "LoHa": {
        f"{Q}.hada_w1_a": (320, 4),
        f"{Q}.hada_w1_b": (4, 320),
        f"{Q}.hada_w2_a": (320, 4),
        f"{Q}.hada_w2_b": (4, 320),
    },
    "LoKr": {f"{Q}.lokr_w1": (16, 16), f"{Q}.lokr_w2_a": (20, 4), f"{Q}.lokr_w2_b": (4, 20)},
    "GLoRA": {
        f"{Q}.a1.weight": (320, 4),
        f"{Q}.a2.weight": (4, 320),
        f"{Q}.b1.weight": (320, 4),
        f"{Q}.b2.weight": (4, 320),
    },
    "DoRA": {f"{Q}.lora_down.weight": (4, 320), f"{Q}.lora_up.weight": (320, 4), f"{Q}.dora_scale": (1, 320)},
    "DoRA of LoHa": {
        f"{Q}.hada_w1_a": (320, 4),
        f"{Q}.hada_w1_b": (4, 320),
        f"{Q}.hada_w2_a": (320, 4),
        f"{Q}.hada_w2_b": (4, 320),
        f"{Q}.dora_scale": (1, 320),
    },
    "full difference": {f"{Q}.diff": (320, 320)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_is_told_by_its_name(kind: str, tmp_path):
    path = save_safetensors({key: torch.zeros(shape) for key, shape in KINDS[kind].items()}, tmp_path / "a.safetensors")
    report = inspect(path, config="sd1")
    assert (report.lora.kinds, report.lora.families, report.loadable) == ({kind: 1}, ("sd1",), True)
    assert report.lora.ranks == ({} if kind == "full difference" else {4: 1})
    assert report.lora.alphas == {}
    other = inspect(path, config="sdxl-base")
    assert (other.lora.families, other.loadable) == ((), False)
    assert other.problem == "a model of family sdxl-base has none of the modules that it changes"


def test_spellings_are_told_apart_and_strangers_counted(tmp_path):
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"unet.{module}.to_q.lora_A.weight": torch.zeros(4, 320),
        f"unet.{module}.to_q.lora_B.weight": torch.zeros(320, 4),
        f"unet.{module}.processor.to_k_lora.down.weight": torch.zeros(8, 320),
        f"unet.{module}.processor.to_k_lora.up.weight": torch.zeros(320, 8),
        "lora_unet_nowhere.lora_down.weight": torch.zeros(8, 320),
        "lora_unet_nowhere.lora_up.weight": torch.zeros(320, 8), "stray": torch.zeros(1),
    }  # fmt: skip
    report = inspect(save_safetensors(tensors, tmp_path / "a.safetensors"), config="sd1")
    assert report.lora.spellings == {"peft": 1, "diffusers": 1, "kohya": 1}
    assert (report.lora.fitting, report.lora.weights, report.lora.ranks) == (2, 3, {8: 2, 4: 1})
    assert report.unknown_keys == ("stray", "lora_unet_nowhere")


def test_a_lora_that_lacks_a_part_is_a_damaged_one(tmp_path):
    report = inspect(save_safetensors({f"{Q}.lora_down.weight": torch.zeros(4, 320)}, tmp_path / "a.safetensors"))
    assert (report.what, report.title, report.loadable, report.lora) == ("lora", "damaged LoRA", False, None)
    assert "has no up beside its down" in report.problem


def test_a_lora_of_text_alone_may_be_for_several_families(tmp_path):
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    report = inspect(
        save_safetensors(
            {f"{key}.lora_down.weight": torch.zeros(4, 768), f"{key}.lora_up.weight": torch.zeros(3072, 4)},
            tmp_path / "a.safetensors",
        )
    )
    assert report.lora.families == ("sd1", "sdxl-base")
    assert report.lora.modules == {"text.0": 1}


# --- everything else ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_embedding_is_told_with_its_vectors(form: str, tmp_path):
    write, expected = FORMS[form]
    report = inspect(write(tmp_path))
    (count,) = {len(vectors) for vectors in expected.values()}
    assert (report.what, report.embedding.vectors, sorted(report.embedding.towers.values())) == (
        "embedding",
        count,
        sorted(expected),
    )
    assert report.loadable
    maker = next(
        part
        for part in ("A1111", "kohya", "SDXL", "diffusers", "bare", "original")
        if part in form or part == "original"
    )
    assert maker in report.embedding.form


def test_an_embedding_names_its_word_and_tower(tmp_path):
    report = inspect(save_safetensors({"<cat>": torch.zeros(3, 1024)}, tmp_path / "a.safetensors"))
    assert (report.title, report.embedding.word, report.embedding.towers) == (
        "textual-inversion embedding for OpenCLIP-H",
        "<cat>",
        {"OpenCLIP-H": 1024},
    )
    for tensors, problem in (
        ({"a": torch.zeros(0, 8)}, "has the shape [0, 8]"),
        ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(2, 1280)}, "another number of vectors"),
        ({"a": torch.zeros(8), "b": torch.zeros(8)}, "holds 2 tensors"),
    ):
        odd = inspect(save_safetensors(tensors, tmp_path / "b.safetensors"))
        assert (odd.what, odd.loadable) == ("other", False)
        assert problem in odd.problem


ALONE: dict[str, tuple[sparse.Listed, str, str, bool]] = {
    "VAE": (manifest("vae-standalone"), "vae", "VAE of SD 1, SD 2 or SDXL, which have the same shapes", True),
    "VAE, diffusers": (of_folder("sd1-inpainting", "vae"), "vae",
        "VAE of SD 1, SD 2 or SDXL, which have the same shapes", True),
    "VAE of the upscaler": (of_folder("x4-upscaler", "vae"), "vae", "VAE of the x4 upscaler", True),
    "VAE of a model": ({key: value for key, value in manifest("sd1").items() if key.startswith("first_stage_model.")},
        "vae", "VAE of SD 1, SD 2 or SDXL, which have the same shapes", True),
    "another VAE": ({"encoder.conv_in.weight": ((8, 3, 3, 3), F32), "decoder.conv_in.weight": ((8, 16, 3, 3), F32)},
        "vae", "VAE of other sizes", False),
    "safety checker": (safety_checker(), "safety checker", "safety checker", True),
    "UNet": ({key: value for key, value in manifest("sd2-base").items() if key.startswith("model.diffusion_model.")},
        "unet", "UNet alone, of an SD 2 model", False),
    "UNet, ComfyUI": ({key.removeprefix("model."): value for key,
            value in manifest("ssd-1b").items() if key.startswith("model.diffusion_model.")}, "unet",
            "UNet alone, of an SSD-1B model", False),
    "UNet, diffusers": (of_folder("sd1-inpainting", "unet"), "unet", "UNet alone, of an SD 1 inpainting model", False),
    "text tower": (of_folder("sdxl-base", "text_encoder_2"), "text tower", "text tower, OpenCLIP-bigG, alone", False),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": ((320, 4, 3, 3), F32)}, "controlnet", "ControlNet", False),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": ((9216, 3072), F32)}, "transformer", "Flux or SD 3 transformer",
        False),
    "a network": ({f"layers.{i}.weight": ((8, 8), F32) for i in range(5)}, "other", "something else", False),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_model_is_told_by_what_it_is(name: str, tmp_path):
    listed, what, title, loadable = ALONE[name]
    report = inspect(sparse.sparse(tmp_path / "a.safetensors", listed))
    assert (report.what, report.title, report.loadable) == (what, title, loadable)
    assert (report.problem is None) == loadable
    assert (report.missing_keys, report.unknown_keys) == ((), ()) or not loadable
    assert len(report.tensors) == len(listed)


def test_a_vae_with_a_hole_is_not_loadable(tmp_path):
    listed = dict(manifest("vae-standalone"))
    del listed["decoder.conv_out.bias"]
    report = inspect(sparse.sparse(tmp_path / "a.safetensors", listed))
    assert (report.loadable, report.missing_keys) == (False, ("decoder.conv_out.bias",))


@pytest.mark.parametrize("name", [name for name in ALONE if name != "UNet"])
def test_the_report_and_the_loader_agree_on_what_is_no_model(name: str):
    shapes = {key: shape for key, (shape, _) in ALONE[name][0].items()}
    prefix = "model.diffusion_model."
    bare = f"is a bare UNet (no {prefix} in its names), not a model; use a complete checkpoint"
    tower = "is a text tower alone, not a model; use a complete checkpoint"
    words = {
        "vae": "is a VAE alone, not a model; use it with --vae (weights.load_vae), beside a complete checkpoint",
        "safety checker": "is a safety checker, not a model; use it with --safety",
        "unet": "is a diffusers UNet alone, not a model; name the folder that unet/, vae/ and text_encoder/ are in",
        "text tower": tower,
        "controlnet": "is a ControlNet, not a model; load the model that it steers",
        "transformer": "is a Flux or SD 3 transformer, not a model; use a Stable Diffusion checkpoint, which has "
        "a UNet",
        "other": f"has no UNet ({prefix}input_blocks.0.0.weight is missing; it begins with layers.0.weight); "
        "use a Stable Diffusion checkpoint",
    }
    assert instead(shapes) == (bare if name == "UNet, ComfyUI" else words[ALONE[name][1]])


@pytest.mark.parametrize(
    ("listed", "what", "title"),
    [
        ({"emb_params": ((2, 768), F32)}, "embedding", "textual-inversion embedding for CLIP-L"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": ((4, 1280, 1, 1), F32),
          "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": ((1280, 4, 1, 1), F32)}, "lora", "LoRA for sd1"),
    ],
)  # fmt: skip
def test_an_adapter_in_a_folder_is_what_it_is_in_a_file(listed, what: str, title: str, tmp_path):
    sparse.sparse(tmp_path / "diffusion_pytorch_model.safetensors", listed)
    (tmp_path / "config.json").write_text("{}")
    reports = inspect(tmp_path), inspect(tmp_path / "diffusion_pytorch_model.safetensors")
    for report in reports:
        assert (report.what, report.problem) == (what, None)
        assert title in report.title


def test_what_cannot_be_read_is_the_readers_error(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(FileError, match="is a Git LFS pointer"):
        inspect(tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="does not exist"):
        inspect(tmp_path / "b.safetensors")
    with pytest.raises(ArgumentError, match="'sd3' is no family"):
        inspect(tmp_path / "a.safetensors", config="sd3")


# --- hashes, JSON and text ------------------------------------------------------------------------------------------


def test_the_bytes_of_a_published_file_are_recognised(tmp_path, monkeypatch):
    path = save_safetensors({"<cat>": torch.zeros(3, 768)}, tmp_path / "renamed.safetensors")
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(
        "weights.files.hashes.PUBLISHED",
        (Published("cat.safetensors", size, digest), Published("dog.safetensors", size, "0" * 64)),
    )
    (plain,), (file,) = inspect(path).files, inspect(path, hash=True).files
    assert (plain.sha256, plain.a1111_new, plain.published, plain.same_size) == (
        None,
        None,
        (),
        ("cat.safetensors", "dog.safetensors"),
    )
    assert (file.sha256, file.a1111_new, file.published) == (digest, digest[:10], ("cat.safetensors",))
    steps = []
    inspect(path, hash=True, on_hash=steps.append)
    assert (steps[-1].done, steps[-1].total) == (size, size)


def test_json_has_every_name_that_the_docstring_lists(tmp_path, capsys):
    state = checkpoint()
    state[POSITION_IDS] = state[POSITION_IDS].half()
    path = save_safetensors(state, tmp_path / "a.safetensors", {"note": "\u202ea\nb", "long": "x" * 500})
    assert main(["inspect", "--json", "--keys", "*position_ids", str(path), str(path)]) == 0
    one, two = capsys.readouterr().out.splitlines()
    assert one == two
    assert one.isascii()
    found = json.loads(one)
    listed = set(re.findall(r"^    (\w+)  +\S", Report.__doc__, re.MULTILINE))
    assert set(found) == listed | {"bytes"} == {field.name for field in dataclasses.fields(Report)} | {"bytes"}
    assert found["metadata"] == {"note": "\u202ea\nb", "long": "x" * 500}
    assert found["tensors"] == [{"name": POSITION_IDS, "dtype": "float16", "shape": [1, 77]}]
    assert found["damage"] == [{"key": POSITION_IDS, "what": "is stored as float16"}]
    assert found["components"][0]["dtypes"] == {"float32": 208}


def test_the_text_is_short_aligned_and_harmless(tmp_path, capsys):
    state = {**checkpoint(position_ids="F16"), "\x1b[2Jevil": torch.ones(1)}
    path = save_safetensors(
        state, tmp_path / "a.safetensors", {"note": "\x1b[2J" + "x" * 500, **{f"k{i}": "v" for i in range(30)}}
    )
    assert main(["inspect", str(path), "--keys", "evil"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines)
    assert max(map(len, lines[1:])) < 170
    assert lines[0] == f"{path}: SD 1 model"
    text = "\n".join(lines)
    assert "  not loaded  is an SD 1 model of its own sizes" in text
    assert re.search(r"^  holds       UNet +208 tensors +\S+ parameters  float32$", text, re.MULTILINE)
    assert "and 15 more; --json has all" in text
    assert lines[-1] == "    \\u001b[2Jevil  float32   [1]"


def test_the_text_of_a_published_file_tells_what_a_newcomer_asks(tmp_path, capsys):
    path = sparse.published("sd2-v", tmp_path / "a.safetensors", {STATISTIC: statistic(0.2)})
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for line in (
        "  family      sd2-v",
        "  predicts    v",
        "865.91M parameters",
        f"  use it with --ckpt {path}",
        "average     its bookkeeping alone",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("deviation", "line", "last"),
    [
        (
            0.2,
            "  conflict    modelspec.prediction_type says eps, its weights v",
            "  not loaded  until the conflict is settled",
        ),
        (0.09, None, "  use it with --ckpt"),
    ],
)
def test_the_text_says_a_conflict_once(deviation, line, last, tmp_path, capsys):
    path = sparse.published(
        "sd2-base",
        tmp_path / "a.safetensors",
        {STATISTIC: statistic(deviation)},
        {"modelspec.prediction_type": "epsilon"},
    )
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [each for each in lines if "conflict " in each and each.startswith("  conflict")] == [
        each for each in lines if line and each.startswith(line)
    ]
    assert lines[-1].startswith(last)


def test_the_text_of_loras_and_embeddings_tells_what_they_are_made_of(tmp_path, capsys):
    lora = save_safetensors(
        {key: torch.zeros(shape) for key, shape in {**KINDS["LoRA"], **KINDS["LoCon"]}.items()},
        tmp_path / "a.safetensors",
    )
    embedding = save_safetensors({"<cat>": torch.zeros(3, 1024)}, tmp_path / "b.safetensors")
    assert main(["inspect", str(lora), str(embedding), "--hash"]) == 0
    text = capsys.readouterr().out
    for line in (
        "a.safetensors: LoRA/LoCon for sd1", "made of     LoRA (1), LoCon (1)", "rank        4",
        "alpha       not stored; it is the rank", "changes     unet (2) modules", "names of    kohya",
        f"hash        sha256 {hashlib.sha256(lora.read_bytes()).hexdigest()}",
        "b.safetensors: textual-inversion embedding for OpenCLIP-H", "form        diffusers, for '<cat>'",
        "vectors     3, for OpenCLIP-H (width 1024)", f"use it with --embedding {embedding}",
    ):  # fmt: skip
        assert line in text


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*", 399),
        ("model.diffusion_model.out.2.*", 2),
        ("attn1.to_q", 4),
        (r"/out\.2\.(weight|bias)$/", 2),
        ("nothing", 0),
    ],
)
def test_keys_are_chosen_by_glob_part_or_expression(pattern, count, tmp_path, capsys):
    path = save_safetensors(checkpoint(), tmp_path / "a.safetensors")
    assert main(["inspect", str(path), "--keys", pattern]) == 0
    assert f"  tensors     {count} of 399\n" in capsys.readouterr().out


def test_one_bad_file_does_not_hide_the_others(tmp_path, capsys):
    bad, good = (
        tmp_path / "bad.safetensors",
        save_safetensors({"<cat>": torch.zeros(3, 768)}, tmp_path / "good.safetensors"),
    )
    bad.write_bytes(b"")
    assert main(["inspect", str(bad), str(good)]) == 2
    out = capsys.readouterr()
    assert "good.safetensors: textual-inversion embedding for CLIP-L" in out.out
    assert out.err.splitlines() == [
        f"ldm: error: {str(bad)[-80:] if len(str(bad)) <= 80 else '...' + str(bad)[-77:]}: is empty (0 bytes); "
        "download it again"
    ]
    assert main(["inspect", str(bad)]) == 2
    for words in (["--keys", "/(/"], ["--config", "sd3"]):
        assert main(["inspect", str(good), str(bad), *words]) == 2
        assert capsys.readouterr().out == ""
