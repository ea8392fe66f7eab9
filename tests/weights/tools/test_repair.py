"""A repaired file is, bit by bit, the one that was damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from benchmarks.models.published import narrowed
from ldm.config import FAMILIES
from ldm.errors import FileError, OutputError
from tests.made.checkpoints import POSITION_IDS, TINY, checkpoint, lightning, save_safetensors, save_stream, save_zip
from weights import load, open_file, repair
from weights.names.metadata import to_json

PREFIX = "cond_stage_model.transformer."
BETAS = {"sd1": (0.00085, 0.012), "x4-upscaler": (0.0001, 0.02)}


def schedule(family: str = "sd1") -> dict[str, Tensor]:
    """The twelve buffers as the original code registers them: in float64, then float32."""
    start, end = BETAS[family]
    betas = (torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2).numpy()
    bar = np.cumprod(1.0 - betas, axis=0)
    prev = np.append(1.0, bar[:-1])
    posterior = betas * (1.0 - prev) / (1.0 - bar)
    values = [betas, bar, prev, np.sqrt(bar), np.sqrt(1.0 - bar), np.log(1.0 - bar), np.sqrt(1.0 / bar),
        np.sqrt(1.0 / bar - 1), posterior,
              np.log(np.maximum(posterior, 1e-20)), betas * np.sqrt(prev) / (1.0 - bar),
              (1.0 - prev) * np.sqrt(1.0 - betas) / (1.0 - bar)]  # fmt: skip
    names = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
             "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
             "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"]  # fmt: skip
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in zip(names, values, strict=True)}


@pytest.fixture(scope="module")
def model() -> dict[str, Tensor]:
    """A small SD 1 file with nothing wrong in it."""
    return {**checkpoint(), **schedule()}


@pytest.fixture(scope="module")
def sound(model) -> dict[str, Tensor]:
    """What of it can be damaged, and a little that cannot."""
    return {key: value for key, value in model.items() if not key.startswith("model.") or ".time_embed." in key}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Bit by bit, and in no other type or shape."""
    bits = [
        {
            key: (value.dtype, tuple(value.shape), value.reshape(-1).contiguous().view(torch.uint8))
            for key, value in state.items()
        }
        for state in (found, wanted)
    ]
    return bits[0].keys() == bits[1].keys() and all(
        one[:2] == two[:2] and one[2].equal(two[2]) for one, two in ((bits[0][key], bits[1][key]) for key in bits[0])
    )


def tensors(path: Path) -> dict[str, Tensor]:
    with open_file(path) as file:
        return {key: file.read(key, mapped=False) for key in file}


def require_repaired(damaged: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, *lines: str) -> None:
    """The file of what is damaged is repaired to what is wanted; what was done is said in these lines."""
    save_safetensors({key: value.contiguous() for key, value in damaged.items()}, path, {"modelspec.title": "mine"})
    before = path.read_bytes()
    done = repair(path)
    assert done.path == path.with_name(f"{path.stem}-repaired.safetensors")
    assert same(tensors(done.path), wanted)
    assert same(safetensors.torch.load_file(done.path), wanted)
    assert path.read_bytes() == before
    assert len(done.done) == len(lines), done.done
    assert all(line in said for said, line in zip(done.done, lines, strict=True)), done.done
    assert all(len(line) <= 200 for line in done.done)
    with open_file(done.path) as file:
        assert file.metadata == {"modelspec.title": "mine", "ldm.repair": "; ".join(done.done)}
    assert repair(done.path).done == ()


# --- each kind of damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        (torch.arange(77)[None].float(), "is stored as float32: now 0 to 76 as int64"),
        (torch.arange(77)[None].half(), "is stored as float16: now 0 to 76 as int64"),
        ((torch.arange(77)[None] * 0.9).bfloat16(), "is stored as bfloat16 and counts wrongly"),
        (torch.arange(77)[None].int(), "is stored as int32"),
        (torch.arange(77)[None].flip(1), "counts wrongly"),
        (torch.arange(77), "has the shape [77]"),
        (torch.arange(50)[None], "has the shape [1, 50]"),
        (torch.tensor(3), "has the shape []"),
    ],
)
def test_position_ids_count_again(sound, ids: Tensor, fault: str, tmp_path: Path) -> None:
    require_repaired(
        {**sound, POSITION_IDS: ids}, sound, tmp_path / "x.safetensors", f"text_model.embeddings.position_ids {fault}"
    )


def test_missing_position_ids_are_put_in(sound, tmp_path: Path) -> None:
    damaged = {key: value for key, value in sound.items() if key != POSITION_IDS}
    require_repaired(
        damaged, sound, tmp_path / "x.safetensors", "embeddings.position_ids is missing: 0 to 76 as int64 put in"
    )


