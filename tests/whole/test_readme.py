"""What the README shows of files of weights and of training is what happens."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm import blocks
from ldm.__main__ import main
from ldm.train.reading import load_recipe, names
from tests.made.checkpoints import TINY, Call, Name, checkpoint, ckpt_of, safetensors_of, save_zip, tensor
from weights import convert, open_file

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Files of weights\n(.+?)^## ", README, re.MULTILINE | re.DOTALL)[1]
SCRIPTS = re.findall(r"```python\n(.+?)```", SECTION, re.DOTALL)
REFUSALS = re.findall(r"^\$ (ldm .+)\n(ldm: error: .+)$", SECTION, re.MULTILINE)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


CONFIG = replace(TINY, text=(replace(TINY.text[0], vocab=49408),))


def model(path: str, change: float = 0.0, **options) -> None:
    """A tiny model that says its own sizes; `change` moves the attention of its UNet by matrices of rank 2."""
    state = checkpoint(CONFIG, **options)
    for key, value in state.items():
        if change and ".attn" in key and key.startswith("model.diffusion_model.") and value.ndim == 2:
            torch.manual_seed(0)
            state[key] = value + change * torch.randn(len(value), 2) @ torch.randn(2, value.shape[1])
    save_zip({"state_dict": state}, Path("raw.ckpt"))
    convert("raw.ckpt", path, config=CONFIG)
    Path("raw.ckpt").unlink()


def test_there_are_three_scripts_and_five_refusals() -> None:
    assert (len(SCRIPTS), len(REFUSALS)) == (3, 5)


def test_the_first_script_converts_a_directory(capsys: pytest.CaptureFixture) -> None:
    Path("models").mkdir()
    model("models/full.ckpt", ema="full")
    model("models/plain.ckpt")
    save_zip(
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(4, 8)}, Path("models/style.ckpt")
    )
    exec(SCRIPTS[0], {})
    assert sorted(path.name for path in Path("models").iterdir()) == [
        "full.ckpt",
        "full.json",
        "full.safetensors",
        "plain.ckpt",
        "plain.json",
        "plain.safetensors",
        "style.ckpt",
    ]
    with open_file("models/full.safetensors") as file, open_file("models/full.ckpt") as source:
        assert file["model.diffusion_model.out.2.weight"].equal(source["model_ema.diffusion_modelout2weight"].half())
        assert "alphas_cumprod" not in file
    assert "style.ckpt" in capsys.readouterr().out


def test_the_second_script_extracts_what_was_learned(capsys: pytest.CaptureFixture) -> None:
    model("base.safetensors")
    model("tuned.safetensors", change=0.02)
    exec(SCRIPTS[1], {})
    with open_file("learned.safetensors") as file:
        assert {file.shape(key)[0] for key in file if key.endswith("lora_down.weight")} <= {1, 2}
    assert "a LoRA of rank about 2" in capsys.readouterr().out


def test_the_third_script_draws_the_way() -> None:
    model("base.safetensors")
    model("tuned.safetensors", change=0.02)
    exec(
        SCRIPTS[2]
        .replace('["a lighthouse in a storm"]', '["x"]')
        .replace("seeds=[7]", "seeds=[7], steps=1, width=64, height=64"),
        {},
    )
    pictures = [Path(f"mix-{percent}.png").read_bytes() for percent in (0, 25, 50, 75, 100)]
    assert len(set(pictures)) == 5


@pytest.mark.parametrize(("command", "line"), REFUSALS, ids=[line.split(":")[2].strip() for _, line in REFUSALS])
def test_a_refusal_is_what_is_shown(command: str, line: str, capsys: pytest.CaptureFixture) -> None:
    whole = safetensors_of({"w": {"dtype": "F32", "shape": [300], "data_offsets": [0, 1200]}}, bytes(1200))
    Path("v1-5-pruned-emaonly.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:6ce0\nsize 4265146304\n"
    )
    Path("merged.ckpt").write_bytes(ckpt_of({"w": tensor(), "x": Call(Name("os", "system"), "touch canary")}))
    Path("model.safetensors").write_bytes(whole[:-500])
    Path("mix.safetensors").write_bytes(whole + b"\0")
    assert main(command.split()[1:]) == 2
    assert capsys.readouterr().err == f"{line}\n"
    assert not Path("canary").exists()


TRAINING = re.search(r"^## Training\n(.+?)^## ", README, re.MULTILINE | re.DOTALL)[1]
RECIPE = re.search(r"```toml\n# (lora\.toml)\n(.+?)```", TRAINING, re.DOTALL)


def test_the_recipe_trains_a_lora_of_the_model_that_ships(capsys: pytest.CaptureFixture) -> None:
    Path(RECIPE[1]).write_text(RECIPE[2])
    Path("photos").mkdir()
    images, captions = blocks.batch(range(3))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        Image.fromarray(image).save(f"photos/{i}.png")
        Path(f"photos/{i}.txt").write_text(caption)
    assert (
        main(
            [
                "train",
                RECIPE[1],
                "--set",
                "run.steps=1",
                "--set",
                "run.batch=1",
                "--set",
                "run.micro=1",
                "--set",
                "watch.steps=1",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        f"runs/lora/{name}" for name in ("lora.safetensors", "lora-diffusers.safetensors", "report.png", "report.html")
    ]


def test_every_recipe_that_is_named_exists_with_the_numbers_shown() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| ([\d,]+) \| ([\d,]+) \| (\S+), (\S+) \|$", TRAINING, re.MULTILINE)
    assert {name for name, *_ in rows} == {name for name in names() if not name.startswith("blocks")}
    for name, about, batch, steps, rate, schedule in rows:
        recipe = load_recipe(name)
        assert (about, batch, steps) == (recipe.about.rstrip("."), f"{recipe.run.batch:,}", f"{recipe.run.steps:,}")
        assert (float(rate), schedule) == (recipe.optimizer.lr, recipe.optimizer.schedule)
    for name in re.findall(r"ldm train ([\w-]+)(?![\w.-])", README):
        assert name in names()
