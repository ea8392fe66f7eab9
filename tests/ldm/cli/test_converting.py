"""`ldm convert`: what can be typed, what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldm.__main__ import main
from tests.made.checkpoints import TINY, checkpoint, save_zip
from weights import convert, load, open_file


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model that says its own sizes, with raw weights and their average."""
    monkeypatch.chdir(tmp_path)
    save_zip({"state_dict": checkpoint(ema="full"), "global_step": 470_000}, Path("raw.ckpt"))
    convert("raw.ckpt", "full.ckpt", config=TINY)
    Path("raw.ckpt").unlink()
    return "full.ckpt"


def test_there_and_back(source: str, capsys: pytest.CaptureFixture) -> None:
    assert (
        main(
            [
                "convert",
                source,
                "half/",
                "--ema",
                "--dtype",
                "fp16",
                "--shard-size",
                "1.1MB",
                "--manifest",
                "m.json",
                "--licence",
                "MIT",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("half: ")
    assert lines[0].endswith(" MB")
    assert "tensors of a model of family sd1" in lines[0]
    assert (
        lines[1]
        == "  13 of them in original_only.safetensors: the folder's networks have no place for them, the way back "
        "needs them"
    )
    assert "left out: the moving average was asked for in place of these" in out
    assert set(json.loads(Path("m.json").read_text())) == {
        "source",
        "target",
        "facts",
        "tensors",
        "synthesised",
        "dropped",
    }
    assert len(list(Path("half/unet").glob("*.safetensors"))) > 1
    assert main(["convert", "half", "back.ckpt"]) == 0
    with open_file("back.ckpt") as file:
        assert file["model.diffusion_model.out.2.bias"].equal(load(source, ema=True).unet.out[2].bias.half())
        assert file["alphas_cumprod"].dtype == torch.float32
    capsys.readouterr()


def test_every_option_reaches_its_argument(source: str, capsys: pytest.CaptureFixture) -> None:
    assert (
        main(
            ["convert", source, "raw.safetensors", "--raw", "--prune", "--dtype", "bf16", "--drop", r"model_ema\.decay"]
        )
        == 0
    )
    with open_file("raw.safetensors") as file:
        assert not [key for key in file if key.startswith("model_ema")]
        assert {spec.dtype for key, spec in file.specs.items() if "position_ids" not in key} == {torch.bfloat16}
    assert main(["convert", source, "vae.safetensors", "--only", "vae"]) == 0
    with open_file("vae.safetensors") as file:
        assert "decoder.conv_out.weight" in file
    assert main(["convert", source, "v.safetensors", "--raw", "--prediction", "v", "--prune"]) == 0
    assert load("v.safetensors").config.prediction == "v"
    assert main(["convert", source, "v.safetensors", "--raw", "--overwrite"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["full.ckpt", "b"], 2, "say --ema or --raw"),
        (["full.ckpt", "b", "--ema", "--raw"], 2, "not allowed with argument"),
        (["full.ckpt", "b.safetensors", "--dtype", "fp8"], 2, "'fp8' is unknown; use fp32, fp16 or bf16"),
        (["full.ckpt", "b.safetensors", "--shard-size", "1GB"], 2, "a single file has no shards"),
        (["full.ckpt", "b", "--shard-size", "many"], 2, "'many' is no size; write 2GB or 500MB"),
        (["full.ckpt", "full.ckpt"], 3, "exists already; choose another name or --overwrite"),
        (["full.ckpt", ".", "--overwrite"], 2, "dst: SRC lies in it, or it in SRC; name a new folder"),
        (["full.ckpt", "b.safetensors", "--manifest", "b.safetensors"], 2, "manifest: is SRC or DST"),
        (["fulll.ckpt", "b.safetensors"], 2, "does not exist; near it: full.ckpt"),
        (["full.ckpt", "b.safetensors", "--config", "sd9"], 2, "is no family"),
        (["full.ckpt", "no/b.safetensors"], 3, "does not exist; make it first"),
    ],
)
def test_a_wrong_command_is_one_line(
    argv: list[str], code: int, text: str, source: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ldm: error: ")
    assert err.count("\n") == 1
    assert text in err
    assert {path.name for path in Path().iterdir()} == {"full.ckpt"}


def test_a_file_can_take_its_own_place(source: str, capsys: pytest.CaptureFixture) -> None:
    before = Path(source).read_bytes()
    assert main(["convert", source, source, "--overwrite", "--raw"]) == 0
    assert Path(source).read_bytes() != before
    with open_file(source) as file:
        assert not [key for key in file if key.startswith("model_ema.diff")]
    capsys.readouterr()