def test_a_second_towers_stray_position_ids_are_mended_too(sound, tmp_path: Path) -> None:
    stray = "conditioner.embedders.1.model.text_model.embeddings.position_ids"
    require_repaired(
        {**sound, stray: torch.arange(77)[None].half()},
        {**sound, stray: torch.arange(77)[None]},
        tmp_path / "x.safetensors",
        "is stored as float16",
    )


def test_the_prefix_of_a_text_tower_is_put_in(sound, tmp_path: Path) -> None:
    bare = {key.replace(".text_model.", "."): value for key, value in sound.items()}
    n = len([key for key in sound if key.startswith(PREFIX)])
    require_repaired(bare, sound, tmp_path / "x.safetensors", f"{n} names under {PREFIX} lack text_model.: put in")
    without = {key: value for key, value in bare.items() if "position_ids" not in key}
    require_repaired(without, sound, tmp_path / "y.safetensors", f"{n - 1} names under", "position_ids is missing")


def test_a_tower_under_both_names_loses_one_if_they_agree(sound, tmp_path: Path) -> None:
    key = f"{PREFIX}text_model.final_layer_norm.bias"
    bare = key.replace(".text_model.", ".")
    twice = {**sound, bare: sound[key].clone(), f"{PREFIX}embeddings.position_ids": torch.arange(77).flip(0)[None]}
    require_repaired(twice, sound, tmp_path / "x.safetensors", f"2 names under {PREFIX} lack")
    path = save_safetensors({**sound, bare: sound[key] + 1}, tmp_path / "z.safetensors")
    with pytest.raises(
        FileError, match=r"final_layer_norm.bias and .+final_layer_norm.bias differ and should not; use another copy"
    ) as error:
        repair(path)
    assert error.value.key == bare
    assert not (tmp_path / "z-repaired.safetensors").exists()


def sdxl() -> dict[str, Tensor]:
    """The tensors of both text towers of SDXL."""
    state = narrowed("ssd-1b-hfscript")
    return {
        key: value
        for key, value in state.items()
        if key.startswith("conditioner.") and "encoder.layers.1" not in key and "position_ids" not in key
    }


def test_the_first_tower_of_sdxl_is_repaired_as_that_of_sd_1(tmp_path: Path) -> None:
    first = "conditioner.embedders.0.transformer."
    state = {**sdxl(), f"{first}text_model.embeddings.position_ids": torch.arange(77)[None]}
    bare = {key.replace(f"{first}text_model.", first): value for key, value in state.items()}
    require_repaired(bare, state, tmp_path / "x.safetensors", f"names under {first} lack text_model.: put in")
    missing = {key: value for key, value in state.items() if "position_ids" not in key}
    require_repaired(missing, state, tmp_path / "y.safetensors", "position_ids is missing")


