"""What a file is, from its shapes alone."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.models.published import FILES, UNIT, manifest, narrow, narrowed, tiny
from ldm.config import FAMILIES
from ldm.errors import AmbiguousCheckpoint, FileError
from tests.made.checkpoints import save_safetensors
from weights import load
from weights.names.detect import detect
from weights.names.family import REFUSED, family
from weights.names.sizes import read_unet

MODELS = [name for name, recognised in FILES.items() if recognised]
P = "model.diffusion_model."


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in manifest(name).items()}


def recognised(shapes: dict[str, tuple[int, ...]]) -> str:
    return family(read_unet(shapes), "cond_stage_model.model.visual.proj" in shapes, shapes)


# -- the family --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", MODELS)
def test_a_published_file_is_recognised_from_its_shapes_in_well_under_a_second(file: str) -> None:
    shapes = shapes_of(file)
    start = time.process_time()
    assert detect(shapes, {}, None, "x") == FAMILIES[FILES[file]]
    assert time.process_time() - start < 0.5
    for config in (FILES[file], FAMILIES[FILES[file]]):
        assert detect(shapes, {}, config, "x") == FAMILIES[FILES[file]]


@pytest.mark.parametrize("file", MODELS)
def test_structure_is_recognised_at_any_width(file: str) -> None:
    shapes = {key: narrow(key, shape, UNIT.get(FILES[file], 10)) for key, shape in shapes_of(file).items()}
    assert recognised(shapes) == FILES[file]
    with pytest.raises(AmbiguousCheckpoint, match=r"of its own sizes \(UNet, .+pass config="):
        detect(shapes, {}, None, "x")
    assert detect(shapes, {}, tiny(FILES[file]), "x") == tiny(FILES[file])


def without(name: str, *parts: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes_of(name).items() if not any(part in key for part in parts)}


eight = {f"{P}input_blocks.0.0.weight": (320, 8, 3, 3)}
REFUSALS = {
    "ip2p": shapes_of("sd1") | eight,
    "ip2p of SDXL": shapes_of("sdxl-base") | eight,
    "zero123": shapes_of("sd-image-variations")
    | eight
    | {"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)},
    "unclip": shapes_of("sd21-unclip-h"),
    "vega": without(
        "sdxl-base",
        *(f"input_blocks.{i}.1.transformer_blocks.1." for i in (4, 5)),
        *(f"input_blocks.{i}.1.transformer_blocks.{k}." for i in (7, 8) for k in range(2, 10)),
    ),
    "koala": without(
        "sdxl-base", *(f"input_blocks.{i}.1.transformer_blocks.{k}." for i in (7, 8) for k in range(5, 10))
    ),
    "unknown": shapes_of("sd2-base") | {f"{P}input_blocks.0.0.weight": (320, 6, 3, 3)},
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_family_that_is_not_supported_is_refused_by_name(what: str) -> None:
    for config in (None,) if what == "unknown" else (None, "sd1"):
        with pytest.raises(FileError) as caught:
            detect(REFUSALS[what], {}, config, "x")
        assert f"is {REFUSED[what.split()[0]]}" in str(caught.value)
        assert type(caught.value) is FileError


def test_of_a_damaged_file_the_family_asked_for_says_what_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "sd1", tiny("sd1"))
    state = {key: value for key, value in narrowed("sd1").items() if not key.startswith(f"{P}input_blocks.1.0.")}
    path = save_safetensors(state, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"of an unknown family, .*pass config= if it is a damaged file"):
        load(path)
    with pytest.raises(FileError, match="10 missing"):
        load(path, "sd1")


def test_a_config_of_another_family_is_refused() -> None:
    assert all(family.title for family in FAMILIES.values())
    for file, config, message in (
        ("sd1", "sdxl-base", "is an SD 1 model and config is 'sdxl-base'"),
        ("sdxl-refiner", "sd2-v", "is an SDXL refiner and config is 'sd2-v'"),
    ):
        with pytest.raises(FileError, match=message):
            detect(shapes_of(file), {}, config, "x")
    assert detect(shapes_of("sd2-base"), {}, "sd2-v", "x") == FAMILIES["sd2-v"]


# -- damage that is seen in the wild -----------------------------------------------------------------------------------
TOWER = "cond_stage_model.model."
MISSING = {
    "block 23": (f"{TOWER}transformer.resblocks.23.",),
    "its projection": (f"{TOWER}text_projection",),
    "logit_scale": (f"{TOWER}logit_scale",),
    "all three": (f"{TOWER}transformer.resblocks.23.", f"{TOWER}text_projection", f"{TOWER}logit_scale"),
}


@pytest.mark.parametrize("what", MISSING)
@pytest.mark.parametrize("by", ["config", "family"])
def test_sd2_needs_none_of_what_it_does_not_read(what: str, by: str, tmp_path, monkeypatch) -> None:
    config = tiny("sd2-base")
    monkeypatch.setitem(FAMILIES, "sd2-base", config)
    state = {key: value for key, value in narrowed("sd2-base").items() if not key.startswith(MISSING[what])}
    model = load(save_safetensors(state, tmp_path / "x.safetensors"), config if by == "config" else "sd2-base")
    (tower,) = model.config.text
    assert (tower.layers, tower.skip) == ((23, 0) if what in ("block 23", "all three") else (24, 1))
    assert (tower.projection is None) == (what in ("its projection", "all three"))
    whole = load(save_safetensors(narrowed("sd2-base"), tmp_path / "y.safetensors"), config)
    ids = torch.tensor([[5, 7, 9]])
    with torch.no_grad():  # the conditioning is the same
        assert model.text[0](ids, tower.skip, tower.norm)[0].equal(whole.text[0](ids, 1, True)[0])


def test_what_is_read_is_required(tmp_path) -> None:
    for file, part in (
        ("sd2-base", f"{TOWER}transformer.resblocks.22."),
        ("sdxl-base", "conditioner.embedders.1.model.transformer.resblocks.31."),
        ("sdxl-refiner", "conditioner.embedders.0.model.text_projection"),
    ):
        state = {key: value for key, value in narrowed(file).items() if not key.startswith(part)}
        with pytest.raises(FileError, match=r"\d+ missing"):
            load(save_safetensors(state, tmp_path / "x.safetensors"), tiny(FILES[file]))


SPELLINGS = ["conditioner.embedders.1.model.text_model.embeddings.position_ids",
    "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
             "text_model.encoder.text_model.embeddings.position_ids",
             "conditioner.embedders.0.transformer.text_projection.weight", "conditioner.embedders.1.model.logit_scale",
             "denoiser.sigmas", "model.diffusion_model.time_embedding.cond_proj.weight"]  # fmt: skip


def test_strays_of_merges_are_ignored_and_the_projection_has_three_spellings(tmp_path) -> None:
    state = narrowed("ssd-1b") | {key: torch.zeros(4) for key in SPELLINGS}
    reference = (
        load(save_safetensors(narrowed("ssd-1b"), tmp_path / "x.safetensors"), tiny("ssd-1b"))
        .text[1]
        .text_projection.weight
    )
    prefix = "conditioner.embedders.1.model.text_projection"
    matrix = state.pop(prefix)
    assert reference.equal(matrix.T.float())
    for spelling, value in ((prefix, matrix), (f"{prefix}.weight", matrix.T), (f"{prefix}.weight.weight", matrix.T)):
        path = save_safetensors(state | {spelling: value.contiguous()}, tmp_path / "y.safetensors")
        assert load(path, tiny("ssd-1b")).text[1].text_projection.weight.equal(reference)
    with pytest.raises(FileError, match=r"text_projection twice, also as .+text_projection.weight"):
        load(
            save_safetensors(state | {prefix: matrix, f"{prefix}.weight": matrix.clone()}, tmp_path / "z.safetensors"),
            tiny("ssd-1b"),
        )
