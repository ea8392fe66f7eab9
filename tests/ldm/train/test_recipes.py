"""The recipes that ship: every number against the card that it is from, and a dry run of each on a tiny model of its
family."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.models.seeded import weight
from ldm.config import SDXL, VisionConfig
from ldm.model import LatentDiffusion
from ldm.networks.vision import CLIPVision
from ldm.train import run
from ldm.train.optim import factor
from ldm.train.reading import load_recipe, names, to_toml
from ldm.train.recipe import Recipe
from ldm.train.start import Files
from ldm.train.watch.card import training_section
from tests.made.families import build, tiny

CARDS = (
    "sygil",
    "sd15-inpainting",
    "sd2-depth",
    "image-variations",
    "image-variations-2",
    "ssd1b-distill",
    "ssd1b-lora",
    "ssd1b-dreambooth",
)


def rate(recipe: Recipe, number: int) -> float:
    """The learning rate of an update, counted from 1."""
    return recipe.optimizer.lr * factor(recipe.optimizer, recipe.run.steps, number - 1)


@pytest.mark.parametrize("name", names())
def test_a_recipe_that_ships_is_read_named_and_comes_back_from_its_own_toml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about.endswith(".")
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_the_cards_training_ships() -> None:
    assert set(CARDS) <= set(names())


@pytest.mark.parametrize(
    ("name", "gpus", "accumulated", "micro", "batch", "steps"),
    [
        ("sygil", 1, 400, 1, 400, 2_370_200),
        ("sd15-inpainting", 32 * 8, 2, 4, 2048, 440_000),
        ("sd2-depth", 32 * 8, 2, 4, 2048, 200_000),
        ("image-variations", 8, 4, 4, 128, 46_000),
        ("image-variations-2", 8, 5, 4, 160, 50_000),
        ("ssd1b-distill", 1, 4, 32, 128, 251_000),
        ("ssd1b-lora", 1, 1, 1, 1, 2 * 833),
        ("ssd1b-dreambooth", 1, 4, 1, 4, 500),
    ],
)
def test_batch_and_steps_are_the_cards(
    name: str, gpus: int, accumulated: int, micro: int, batch: int, steps: int
) -> None:
    recipe = load_recipe(name)
    assert gpus * accumulated * micro == batch
    assert (recipe.card.gpus or 1, recipe.run.micro, recipe.run.batch, recipe.run.steps) == (gpus, micro, batch, steps)
    assert f"x {accumulated} gradient accumulation" in training_section(recipe)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("sygil", {1: 1e-11, 5_000: 5e-8, 10_000: 1e-7, 10_001: 1e-7, 10_001 + 2_360_200 // 2: 5e-8, 2_370_200: 0}),
        ("sd15-inpainting", {1: 1e-8, 5_000: 5e-5, 10_000: 1e-4, 10_001: 1e-4, 440_000: 1e-4}),
        ("sd2-depth", {1: 1e-8, 5_000: 5e-5, 10_000: 1e-4, 200_000: 1e-4}),
        ("image-variations", {5_000: 5e-6, 10_000: 1e-5, 46_000: 1e-5}),
        ("image-variations-2", {2_500: 5e-6, 5_000: 1e-5, 50_000: 1e-5}),
        ("ssd1b-distill", {1: 1e-5, 251_000: 1e-5}),
        ("ssd1b-lora", {1: 1e-4, 1_666: 1e-4}),
        ("ssd1b-dreambooth", {1: 1e-5, 500: 1e-5}),
    ],
)
def test_the_learning_rate_goes_as_on_the_card(name: str, rates: dict[int, float]) -> None:
    recipe = load_recipe(name)
    assert {number: rate(recipe, number) for number in rates} == pytest.approx(rates, rel=1e-6, abs=1e-15)


def test_what_else_the_cards_say_is_in_the_recipes() -> None:
    sygil, inpainting, depth, variations, second, distil, lora, booth = (load_recipe(name) for name in CARDS)
    for recipe in (sygil, inpainting, depth, variations, second):
        assert recipe.data.size == 512
    for recipe in (distil, lora, booth):
        assert (recipe.data.size, recipe.run.dtype) == (1024, "float16")
    o = sygil.optimizer
    assert (o.kind, o.betas, o.weight_decay, o.eps, sygil.run.checkpointing, sygil.method.text) == (
        "adamw",
        (0.9, 0.999),
        0.01,
        1e-8,
        True,
        True,
    )
    assert (inpainting.model.widen, inpainting.objective.caption_dropout, inpainting.objective.whole_hole) == (
        ("mask", "masked_image"),
        0.1,
        0.25,
    )
    assert depth.model.widen == ("depth",)
    assert (variations.method.targets, second.method.targets, second.model.family) == (
        r"\.attn2\.",
        "",
        "sd-image-variations",
    )
    assert variations.model.vision
    assert (distil.method.plan, len(distil.method.teachers)) == ("ssd-1b", 3)
    assert (lora.run.seed, lora.data.flip, lora.watch.prompts, lora.data.crop) == (
        42,
        True,
        ("cute dragon creature",),
        "random",
    )
    assert (booth.run.seed, booth.data.caption, booth.watch.prompts) == (
        0,
        "a photo of sks dog",
        ("A photo of sks dog in a bucket",),
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sygil", "857 GPU-hours, 111 kWh at 130 W, 33 kg CO2 eq."),  # an estimate: the card gives the hours alone
        ("sd15-inpainting", "150,000 GPU-hours, 37,500 kWh at 250 W, 11,250 kg CO2 eq."),  # card: 11250 kg CO2 eq.
        ("sd2-depth", "200,000 GPU-hours, 50,000 kWh at 250 W, 15,000 kg CO2 eq."),  # card: 15000 kg CO2 eq.
        ("image-variations", "the card gives no hours"),
        ("ssd1b-distill", "the card gives no hours"),
    ],
)
def test_the_training_section_says_energy_and_co2(name: str, said: str) -> None:
    assert f"- **Energy and CO2:** {said}\n" in training_section(load_recipe(name))


# --- dry runs -------------------------------------------------------------------------------------------------------


@cache
def start_of(family: str) -> LatentDiffusion:
    """A tiny seeded model of a family; of SDXL with all its blocks, for a plan says which of them stay."""
    config = tiny(family)
    if family == "sdxl-base":
        config = replace(
            config,
            unet=replace(
                SDXL,
                model_channels=32,
                context_dim=config.unet.context_dim,
                head_dim=16,
                vector_dim=config.unet.vector_dim,
            ),
        )
    return build(config)


def vision_for(width: int) -> CLIPVision:
    """A tiny seeded vision tower whose embeddings are as wide as the text was."""
    tower = CLIPVision(VisionConfig(image=28, patch=7, width=64, layers=2, heads=4, mlp=128, projection=width))
    tower.load_state_dict({name: weight(f"vision.{name}", value.shape) for name, value in tower.state_dict().items()})
    return tower.eval().requires_grad_(False)


def pictures(directory: Path) -> Path:
    """Four pictures of 32x32 pixels with captions and depth."""
    (directory / "depth").mkdir(parents=True)
    for i in range(4):
        Image.effect_noise((32, 32), 40 + i).convert("RGB").save(directory / f"{i}.png")
        Image.linear_gradient("L").resize((32, 32)).save(directory / "depth" / f"{i}.png")
        (directory / f"{i}.txt").write_text(f"picture {i}")
    return directory


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_dry_runs_on_a_tiny_model_of_its_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, saved = load_recipe(name).model.family, {}

    models = chain([deepcopy(start_of(family))], repeat(start_of(family)))  # what learns, then teachers

    def save(model: LatentDiffusion, path: Path, **keywords: object) -> Path:
        saved.update({key: value.clone() for key, value in model.state_dict().items()})
        return path

    def save_lora(changes: object, path: Path, *arguments: object, **keywords: object) -> Path:
        saved[path.name] = changes
        return path

    files = Files(
        load=lambda path: next(models), load_vae=lambda path, config: deepcopy(start_of(family).vae),
        load_vision=lambda path: vision_for(tiny(family).unet.context_dim), save=save,
        convert=save, save_lora=save_lora, save_embedding=save_lora, embedded=lambda: tmp_path, digest=str,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    start = load_recipe(name)
    for path in filter(None, (start.model.start, start.model.vae, start.model.vision, *start.method.teachers)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    sets = [
        f"run.out={tmp_path / 'out'}", "run.steps=1", "run.batch=2", "run.micro=1",
        f"data.path={pictures(tmp_path / 'data')}", "data.size=32", "run.dtype=float32", "watch.steps=1",
        "optimizer.warmup=0",
    ]  # fmt: skip
    ended = run.train(load_recipe(name, sets), files, device="cpu")
    assert ended.fitted.step == 1
    assert not ended.fitted.skipped
    assert {"log.jsonl", "recipe.toml"} <= {path.name for path in (tmp_path / "out").iterdir()}
    kind = load_recipe(name).method.kind
    if kind == "lora":
        assert {"lora.safetensors", "lora-diffusers.safetensors"} <= saved.keys()
    else:
        assert changed(start_of(family).state_dict(), saved) == {"image-variations": {"attn2"}}.get(
            name, {"unet", "attn2"}
        )


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Kinds of parameters that are others than they were, where there still are such of that shape."""
    return {
        "attn2" if ".attn2." in key else key.split(".")[0]
        for key, value in after.items()
        if key in before and value.shape == before[key].shape and not torch.equal(value, before[key])
    }
