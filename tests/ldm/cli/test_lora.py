"""`ldm lora`: each action on tiny files, what it prints, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.models.seeded import normal
from ldm.__main__ import main
from ldm.cli.lora import scaled_lora
from tests.made.checkpoints import TINY, save_safetensors
from tests.made.loras import CONV, FC, HADA, KEYS, Q, adding, published, saved, some_lora
from weights.adapters.read import load_lora, read_lora

N = "unet.input_blocks.1.1.norm.weight"


def test_extract_writes_a_lora_and_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = saved(tmp_path / "a.safetensors")
    change = {
        Q: normal("u", (32, 3)) @ normal("d", (3, 32)),
        FC: normal("f", (256, 64)),
        CONV: normal("c", (32, 32, 3, 3)),
        N: torch.ones(32),
    }
    tuned = saved(tmp_path / "b.safetensors", change=adding(change))
    command = ["lora", "extract", str(base), str(tuned), "--dtype", "fp32"]
    assert main([*command, "--out", str(tmp_path / "c.safetensors"), "--rank", "3", "--list"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["3", "100.000", "%", Q.removesuffix(".weight")]
    assert out[1].split()[0] == "3"
    assert out[2].startswith("2 modules of sd1, rank 3, ")
    assert out[3] == f"2 parameters (36.99 kB) not in the LoRA, which cannot carry them: {CONV}, {N}"
    assert out[4] == str(tmp_path / "c.safetensors")
    assert set(load_lora(tmp_path / "c.safetensors", TINY)) == {Q, FC}

    assert (
        main(
            [
                *command,
                "--out",
                str(tmp_path / "d.safetensors"),
                "--variance",
                "0.999",
                "--max-rank",
                "40",
                "--conv-rank",
                "5",
                "--full-rest",
                "--no-text",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "2 modules of sd1, rank 3 to 5, " in out
    assert "1 parameters (128 bytes) kept as full differences: " + N in out
    assert set(load_lora(tmp_path / "d.safetensors", TINY)) == {Q, CONV, N}


def test_merge_takes_scales_for_all_or_for_each_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, lora = saved(tmp_path / "a.safetensors"), some_lora(tmp_path / "l.safetensors")
    out = tmp_path / "b.safetensors"
    assert (
        main(["lora", "merge", str(base), f"{lora}:0.5", f"{lora}:-0.5:2", "--out", str(out), "--dtype", "fp16"]) == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "l.safetensors at 0.5: 3 of 3 modules",
        "l.safetensors at -0.5 (UNet) and 2 (text): 3 of 3 modules",
        str(out),
    ]
    before, after = load_file(base), load_file(out)
    changed = {key for key, tensor in before.items() if not torch.equal(tensor.half(), after[key])}
    assert changed == {
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    }  # the UNet's two scales come to 0
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}


def test_merge_says_that_the_moving_average_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = saved(tmp_path / "a.safetensors")
    average = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": value.clone()
        for key, value in load_file(base).items()
        if key.startswith("model.")
    }
    from weights import open_file

    with open_file(base) as file:
        both = save_safetensors(load_file(base) | average, tmp_path / "b.safetensors", file.metadata)
    assert (
        main(
            [
                "lora",
                "merge",
                str(both),
                str(some_lora(tmp_path / "l.safetensors")),
                "--out",
                str(tmp_path / "c.safetensors"),
            ]
        )
        == 0
    )
    assert f"{len(average)} tensors left out: moving average of the weights before the LoRA" in capsys.readouterr().out


def test_resize_says_what_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora, ckpt = some_lora(tmp_path / "l.safetensors"), str(saved(tmp_path / "a.safetensors"))
    assert (
        main(
            [
                "lora",
                "resize",
                str(lora),
                "--ckpt",
                ckpt,
                "--rank",
                "2",
                "--to",
                "diffusers",
                "--dtype",
                "bf16",
                "--out",
                str(tmp_path / "b.safetensors"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("3 modules of sd1, rank 2, ")
    assert out[0].endswith("%)")
    assert out[1] == str(tmp_path / "b.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
    assert (
        main(
            [
                "lora",
                "resize",
                str(lora),
                "--ckpt",
                ckpt,
                "--variance",
                "0.6",
                "--list",
                "--out",
                str(lora),
                "--overwrite",
            ]
        )
        == 0
    )
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[:3]} == {
        name.removesuffix(".weight") for name in KEYS
    }


def test_convert_writes_for_other_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora = save_safetensors(
        {key: value for key, value in published("sd1").items() if "attn2" in key}, tmp_path / "l.safetensors"
    )
    assert main(["lora", "convert", str(lora), "--to", "peft", "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines() == ["64 modules of sd1, as peft has them", str(tmp_path / "b")]
    assert (
        main(
            [
                "lora",
                "convert",
                str(tmp_path / "b"),
                "--to",
                "kohya",
                "--family",
                "sd1-inpainting",
                "--out",
                str(tmp_path / "c.safetensors"),
                "--dtype",
                "fp32",
            ]
        )
        == 0
    )
    assert "64 modules of sd1-inpainting, as kohya has them" in capsys.readouterr().out
    assert {tensor.dtype for key, tensor in load_file(tmp_path / "c.safetensors").items() if ".lora_" in key} == {
        torch.float32
    }


def test_convert_re_expresses_what_cannot_be_held_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    loha, ckpt = save_safetensors(HADA, tmp_path / "l.safetensors"), str(saved(tmp_path / "a.safetensors"))
    command = [
        "lora",
        "convert",
        str(loha),
        "--ckpt",
        ckpt,
        "--to",
        "diffusers",
        "--out",
        str(tmp_path / "b.safetensors"),
    ]
    assert main(command) == 2
    assert "is a LoHa, which diffusers cannot hold; use --as-lora RANK" in capsys.readouterr().err
    assert main([*command, "--as-lora", "4"]) == 0
    assert (
        "1 of them re-expressed, rank 4, 100 % of the energy kept" in capsys.readouterr().out
    )  # a product of two of rank 2 has rank 4
    assert list(read_lora(tmp_path / "b.safetensors", TINY).changes) == [Q]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:0.8:-.5", ("a.safetensors", (0.8, -0.5))), ("C:/a.safetensors:2", ("C:/a.safetensors", 2.0)),
        ("b:1:c", ("b:1:c", 1.0)),
    ],
)  # fmt: skip
def test_a_scale_stands_behind_the_name(text: str, meant: tuple):
    assert scaled_lora(text) == meant


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["extract", "a", "b", "--out", "c"], "--rank --variance", 2),
        (["extract", "a", "b", "--out", "c", "--rank", "2", "--variance", "0.5"], "--variance", 2),
        (["extract", "a", "b", "--out", "c", "--rank", "0"], "rank 0: give a whole number", 2),
        (
            ["extract", "a", "b", "--out", "c", "--rank", "2", "--max-rank", "2"],
            "max_rank bounds what variance chooses",
            2,
        ),
        (["extract", "a", "b", "--out", "c", "--rank", "2", "--dtype", "int8"], "--dtype: 'int8' is unknown", 2),
        (["extract", "a", "--out", "c", "--rank", "2"], "TUNED", 2),
        (["extract", "nowhere", "b", "--out", "c", "--rank", "2"], "nowhere: does not exist", 2),
        (
            ["merge", "nowhere", "l:0.5", "--out", "there"],
            "there: exists already; choose another name or --overwrite",
            3,
        ),
        (["merge", "nowhere", "--out", "c"], "LORA[:SCALE]", 2),
        (["resize", "l", "--out", "c", "--variance", "2"], "variance 2", 2),
        (["resize", "nowhere", "--out", "no/c", "--rank", "2"], "does not exist; make it first", 3),
        (["convert", "l", "--out", "c"], "--to", 2),
        (["convert", "l", "--out", "c", "--to", "comfy"], "invalid choice: 'comfy'", 2),
        (["convert", "l", "--out", "c", "--to", "peft", "--family", "sd1", "--ckpt", "a"], "--ckpt", 2),
        (["convert", "nowhere", "--out", "c", "--to", "peft", "--family", "sd9"], "config 'sd9' is no family", 2),
        (["convert", "l", "--out", "c", "--to", "peft", "--as-lora", "0"], "as_lora 0: give a whole number", 2),
        (["shrink"], "shrink", 2),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(
    arguments: list[str],
    message: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    assert main(["lora", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) <= 220
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_the_error_of_two_possible_families_is_answered_with_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    lora = save_safetensors(
        {f"{name}.lora_down.weight": torch.ones(1, 768), f"{name}.lora_up.weight": torch.ones(3072, 1)},
        tmp_path / "l.safetensors",
    )
    command = ["lora", "convert", str(lora), "--to", "diffusers", "--out", str(tmp_path / "b.safetensors")]
    assert main(command) == 2
    assert "say which with --family" in capsys.readouterr().err
    assert main([*command, "--family", "ssd-1b"]) == 0
