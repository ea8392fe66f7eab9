"""What can be added to every command: other weights, words of one's own, comparisons, prompts from a file, and what is
refused of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import weights
from benchmarks.models.seeded import weight
from ldm.changes import lora
from ldm.cli import arguments, files, making, metadata, models
from ldm.conditioning.prompts import Embedding
from ldm.config import VisionConfig
from ldm.errors import MemoryLimit
from ldm.fast import cpu
from ldm.fast.compiler import CannotCompile
from ldm.limits import precision
from ldm.networks.safety import SafetyChecker
from ldm.pictures.read import open_image, read_metadata
from tests.made.commands import QUICK, drawn, same
from tests.made.families import build, tiny
from tests.made.kernels import compiled_only

PARAMETER = "unet.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"


# --- other weights --------------------------------------------------------------------------------------------------


def test_another_autoencoder_takes_the_place_of_the_models(here, ldm):
    code, _, errors = ldm(f"txt2img 'a cat' {QUICK} --vae vae.safetensors")
    assert (code, errors) == (0, [])
    model = weights.load("tiny.safetensors")
    model.vae.load_state_dict(
        {name: weight(f"another {name}", value.shape) for name, value in model.vae.state_dict().items()}
    )
    assert same("outputs/00001.png", drawn(model))
    facts = read_metadata("outputs/00001.png")
    assert (facts["vae"], facts["vae_hash"]) == ("vae.safetensors", metadata.file_hash(Path("vae.safetensors")))


def test_loras_are_merged_at_their_scales_and_reported(here, ldm):
    code, _, errors = ldm(f"txt2img 'a cat' {QUICK} --lora style.safetensors:0.8 --lora style.safetensors:-0.3")
    assert code == 0
    assert errors == ["ldm: style.safetensors at 0.8: 1 of 1 modules", "ldm: style.safetensors at -0.3: 1 of 1 modules"]
    model = weights.load("tiny.safetensors")
    changes = lora.Changes({PARAMETER: lora.LowRank(weight("down", (4, 32)), 3 * weight("up", (32, 4)), 4.0)})
    lora.merge(model, [(changes, 0.8), (changes, -0.3)])
    assert same("outputs/00001.png", drawn(model))
    digest = metadata.file_hash(Path("style.safetensors"))
    assert (
        read_metadata("outputs/00001.png")["loras"] == f"style.safetensors:0.8:{digest} style.safetensors:-0.3:{digest}"
    )


def test_a_lora_that_the_model_has_no_place_for_is_used_only_if_that_is_allowed(here, ldm):
    code, lines, errors = ldm(f"txt2img 'a cat' {QUICK} --lora partly.safetensors")
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("ldm: error: partly.safetensors: ")
    code, _, errors = ldm(f"txt2img 'a cat' {QUICK} --lora partly.safetensors --allow-unmatched")
    assert code == 0
    assert errors[0].startswith("ldm: partly.safetensors at 1: 1 of 2 modules; not used: ")


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("a.pt:0.8", "a.pt", 0.8),
        ("a.pt", "a.pt", 1),
        ("C:\\x\\a.pt", "C:\\x\\a.pt", 1),
        ("C:\\x\\a.pt:-1", "C:\\x\\a.pt", -1),
        ("a:b:.5", "a:b", 0.5),
        ("a.pt:1e-1", "a.pt", 0.1),
        ("a:2x", "a:2x", 1),
    ],
)
def test_the_last_colon_and_number_is_the_scale(text, file, scale):
    assert arguments.scaled_file(text) == (file, scale)


def test_an_embedding_stands_for_its_word(here, ldm):
    save_file({"emb_params": weight("other", (1, 64))}, "x=y.safetensors")
    code, _, errors = ldm(
        f"txt2img 'a zebra and a horse' {QUICK} --embedding zebra.safetensors --embedding horse=x=y.safetensors"
    )
    assert (code, errors) == (0, [])
    words = [Embedding("zebra", {64: weight("word", (2, 64))}), Embedding("horse", {64: weight("other", (1, 64))})]
    assert same("outputs/00001.png", drawn(weights.load("tiny.safetensors"), "a zebra and a horse", embeddings=words))
    zebra, other = (metadata.file_hash(Path(name)) for name in ("zebra.safetensors", "x=y.safetensors"))
    assert (
        read_metadata("outputs/00001.png")["embeddings"]
        == f"zebra=zebra.safetensors:{zebra} horse=x=y.safetensors:{other}"
    )


def test_what_the_network_predicts_can_be_said(here, ldm):
    assert ldm(f"txt2img 'a cat' {QUICK} --prediction v")[0] == 0
    assert same("outputs/00001.png", drawn(weights.load("tiny.safetensors", prediction="v")))
    assert read_metadata("outputs/00001.png")["prediction"] == "v"


def test_tiles_give_the_same_picture_and_are_noted(here, ldm, monkeypatch):
    asked = []
    real = precision.decode
    monkeypatch.setattr(
        precision, "decode", lambda model, x, *, tile=None: (asked.append(tile), real(model, x, tile=tile))[1]
    )
    assert ldm(f"txt2img 'a cat' {QUICK} --tile 16")[0] == 0
    assert asked == [16]
    assert read_metadata("outputs/00001.png")["tile"] == "16"
    assert ldm(f"txt2img 'a cat' {QUICK}")[0] == 0
    one, other = (np.asarray(open_image(f"outputs/0000{n}.png")).astype(int) for n in (1, 2))
    assert np.abs(one - other).max() <= 2


@compiled_only
@pytest.mark.parametrize(
    ("options", "used"),
    [
        ("", "cpu"),
        ("--fast", "cpu"),
        ("--no-fast", None),
        ("--dtype bfloat16", None),
        ("--dtype bfloat16 --fast", "plain"),
    ],
)
def test_fast_code_runs_where_it_pays_or_is_asked_for_and_the_picture_says_so(options, used, here, ldm):
    line = f"txt2img 'a cat' {QUICK.replace(' --no-fast', '')} {options}"
    assert [ldm(line)[0], ldm(line)[0]] == [0, 0]
    one, other = Path("outputs/00001.png"), Path("outputs/00002.png")
    assert one.read_bytes() == other.read_bytes()
    assert read_metadata(one).get("fast") == used
    if "bfloat16" not in options:
        readable = np.asarray(drawn(weights.load("tiny.safetensors"), "a cat")).astype(int)
        assert abs(np.asarray(open_image(one)).astype(int) - readable).max() <= 1


def test_without_a_compiler_the_readable_networks_run_unless_fast_ones_are_asked_for(here, ldm, monkeypatch):
    def library():
        raise CannotCompile("no C++ compiler")

    monkeypatch.setattr(cpu, "library", library)
    line = f"txt2img 'a cat' {QUICK.replace(' --no-fast', '')}"
    assert ldm(line)[::2] == (0, [])
    assert "fast" not in read_metadata("outputs/00001.png")
    code, _, errors = ldm(f"{line} --fast")
    assert (code, errors) == (
        0,
        ["ldm: warning: fast: no C++ compiler; plain PyTorch instead, which is slower; install g++ or set CXX"],
    )
    assert read_metadata("outputs/00002.png")["fast"] == "plain"


def test_fast_code_and_weights_that_come_and_go_are_refused_together(here, ldm, monkeypatch):
    monkeypatch.setattr(making.models, "device_of", lambda name: torch.device("cuda"))
    code, _, errors = ldm(f"txt2img 'a cat' {QUICK.replace(' --no-fast', '')} --fast --offload")
    assert (code, errors) == (
        2,
        [
            "ldm: error: --fast: with --offload weights come and go, and the readable networks run; leave one of them "
            "out"
        ],
    )


def test_offloading_hands_every_model_over(here, ldm, monkeypatch):
    """On the CPU there is nothing to hand over to: the device is pretended, and moving to it recorded."""
    asked = []
    monkeypatch.setattr("ldm.limits.offload.offload", lambda given, device: asked.append((len(given), device)))
    monkeypatch.setattr(making.models, "device_of", lambda name: torch.device("cuda"))
    monkeypatch.setattr(making.models, "check_size", lambda *args: None)
    assert ldm(f"txt2img 'a cat' {QUICK} --offload")[0] == 0
    assert asked == [(1, torch.device("cuda"))]


@pytest.mark.parametrize(("share", "happens"), [(2.0, "moved"), (1.0, "encoders leave"), (0.1, "refused")])
def test_text_towers_leave_the_gpu_where_its_memory_is_short(share, happens, monkeypatch):
    """The GPU is pretended: what it has free, and what is moved to it. The two text towers are most of this model."""
    done: list[object] = []
    gpu, model = torch.device("cuda"), build(tiny("sdxl-base"))
    free = int(share * sum(p.numel() * p.itemsize for p in model.parameters()))
    monkeypatch.setattr(models, "free_memory", lambda device: free)
    monkeypatch.setattr("ldm.limits.offload.offload", lambda given, device, networks: done.append(networks))
    monkeypatch.setattr(model, "to", done.append)
    if happens == "refused":
        with pytest.raises(MemoryLimit, match=r"GB of weights and .* GB free on the GPU; use --offload"):
            models.bring([model], gpu, one_at_a_time=False)
    elif happens == "moved":
        models.bring([model], gpu, one_at_a_time=False)
        assert done == [gpu]
    else:
        with pytest.warns(UserWarning, match="text towers leave it after encoding"):
            models.bring([model], gpu, one_at_a_time=False)
        assert done == [("text", "vision", "depth")]


# --- the safety checker ---------------------------------------------------------------------------------------------


@pytest.fixture
def checker(here, monkeypatch) -> list[list[bool]]:
    """What a safety checker will say, batch by batch; safety.safetensors is its file."""
    said: list[list[bool]] = []
    save_file({"concept_embeds": torch.zeros(17, 4)}, "safety.safetensors")
    monkeypatch.setattr(weights, "load_safety", lambda path, device: said, raising=False)
    monkeypatch.setattr("ldm.networks.safety.flagged", lambda checker, pictures: checker.pop(0))
    return said


def test_flagged_pictures_are_black_reported_and_marked(checker, here, ldm):
    checker += [[False, True], [False]]
    code, lines, errors = ldm(f"txt2img 'a cat' {QUICK} --n 3 --batch 2 --sheet --safety safety.safetensors")
    assert (code, len(lines)) == (0, 4)
    assert errors == [
        "ldm: outputs/00002.png: flagged by the safety checker and blacked; --keep-flagged keeps such pictures"
    ]
    assert [open_image(f"outputs/0000{n}.png").getbbox() is None for n in (1, 2, 3)] == [False, True, False]
    assert [read_metadata(f"outputs/0000{n}.png")["flagged"] for n in (1, 2, 3)] == ["false", "true, blacked", "false"]
    assert open_image("outputs/00001-sheet.png").crop((48, 8, 80, 40)).getbbox() is None
    assert read_metadata("outputs/00001.png")["safety"] == "safety.safetensors"


def test_flagged_pictures_can_be_kept(checker, here, ldm):
    checker += [[True]]
    code, _, errors = ldm(f"txt2img 'a cat' {QUICK} --safety safety.safetensors --keep-flagged --preview 1")
    assert (code, errors) == (0, ["ldm: outputs/00001.png: flagged by the safety checker"])
    assert same("outputs/00001.png", drawn(weights.load("tiny.safetensors")))
    assert read_metadata("outputs/00001.png")["flagged"] == "true, kept"


def test_frames_are_checked_before_they_are_shown(checker, here, ldm):
    checker += [[True, True, True]]
    code, lines, errors = ldm(
        f"interpolate a b --frames 3 --safety safety.safetensors {QUICK.replace('--seed 7', '--seeds 7')}"
    )
    assert (code, len(errors)) == (0, 3)
    with Image.open(lines[-1]) as animation:
        assert max(value for _, value in animation.convert("RGB").getextrema()) <= 2


def test_the_checker_of_a_file_judges_the_pictures(here, ldm):
    """A real one: with thresholds below -1 all is flagged, above 1 nothing."""
    checker = SafetyChecker(VisionConfig(image=28, patch=7, width=64, layers=2, heads=4, mlp=128, projection=48))
    sizes = {
        "image_size": 28,
        "patch_size": 7,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    for threshold, code in ((-2.0, "true, blacked"), (2.0, "false")):
        state = {name: weight(f"safety_checker.{name}", value.shape) for name, value in checker.state_dict().items()}
        state |= {
            name: torch.full_like(value, threshold) for name, value in state.items() if name.endswith("embeds_weights")
        }
        Path("safety").mkdir(exist_ok=True)
        save_file(state, "safety/model.safetensors")
        Path("safety/config.json").write_text(json.dumps({"projection_dim": 48, "vision_config": sizes}))
        assert ldm(f"txt2img 'a cat' {QUICK} --safety safety --out a.png --overwrite")[0] == 0
        assert read_metadata("a.png")["flagged"] == code
        assert read_metadata("a.png")["safety_hash"] == metadata.file_hash(Path("safety/model.safetensors"))


# --- prompts from a file --------------------------------------------------------------------------------------------


def test_prompts_come_from_a_file_one_a_line(here, ldm):
    Path("prompts.txt").write_text("\ufeff# animals\na cat\n\n   a dög  \r\n  # not this one\n", encoding="utf-8")
    code, lines, _ = ldm(f"txt2img --prompts prompts.txt {QUICK} --n 2 --batch 3 --sheet")
    assert (code, len(lines)) == (0, 5)
    facts = [read_metadata(path) for path in lines[:4]]
    assert [(each["prompt"], each["seed"]) for each in facts] == [
        ("a cat", "7"),
        ("a cat", "8"),
        ("a dög", "7"),
        ("a dög", "8"),
    ]
    for path, seed in ((lines[2], 7), (lines[3], 8)):
        image = np.asarray(drawn(weights.load("tiny.safetensors"), "a dög", seeds=[seed])).astype(int)
        assert np.abs(np.asarray(open_image(path)) - image).max() <= 1  # made in a batch
    assert read_metadata(lines[4])["prompt"] == "a cat\na dög"


def test_a_way_between_prompts_can_come_from_a_file_too(here, ldm):
    Path("prompts.txt").write_text("a cat\na dog\na bird\n")
    code, lines, _ = ldm(f"interpolate --prompts prompts.txt --frames 3 --seeds 1 {QUICK.replace('--seed 7', '')}")
    assert (code, len(lines)) == (0, 4)
    assert read_metadata(lines[0])["prompt"] == "a cat\na dog\na bird"


# --- what is refused ------------------------------------------------------------------------------------------------


def forbidden(*args, **how):
    raise AssertionError("weights were read before everything was checked")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("txt2img x --prompts prompts.txt", "--prompts: there is a PROMPT too; give one of them"),
        ("txt2img --prompts none.txt", "none.txt: has no prompt in it; write one a line"),
        ("txt2img --prompts missing.txt", "missing.txt: cannot be opened: No such file"),
        ("txt2img --prompts .", ".: is not a regular file"),
        ("txt2img --prompts photo.png", "photo.png: is not UTF-8 text (byte 0)"),
        ("txt2img --prompts long.txt", "--prompts: number 2: 69999 bytes; the limit is 65536"),
        ("interpolate", "PROMPT: none given"),
        ("txt2img x --vae vae.safetensor", "vae.safetensor: does not exist; near it: vae.safetensors"),
        ("txt2img x --vae photo.png", "photo.png: is a PNG picture, not weights"),
        ("txt2img x --vae empty", "--vae: empty is a directory without model_index.json or config.json"),
        ("txt2img x --ckpt empty", "--ckpt: empty is a directory without model_index.json"),
        ("txt2img x --lora style.safetensor:0.8", "style.safetensor: does not exist"),
        (
            "txt2img x --lora style.safetensors:1e9",
            "--lora: style.safetensors: scale 1e+09; give a number from -100 to 100",
        ),
        (
            "txt2img x --allow-unmatched",
            "--allow-unmatched: says something of --lora, which is not given; leave it out",
        ),
        ("txt2img x --embedding missing.pt", "missing.pt: does not exist"),
        ("txt2img x --embedding style.safetensors", "style.safetensors: is a LoRA"),
        (
            "txt2img x --embedding a=zebra.safetensors --embedding A=zebra.safetensors",
            "--embedding: two are called a; give one of them another name",
        ),
        ("txt2img x --safety missing.bin", "missing.bin: does not exist"),
        ("txt2img x --keep-flagged", "--keep-flagged: says something of --safety, which is not given; leave it out"),
        (
            "txt2img x --safety vae.safetensors --preview",
            "--preview: would show pictures before --safety has seen them",
        ),
        ("txt2img x --prediction x0", "--prediction: invalid choice: 'x0'"),
        ("txt2img x --offload", "--offload: the device is the CPU, where every network rests already; leave it out"),
        ("txt2img x --tile -1", "--tile: -1; give a whole number from 0"),
        ("txt2img x --original-size 512", "--original-size: '512' is no size; write WIDTHxHEIGHT"),
        ("txt2img x --target-size 0x8", "--target-size: (8, 0); give two whole numbers of pixels from 1"),
        ("txt2img x --crop 1", "--crop: '1' is no corner; write TOP,LEFT"),
        ("txt2img x --aesthetic 101", "--aesthetic: 101.0; give a score from 0 to 100"),
        ("txt2img x --negative-aesthetic nan", "--negative-aesthetic: nan; give a score"),
        ("txt2img x --hires 9", "--hires: 9; give more than 1 and at most 8"),
        ("txt2img x --hires nan", "--hires: nan; give more than 1 and at most 8"),
        ("hires x --scale 1x", "--scale: 1; give more than 1 and at most 8"),
        ("hires x --scale big", "--scale/--hires: 'big' is not a number"),
        ("hires x --strength 0", "--strength: 0 would only enlarge; give more"),
        ("hires x --enlarge vae", "--enlarge: invalid choice: 'vae'"),
        (
            "txt2img x --strength 0.5",
            "--strength: says how --hires redraws, which is not given; add --hires 2x, or leave it out",
        ),
        ("txt2img x --enlarge pixel", "--enlarge: says how --hires redraws"),
        ("txt2img x --refine-from 0.5", "--refine-from: says when --refiner takes over, which is not given"),
        ("txt2img x --refiner tiny.safetensors --hires 2x", "--refiner: does not go together with --hires"),
        ("txt2img x --refiner tiny.safetensors --refine-from 2", "--refine-from: 2.0; give a number from 0 to 1"),
        (
            "txt2img x --refiner tiny.safetensors --refine-strength 2",
            "--refine-strength: 2.0; give a number from 0 to 1",
        ),
        (
            "txt2img x --refiner tiny.safetensors --refine-strength 0.5 --refine-from 0.5",
            "--refine-strength: the refiner redraws the finished picture",
        ),
        ("txt2img x --refiner missing.pt", "missing.pt: does not exist"),
        ("inpaint x --init photo.png", "--mask: none given; name a picture that is white where to repaint"),
        ("inpaint x --init photo.png --mask-from alpha", "photo.png: has no transparency to read a mask from"),
        ("inpaint x --init photo.png --mask black.png", "--mask: nothing to paint"),
        ("inpaint x --init photo.png --mask wide.png", "--mask: it is 64x8 and the picture 40x32"),
        ("inpaint x --init photo.png --mask photo.png --feather 300", "--feather: 300; give at most 256"),
        ("inpaint x --init photo.png --mask photo.png --strength 0", "--strength: 0 would paint nothing; give more"),
        ("outpaint x --init photo.png", "the following arguments are required: --extend"),
        ("outpaint x --init photo.png --extend 5", "--extend: '5' is no side; write left=128, for example"),
        ("outpaint x --init photo.png --extend up=5", "--extend: 'up' is no side; there are left, right, top, bottom"),
        ("outpaint x --init photo.png --extend left=-5", "--extend: left=-5; give 0 to 8192 pixels"),
        ("outpaint x --init photo.png --extend left=5 --extend left=6", "--extend: one side is given twice"),
        ("depth2img x --init photo.png --depth wide.png", "--depth: it is 64x8 and the picture 40x32"),
        ("upscale x --init photo.png --noise-level 351", "--noise-level: 351; give at most 350"),
        ("upscale x --init photo.png --window 5", "--window: 5; give a whole number from 64"),
        ("upscale x --init photo.png --window -5", "--window: -5; give a whole number from 64"),
        ("upscale x --init photo.png --width 64", "--width: unknown to ldm upscale"),
        ("variations --init photo.png --negative x", "--negative: unknown to ldm variations"),
        ("variations --init photo.png --preprocessing clip", "--preprocessing: invalid choice: 'clip'"),
        ("interpolate a b --seeds 1,2,3", "--seeds: 3 with 2 prompts; give one, or 2"),
        (
            "interpolate a --seeds 1",
            "--seeds: one prompt and one seed are no way; give several prompts, or several seeds",
        ),
        ("interpolate a b --seeds 1,x", "--seeds: 'x' is not a whole number"),
        ("interpolate a b --seeds=-1,2", "--seeds: -1; give a whole number from 0"),
        ("interpolate a b --frames 1", "--frames: 1; give a whole number from 2"),
        ("interpolate a b --fps 0", "--fps: 0; give more than 0 and at most 50 pictures a second"),
        ("interpolate a b --animation mp4", "--animation: invalid choice: 'mp4'"),
        ("interpolate a b --n 2", "--n: unknown to ldm interpolate"),
        ("txt2img x --grid-of cfg", "--grid-of: 'cfg' has no values; write cfg=1.5,3,5,8 for example"),
        ("txt2img x --grid-of cgf=1,2", "--grid-of: 'cgf' is unknown; cfg? All: "),
        ("txt2img x --grid-of out=1,2", "--grid-of: 'out' is unknown"),
        ("img2img x --init photo.png --grid-of noise-level=1,2", "--grid-of: 'noise-level' is unknown"),
        ("txt2img x --grid-of cfg=1,,2", "--grid-of: cfg has an empty value; write cfg=A,B,C"),
        ("txt2img x --grid-of cfg=1,two", "--grid-of: cfg: 'two' is not a number"),
        ("txt2img x --grid-of cfg=1,1.0", "--grid-of: cfg has a value twice"),
        ("txt2img x --grid-of cfg=1,2 --grid-of cfg=3", "--grid-of: cfg twice; put all its values into one"),
        (
            "txt2img x --grid-of cfg=1 --grid-of steps=1 --grid-of eta=1",
            "--grid-of: a sheet has two axes; give it once or twice",
        ),
        (
            f"txt2img x --grid-of seed={','.join(map(str, range(1001)))}",
            "--grid-of: 1001 combinations; the limit is 1000",
        ),
        ("txt2img x --grid-of seed=1,2 --n 2", "--grid-of: seed together with --n; name all the seeds in --grid-of"),
        ("txt2img x --grid-of cfg=5,500", "--cfg: 500.0; give a number from -100 to 100"),
        ("txt2img x --grid-of sampler=ddim,dimm", "--sampler: 'dimm' is unknown; ddim?"),
        ("txt2img x --grid-of eta=0,1 --grid-of sampler=ddim,plms", "--eta: sampler plms has none"),
        ("img2img x --init photo.png --grid-of strength=0.5,0.01", "--strength: 0.01 leaves none of 25 steps"),
        (
            "txt2img x --n 1000000 --grid-of cfg=1,2",
            "2 combinations of 1000000 pictures are 2000000; the limit is 1000000",
        ),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2_before_any_weight_is_read(line, message, here, ldm, monkeypatch):
    monkeypatch.setattr(weights, "load", forbidden)
    Path("none.txt").write_text("# nothing\n\n")
    Path("long.txt").write_text("short\n" + "x " * 35_000)
    Path("empty").mkdir()
    Image.new("L", (40, 32)).save("black.png")
    Image.new("L", (64, 8), 255).save("wide.png")
    code, lines, errors = ldm(line)
    assert (code, lines) == (2, [])
    assert len(errors) == 1
    assert errors[0].startswith(f"ldm: error: {message}")
    assert len(errors[0]) <= len("ldm: error: ") + 202
    assert not Path("outputs").exists()


def test_a_file_of_prompts_that_is_too_large_is_refused(here, ldm, monkeypatch):
    monkeypatch.setattr(files, "MAX_PROMPTS", 10)
    Path("p.txt").write_text("a cat and a dog\n")
    assert ldm("txt2img --prompts p.txt")[2] == ["ldm: error: p.txt: has more than 10 bytes; split it"]


def test_a_seed_beyond_what_torch_tells_apart_is_said(here, ldm):
    code, _, errors = ldm(f"interpolate a --seeds 1,4294967296 --frames 2 {QUICK.replace('--seed 7', '')}")
    assert (code, errors) == (
        0,
        ["ldm: warning: --seeds: torch uses the low 32 bits, so 4294967296 gives the same picture as 0"],
    )


def test_nothing_is_left_out_of_the_metadata_of_sdxl(here, ldm):
    weights.save(build(replace(tiny("sdxl-refiner"), size=16)), "refiner.safetensors")
    assert (
        ldm(
            "txt2img x --ckpt refiner.safetensors --steps 1 --seed 1 --aesthetic 7 --negative-aesthetic 1 "
            "--original-size 20x10 --crop 1,2"
        )[0]
        == 0
    )
    facts = read_metadata("outputs/00001.png")
    assert [facts[key] for key in ("aesthetic", "negative_aesthetic", "original_size", "crop")] == [
        "7.0",
        "1.0",
        "20x10",
        "1,2",
    ]
    assert "target_size" not in facts
    assert os.listdir("outputs") == ["00001.png"]
