"""Which weights of a diffusers folder are taken where a component has them in several variants, and how to ask for
others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from ldm.errors import FileError
from tests.made.checkpoints import save_safetensors, save_zip
from weights.files.folders import VARIANTS, open_folder

NAMES = {variant: f".{variant}" if variant else "" for variant in VARIANTS}
VAE = -1.0


def folder(path: Path, variants: Iterable[str], kind: str = "safetensors") -> Path:
    """A folder whose UNet has these variants, each telling its place in VARIANTS; its VAE has one, without a name."""
    for name in ("unet", "vae"):
        (path / name).mkdir(parents=True, exist_ok=True)
    for variant in variants:
        save(path / "unet", variant, kind)
    save_safetensors({"w": torch.tensor([VAE])}, path / "vae" / "diffusion_pytorch_model.safetensors")
    return path


def save(path: Path, variant: str, kind: str, value: float | None = None) -> None:
    number = float(VARIANTS.index(variant)) if value is None else value
    (save_safetensors if kind == "safetensors" else save_zip)(
        {"w": torch.tensor([number])}, path / f"diffusion_pytorch_model{NAMES[variant]}.{kind}"
    )


def shards(path: Path, variant: str, *, old: bool) -> None:
    """The UNet's weights in two files with an index, whose name has the variant at either of two places."""
    mark = NAMES[variant]
    files = [f"diffusion_pytorch_model{mark}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_safetensors({"w": torch.tensor([float(VARIANTS.index(variant))])}, path / files[0])
    save_safetensors({"v": torch.ones(1)}, path / files[1])
    name = (
        f"diffusion_pytorch_model{mark}.safetensors.index.json"
        if old
        else f"diffusion_pytorch_model.safetensors.index{mark}.json"
    )
    (path / name).write_text(json.dumps({"weight_map": {"w": files[0], "v": files[1]}}))


def taken(path: Path, variant: str | None = None) -> str:
    """The variant of the UNet that is read."""
    with open_folder(path, variant) as found:
        assert found["vae/w"] == VAE
        return VARIANTS[int(found["unet/w"])]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_that_is_alone_is_taken(variant: str, kind: str, tmp_path: Path) -> None:
    assert taken(folder(tmp_path, [variant], kind)) == variant


@pytest.mark.parametrize("first", range(len(VARIANTS)))
def test_of_several_the_first_of_the_list_is_taken(first: int, tmp_path: Path) -> None:
    assert taken(folder(tmp_path, VARIANTS[first:])) == VARIANTS[first]


def test_safetensors_come_before_bin_but_raw_weights_after_both(tmp_path: Path) -> None:
    """The moving average and the raw weights are two different models; the kind of file makes no difference."""
    path = folder(tmp_path, ["", "non_ema"], "bin")
    save(path / "unet", "non_ema", "safetensors", 99)
    assert taken(path) == ""
    save(path / "unet", "bf16", "safetensors")
    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not opened")
    assert taken(path) == "bf16"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_that_is_asked_for_is_taken_and_components_without_it_give_what_they_have(
    variant: str, tmp_path: Path
) -> None:
    assert taken(folder(tmp_path, VARIANTS), variant) == variant


def test_the_raw_weights_are_those_called_non_ema(tmp_path: Path) -> None:
    path = folder(tmp_path, ["", "non_ema"])
    assert [taken(path), taken(path, "non_ema")] == ["", "non_ema"]


def test_a_variant_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, ["", "fp16"])
    with pytest.raises(FileError, match="has no bf16 weights in any component; use another variant, or none"):
        open_folder(path, "bf16")
    with pytest.raises(
        FileError, match="has no variant 'int4' that this version knows; use one of fp32, ema, fp16, bf16, non_ema"
    ):
        open_folder(path, "int4")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_shards_are_read(variant: str, old: bool, tmp_path: Path) -> None:
    path = folder(tmp_path, [])
    shards(path / "unet", variant, old=old)
    assert taken(path) == taken(path, variant) == variant
    with open_folder(path) as found:
        assert set(found) == {"unet/w", "unet/v", "vae/w"}


def test_variants_and_shards_may_be_links_into_a_cache(tmp_path: Path) -> None:
    path = folder(tmp_path / "snapshots" / "4f", ["fp16"])
    shards(path / "unet", "non_ema", old=False)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, file in enumerate([*path.glob("*/*")]):
        file.rename(blobs / str(i))
        file.symlink_to(Path("../../../blobs") / str(i))
    assert [taken(path), taken(path, "non_ema")] == ["fp16", "non_ema"]


def test_a_single_file_comes_before_shards_of_the_same_variant(tmp_path: Path) -> None:
    path = folder(tmp_path, ["fp16"])
    shards(path / "unet", "fp16", old=False)
    with open_folder(path) as found:
        assert set(found) == {"unet/w", "vae/w"}
