"""The "Training" section of a card."""

from __future__ import annotations

import pytest

from ldm.train.recipe import Card, Data, Method, Optimizer, Recipe, Run, Start
from ldm.train.watch.card import kg_co2, kwh, training_section


def test_co2_is_that_of_both_stable_diffusion_cards() -> None:
    assert kg_co2(150_000) == pytest.approx(11_250)  # Stable Diffusion v1 model card
    assert kg_co2(200_000) == pytest.approx(15_000)  # Stable Diffusion v2 model card
    assert kg_co2(1) == pytest.approx(0.075)


def test_energy_goes_with_power() -> None:
    assert kwh(1000, 130) == 130
    assert kg_co2(1000, 125) == kg_co2(1000, 250) / 2


def test_a_section_says_what_the_recipe_does_and_what_its_card_says() -> None:
    recipe = Recipe(
        "a", "One sentence.", model=Start(start="base.safetensors", widen=("mask", "masked_image")),
        data=Data(size=512), optimizer=Optimizer(lr=1e-4, warmup=10_000),
        run=Run(steps=440_000, batch=2048, micro=4, ema=0.9999, checkpointing=True),
        card=Card("them/it", "32 x 8 x A100", 256, 150_000, notes=("A note.",)),
    )  # fmt: skip
    assert training_section(recipe).splitlines() == [
        "## Training",
        "",
        "One sentence.",
        "",
        "- **Follows:** the card of them/it",
        "- **Start:** base.safetensors",
        "- **Method:** fine-tuning of UNet; conv_in widened by mask and masked_image",
        "- **Resolution:** 512 pixels",
        "- **Hardware:** 32 x 8 x A100",
        "- **Optimizer:** AdamW, betas 0.9 and 0.999, weight decay 0.01, epsilon 1e-08",
        "- **Learning rate:** warm-up to 0.0001 for 10,000 steps, then constant",
        "- **Batch:** 256 GPUs x 2 gradient accumulations x 4 = 2048",
        "- **Steps:** 440,000",
        "- **Precision:** float32, gradient checkpointing, averaged weights with decay 0.9999",
        "- **Energy and CO2:** 150,000 GPU-hours, 37,500 kWh at 250 W, 11,250 kg CO2 eq.",
        "- A note.",
    ]


def test_a_section_says_where_a_card_is_silent() -> None:
    text = training_section(Recipe("a", card=Card("them/it")))
    assert "**Hardware:** the card does not say\n" in text
    assert "**Energy and CO2:** the card gives no hours\n" in text


def test_a_section_of_a_recipe_that_follows_no_card_says_nothing_of_one() -> None:
    text = training_section(Recipe("a"))
    assert "card" not in text
    assert "**Start:** the model that ships\n" in text


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (Optimizer(lr=1e-5), "1e-05, constant"),
        (
            Optimizer(lr=1e-7, warmup=5, schedule="cosine-restarts", cycles=3),
            "warm-up to 1e-07 for 5 steps, then cosine with restarts, 3 cycles",
        ),
        (Optimizer(schedule="linear", decay=0.25), "1e-05, linear decay over the last 25%"),
        (Optimizer(lr_from="runs/before", schedule="cosine"), "the last of runs/before, cosine"),
    ],
)
def test_a_section_says_how_the_rate_goes(optimizer: Optimizer, words: str) -> None:
    assert f"**Learning rate:** {words}" in training_section(Recipe("a", optimizer=optimizer))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method("lora", text=True, rank=4), "LoRA of UNet and text towers, rank 4"),
        (Method("full", targets="attn2"), "fine-tuning of UNet, where names match `attn2`"),
        (Method("inversion", token="sks"), "textual inversion of sks"),
        (Method("distill", plan="half"), "distillation of a student pruned by plan half"),
        (Method("vae"), "vae"),
    ],
)
def test_a_section_says_what_learns(method: Method, words: str) -> None:
    assert f"- **Method:** {words}\n" in training_section(Recipe("a", method=method))


def test_a_batch_that_is_not_the_cards_any_more_is_said_without_its_gpus() -> None:
    assert "**Batch:** 12\n" in training_section(Recipe("a", run=Run(batch=12, micro=2), card=Card(gpus=8)))
