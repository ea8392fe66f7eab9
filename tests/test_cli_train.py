"""`ldm train`: from nothing to a checkpoint that `ldm txt2img` draws with."""

from pathlib import Path

import pytest
from PIL import Image

from ldm.__main__ import main


def test_both_stages_make_a_model_that_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae, out = str(tmp_path / "vae"), str(tmp_path / "blocks")
    few = ["--steps", "1", "--batch", "1", "--dtype", "float32"]
    assert main(["train", "vae", "--out", vae, *few]) == 0
    assert main(["train", "diffusion", "--vae", vae, "--out", out, "--scenes", "2", *few]) == 0
    assert "ldm: step 1 of 1, loss" in capsys.readouterr().err
    picture = tmp_path / "cube.png"
    model = str(Path(out) / "model.safetensors")
    assert main(["txt2img", "a red cube", "--ckpt", model, "--steps", "1", "--seed", "1", "--out", str(picture)]) == 0
    assert Image.open(picture).size == (128, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae"], "--out"),
        (["diffusion", "--out", "x"], "--vae"),
        (["vae", "--out", "x", "--steps", "0"], "--steps: 0; give 1 or more"),
        (["vae", "--out", "x", "--batch", "-1"], "--batch: -1; give 1 or more"),
        (["diffusion", "--vae", "v", "--out", "x", "--scenes", "0"], "--scenes: 0; give 1 or more"),
        (["vae", "--out", "x", "--lr", "nan"], "--lr: nan"),
        (["vae", "--out", "x", "--seed", "-1"], "--seed: -1; give 0"),
        (["vae", "--out", "x", "--dtype", "float16"], "--dtype"),
        (["unet", "--out", "x"], "unet"),
        (["diffusion", "--vae", "nowhere", "--out", "x"], "run 'ldm train vae' first"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
