"""The model that ships: that it is there, that its autoencoder is good, and that it draws what the README shows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import weights
from benchmarks.quality import SHOWCASE, right
from ldm import blocks
from ldm.__main__ import main
from ldm.blocks import Scene, Solid
from ldm.images import from_pil, to_pil
from ldm.model import LatentDiffusion
from ldm.pictures.read import open_image, read_metadata
from ldm.train.shipped import BLOCKS
from weights.models import embedded
from weights.names.diffusers import diffusers_unet

UNSEEN = 2**31  # scenes from this seed on are in no training


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return weights.load()


def test_the_file_is_small_and_in_half_precision() -> None:
    assert embedded().stat().st_size <= 32_000_000
    with weights.open_file(embedded()) as file:
        assert {spec.dtype for spec in file.specs.values()} == {torch.float16}
        assert json.loads(file.metadata["ldm.config"])["name"] == "blocks"


def test_the_sizes_are_those_of_the_recipe(model: LatentDiffusion) -> None:
    assert (model.config.unet, model.config.text, model.config.size) == (BLOCKS.unet, BLOCKS.text, BLOCKS.size)


@torch.no_grad()
def test_the_autoencoder_restores_unseen_scenes_to_28_decibels(model: LatentDiffusion) -> None:
    pictures = torch.from_numpy(blocks.batch(range(UNSEEN, UNSEEN + 8))[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    restored = model.vae.decode(model.vae.encode(pictures)).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (restored - pictures).square().mean(dim=(1, 2, 3)))
    assert psnr.mean() >= 28


@torch.no_grad()
def test_latents_have_about_unit_variance(model: LatentDiffusion) -> None:
    pictures = torch.from_numpy(blocks.batch(range(UNSEEN, UNSEEN + 8))[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert model.vae.encode(pictures).std() == pytest.approx(1, abs=0.2)


def test_training_never_showed_the_showcase() -> None:
    assert blocks.held_out(SHOWCASE)


def test_the_first_command_of_the_readme_mostly_draws_what_it_says(tmp_path: Path) -> None:
    """Of 16 pictures 12 are right (benchmarks/quality.py has more figures); at least half of the first 6 must be."""
    assert (
        main(["txt2img", blocks.canonical(SHOWCASE), "--seed", "0", "--n", "6", "--batch", "6", "--out", str(tmp_path)])
        == 0
    )
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 6
    assert sum(right(np.asarray(open_image(picture)), SHOWCASE)["all"] for picture in pictures) >= 3
    assert read_metadata(pictures[0])["prompt"] == "a red cube on top of a blue sphere"


@torch.no_grad()
def test_a_true_picture_survives_the_autoencoder(model: LatentDiffusion) -> None:
    image = from_pil(to_pil(torch.from_numpy(blocks.render(SHOWCASE)).permute(2, 0, 1)[None].float() / 127.5 - 1))
    (picture,) = to_pil(model.vae.decode(model.vae.encode(image)))
    assert right(np.asarray(picture), SHOWCASE)["all"]


# --- a LoRA whose effect can be seen ----------------------------------------------------------------------------------


@torch.no_grad()
def recolouring(model: LatentDiffusion, old: str, new: str, rank: int = 16) -> dict[str, torch.Tensor]:
    """A LoRA file that makes the UNet hear one colour as another, found in closed form (Gandikota et al. 2024, Unified
    Concept Editing, eq. 7).

    Every matrix W that reads the text becomes the one with W' c = W c* for captions c with the old colour, c* with the
    new one, and W' c = W c for others."""

    def tokens(captions: list[str]) -> torch.Tensor:
        return model.condition(captions, (128, 128)).context.flatten(0, 1).double()

    others = [color for color in blocks.COLORS if color not in (old, new)]
    said = [f"a {old} {shape}" for shape in blocks.SHAPES]
    said += [
        f"a {old} {a} {relation} a {color} {b}"
        for a in blocks.SHAPES
        for b in blocks.SHAPES
        for relation in blocks.RELATIONS
        for color in others[:2]
    ]
    kept = [
        f"a {a} {shape} {relation} a {b} cube"
        for shape in blocks.SHAPES
        for relation in blocks.RELATIONS
        for a, b in zip([new, *others], [*others, new], strict=True)
    ]
    c, wanted, same = tokens(said), tokens([caption.replace(old, new) for caption in said]), tokens(kept)
    edit = (wanted - c).T @ c @ torch.linalg.inv(c.T @ c + same.T @ same + 0.1 * torch.eye(c.shape[1], dtype=c.dtype))
    theirs, lora = diffusers_unet(model.config.unet), {}
    for name, weight in model.unet.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            u, s, v = torch.linalg.svd(weight.double() @ edit, full_matrices=False)
            module = "lora_unet_" + theirs[name].removesuffix(".weight").replace(".", "_")
            lora[f"{module}.lora_up.weight"] = (u * s)[:, :rank].float().contiguous()
            lora[f"{module}.lora_down.weight"] = v[:rank].float().contiguous()
    return lora


def test_a_lora_that_hears_red_as_blue_draws_blue_instead(
    model: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, out = tmp_path / "blue.safetensors", tmp_path / "cube.png"
    save_file(recolouring(model, "red", "blue"), lora)
    for scale, color in (("1", "blue"), ("0", "red")):
        assert (
            main(
                ["txt2img", "a red cube", "--seed", "1", "--lora", f"{lora}:{scale}", "--out", str(out), "--overwrite"]
            )
            == 0
        )
        assert right(np.asarray(open_image(out)), Scene((Solid("cube", color),)))["all"], (scale, color)
    assert "modules" in capsys.readouterr().err