def test_a_projection_is_named_once(tmp_path: Path) -> None:
    key = "conditioner.embedders.1.model.text_projection.weight"
    state = {**sdxl(), "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    assert key in state
    doubled = {(f"{key}.weight" if name == key else name): value for name, value in state.items()}
    require_repaired(doubled, state, tmp_path / "x.safetensors", f"{key}.weight: its doubled .weight made single")
    theirs = key.removesuffix(".weight")
    parameter = {**{name: value for name, value in state.items() if name != key}, theirs: state[key].T}
    require_repaired(
        {**parameter, key: state[key]},
        parameter,
        tmp_path / "y.safetensors",
        "the same projection is there as text_projection, this copy left out",
    )
    path = save_safetensors(
        {**parameter, theirs: state[key].T.contiguous(), key: state[key] * 2}, tmp_path / "z.safetensors"
    )
    with pytest.raises(FileError, match=r"text_projection and .+text_projection.weight differ and should not"):
        repair(path)


@pytest.mark.parametrize("family", BETAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_schedules_are_computed_anew(sound, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = {
        **sound,
        **schedule(family),
        **{f"low_scale_model.{key}": value for key, value in schedule("x4-upscaler").items()},
    }
    damaged = {
        key: value.to(dtype) if key.removeprefix("low_scale_model.") in schedule() else value
        for key, value in wanted.items()
    }
    name = str(dtype).removeprefix("torch.")
    require_repaired(
        damaged,
        wanted,
        tmp_path / "x.safetensors",
        f"24 noise schedule buffers are rounded to {name}: computed anew in float64, stored as float32",
    )
    widened = {
        key: value.float()
        if damaged[key].dtype != value.dtype or key.removeprefix("low_scale_model.") in schedule()
        else value
        for key, value in damaged.items()
    }
    require_repaired(widened, wanted, tmp_path / "y.safetensors", f"24 noise schedule buffers are rounded to {name}")


def test_a_schedule_stored_in_float64_is_stored_as_published(sound, tmp_path: Path) -> None:
    start, end = BETAS["sd1"]
    wide = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    require_repaired(
        {**sound, "betas": wide}, sound, tmp_path / "x.safetensors", "1 noise schedule buffers are stored as float64"
    )


def test_a_schedule_of_nobody_is_left_and_noted(sound, tmp_path: Path) -> None:
    path = save_safetensors(
        {**sound, "alphas_cumprod": (sound["alphas_cumprod"] * 0.9).half()}, tmp_path / "x.safetensors"
    )
    done = repair(path)
    assert done.path is None
    assert done.lines() == [
        "nothing is wrong that this version repairs",
        "1 noise schedule buffers are rounded to float16, of a schedule that no published model has: left as they are"
    ]  # fmt: skip


def test_schedules_are_those_of_diffusers() -> None:
    """Whose products are in float32: 1000 roundings of half a unit in the last place of numbers near 1, at most, on
    what is left of alphas_cumprod."""
    diffusers = pytest.importorskip("diffusers")
    for family, (start, end) in BETAS.items():
        theirs = diffusers.DDPMScheduler(beta_start=start, beta_end=end, beta_schedule="scaled_linear")
        assert FAMILIES[family].schedule.start == start
        assert torch.allclose(schedule(family)["alphas_cumprod"], theirs.alphas_cumprod, rtol=1000 * 2.0**-24, atol=0)
        assert math.isclose(schedule(family)["betas"][-1].item(), theirs.betas[-1].item(), rel_tol=2.0**-22)


def test_matrices_of_the_vaes_attention_become_convolutions(sound, tmp_path: Path) -> None:
    kernels = {
        key for key in sound if key.startswith("first_stage_model.") and ".attn_1." in key and sound[key].ndim == 4
    }
    assert len(kernels) == 8
    damaged = {key: value[:, :, 0, 0] if key in kernels else value for key, value in sound.items()}
    require_repaired(
        damaged,
        sound,
        tmp_path / "x.safetensors",
        "8 matrices [64, 64] of the VAE's attention: now 1x1 convolutions [64, 64, 1, 1]",
    )
    alone = {
        key.removeprefix("first_stage_model."): value
        for key, value in sound.items()
        if key.startswith("first_stage_model.")
    }
    bare = {key: value[:, :, 0, 0] if f"first_stage_model.{key}" in kernels else value for key, value in alone.items()}
    require_repaired(bare, alone, tmp_path / "y.safetensors", "8 matrices [64, 64]")


@pytest.mark.parametrize("extra", [b"x", b"\0" * 4096, b"PK\x03\x04 and so on"])
def test_stray_bytes_after_the_last_tensor_are_left_out(sound, extra: bytes, tmp_path: Path) -> None:
    path = save_safetensors(sound, tmp_path / "x.safetensors", {"format": "pt"})
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(
        FileError, match=f"has {len(extra)} extra bytes after the last tensor; run 'ldm repair x.safetensors'"
    ):
        open_file(path)
    done = repair(path)
    assert done.done == (f"{len(extra)} stray bytes after the last tensor: left out",)
    assert same(tensors(done.path), sound)
    with open_file(done.path) as file:
        assert file.metadata["format"] == "pt"


def test_all_at_once_and_the_file_loads(model, tmp_path: Path) -> None:
    state = {key.replace(".text_model.", "."): value for key, value in model.items() if "position_ids" not in key}
    state = {
        key: value.half()
        if key in schedule()
        else value[:, :, 0, 0].contiguous()
        if ".attn_1." in key and value.ndim == 4
        else value
        for key, value in state.items()
    }
    path = save_safetensors(state, tmp_path / "x.safetensors", {"ldm.config": to_json(TINY)})
    path.write_bytes(path.read_bytes() + b"tail")
    done = repair(path)
    assert len(done.done) == 5
    assert same(tensors(done.path), model)
    assert same(load(done.path).state_dict(), parameters(model))


def parameters(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the sound file under our names."""
    names = {"model.diffusion_model.": "unet.", "first_stage_model.": "vae.", PREFIX: "text.0."}
    return {
        ours + key.removeprefix(theirs): value
        for theirs, ours in names.items()
        for key, value in model.items()
        if key.startswith(theirs) and "position_ids" not in key
    }


# --- what is sound, containers, names -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1-full", "sd2-base", "sdxl-base", "vae-standalone"])
def test_a_published_file_has_nothing_wrong(name: str, tmp_path: Path) -> None:
    state = narrowed(name)
    path = save_safetensors({**state, **(schedule() if "betas" in state else {})}, tmp_path / "x.safetensors")
    done = repair(path)
    assert (done.path, done.done, done.notes) == (None, (), ())
    assert done.lines() == ["nothing is wrong that this version repairs"]
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("save", [save_zip, save_stream])
def test_torch_files_stay_torch_files(sound, save: Any, tmp_path: Path) -> None:
    damaged = {**sound, POSITION_IDS: torch.arange(77)[None].float()}
    with lightning(damaged) as contents:
        path = save(contents, tmp_path / "last.ckpt")
    done = repair(path)
    assert done.path == tmp_path / "last-repaired.ckpt"
    found = torch.load(done.path, weights_only=True)
    assert same(found["state_dict"], sound)
    assert found["global_step"] == "470000"
    assert same(tensors(repair(path, tmp_path / "x.safetensors").path), sound)


def test_a_wrong_extension_on_a_sound_file_is_only_reported(sound, tmp_path: Path) -> None:
    one, two = save_safetensors(sound, tmp_path / "a.ckpt"), save_zip(sound, tmp_path / "b.safetensors")
    assert repair(one).notes == (
        "is a .safetensors by its content, a torch file by its name: rename it to a.safetensors",
    )
    assert repair(two).notes == ("is a torch file by its content, a .safetensors by its name: rename it to b.ckpt",)
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_a_repaired_file_is_called_what_it_is(sound, tmp_path: Path) -> None:
    damaged = {**sound, POSITION_IDS: torch.arange(77)[None].float()}
    names = {save_safetensors(damaged, tmp_path / "a.ckpt"): "a-repaired.safetensors",
        save_zip(damaged, tmp_path / "b.safetensors"): "b-repaired.ckpt",
             save_zip(damaged, tmp_path / "c.v2.pt"): "c.v2-repaired.pt",
             save_safetensors(damaged, tmp_path / "d"): "d-repaired.safetensors"}  # fmt: skip
    for path, name in names.items():
        assert repair(path).path == tmp_path / name
        assert same(tensors(tmp_path / name), sound)


def test_a_file_may_take_the_place_of_the_damaged_one(sound, tmp_path: Path) -> None:
    path = save_safetensors({**sound, POSITION_IDS: torch.arange(77)[None].float()}, tmp_path / "x.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        repair(path, path)
    assert repair(path, path, dry_run=True).done
    assert repair(path, path, overwrite=True).path == path
    assert same(tensors(path), sound)
    assert [*tmp_path.iterdir()] == [path]


def test_what_cannot_be_repaired_is_refused_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data, message in (
        (b"", "is empty"),
        (b"<html>", "is a web page"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        ((99).to_bytes(8, "little") + b"{}", "is truncated"),
    ):
        path.write_bytes(data)
        with pytest.raises(FileError, match=message):
            repair(path)
    with pytest.raises(FileError, match="does not exist"):
        repair(tmp_path / "nowhere.ckpt")
    with pytest.raises(OutputError, match="does not exist; make it first"):
        repair(tmp_path / "nowhere.ckpt", tmp_path / "no" / "x.safetensors")


def test_a_file_that_changes_meanwhile_leaves_nothing(sound, tmp_path: Path) -> None:
    path = save_safetensors({**sound, POSITION_IDS: torch.arange(77)[None].float()}, tmp_path / "x.safetensors")

    def spoil(written: Any) -> None:
        with open(path, "r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")

    with pytest.raises(FileError, match="changed while it was being read"):
        repair(path, on_write=spoil)
    assert [*tmp_path.iterdir()] == [path]


# --- command line ---------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(sound, ldm, tmp_path: Path) -> None:
    path = save_safetensors({**sound, POSITION_IDS: torch.arange(77)[None].half()}, tmp_path / "x.safetensors")
    code, out, err = ldm(f"repair {path} --dry-run")
    assert (code, out, len(err)) == (0, [], 1)
    assert err[0].endswith("embeddings.position_ids is stored as float16: now 0 to 76 as int64")
    assert [*tmp_path.iterdir()] == [path]
    assert ldm(f"repair {path}")[:2] == (0, [f"{tmp_path}/x-repaired.safetensors"])
    code, out, err = ldm(f"repair {path}")
    assert (code, out) == (3, [])
    assert err[0].endswith("x-repaired.safetensors: exists already; choose another name or --overwrite")
    assert ldm(f"repair {path} --overwrite")[0] == 0
    assert ldm(f"repair {path} --out {tmp_path}/y.safetensors")[:2] == (0, [f"{tmp_path}/y.safetensors"])
    assert ldm(f"repair {tmp_path}/y.safetensors") == (0, [], ["ldm: nothing is wrong that this version repairs"])
    assert same(tensors(tmp_path / "y.safetensors"), sound)
