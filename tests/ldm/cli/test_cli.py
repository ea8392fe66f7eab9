"""The command line as a person meets it: pictures, names, metadata, and one line for everything that goes wrong."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import weights
from ldm import tasks
from ldm.__main__ import main
from ldm.cli import COMMANDS, arguments, models, place, terminal
from ldm.errors import NonFinite
from ldm.limits import precision
from ldm.pictures import write
from ldm.pictures.read import open_image, read_metadata
from ldm.tasks.job import Sampling
from samplers import GRIDS, SAMPLERS, Schedule, Step, euler, karras
from tests.made.families import build
from weights.models import load

ROOT = Path(__file__).parents[3]
QUICK = "--ckpt tiny.safetensors --steps 2 --seed 7 --dtype float32 --no-fast"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return weights.save(build(), tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def here(tmp_path, checkpoint, monkeypatch) -> Path:
    """An empty working directory but for a tiny model and a picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.safetensors").symlink_to(checkpoint)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)).save("photo.png")
    return tmp_path


class Result:
    """What a command gave back."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.lines, self.errors = code, out.splitlines(), err.splitlines()


@pytest.fixture
def ldm(capsys):
    """Run a command line in this process."""

    def run(line: str, *more: str) -> Result:
        code = main([*shlex.split(line), *more])
        return Result(code, *capsys.readouterr())

    return run


def heeding_interrupts() -> None:
    """A program started in the background of a shell ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_a_process(line: str, cwd: Path, **how) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | how.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", "ldm", *shlex.split(line)],
        cwd=cwd,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding_interrupts,
        **how,
    )


# --- pictures -------------------------------------------------------------------------------------------------------


def test_txt2img_writes_the_picture_of_the_python_function(here, ldm):
    result = ldm(
        f"txt2img 'a cat' {QUICK} --negative 'a dog' --sampler euler_ancestral --cfg 5 --eta 0.5 --width 40 --height 16"
    )
    assert (result.code, result.lines, result.errors) == (0, ["outputs/00001.png"], [])
    model = weights.load("tiny.safetensors")
    (image,) = tasks.txt2img(
        model,
        "a cat",
        weighting=True,
        seeds=[7],
        negative="a dog",
        steps=2,
        sampler="euler_ancestral",
        cfg=5.0,
        eta=0.5,
        width=40,
        height=16,
    )
    assert np.array_equal(open_image("outputs/00001.png"), image)


def test_img2img_writes_the_picture_of_the_python_function(here, ldm):
    result = ldm(f"img2img 'a cat' {QUICK} --init photo.png --strength 0.5 --width 32")
    assert (result.code, result.lines, result.errors) == (0, ["outputs/00001.png"], [])
    (image,) = tasks.img2img(
        weights.load("tiny.safetensors"), open_image("photo.png"), "a cat", seeds=[7], steps=2, strength=0.5, width=32
    )
    assert np.array_equal(open_image("outputs/00001.png"), image)
    assert image.size == (32, 24)


def test_without_a_checkpoint_the_model_that_ships_is_used(here, ldm, checkpoint, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        weights,
        "load",
        lambda path, *args, **how: (loaded.append((path, args, how)), load(checkpoint, *args, **how))[1],
    )
    monkeypatch.setattr(models, "embedded", lambda: checkpoint)
    assert ldm("txt2img 'a cat' --steps 1 --seed 7 --dtype float32").code == 0
    assert loaded == [(None, (None,), {"dtype": torch.float32, "ema": False, "prediction": None, "variant": None})]
    assert read_metadata("outputs/00001.png")["model"] == "tiny.safetensors"


def test_options_of_the_model_reach_the_loader(here, ldm, checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(
        weights,
        "load",
        lambda path, *args, **how: (asked.append((path, args, how)), load(checkpoint, None, dtype=how["dtype"]))[1],
    )
    assert ldm(f"txt2img a {QUICK} --config sd1 --ema --dtype bfloat16 --device cpu --prediction eps").code == 0
    assert asked == [
        ("tiny.safetensors", ("sd1",), {"dtype": torch.bfloat16, "ema": True, "prediction": "eps", "variant": None})
    ]
    facts = read_metadata("outputs/00001.png")
    assert (facts["dtype"], facts["ema"]) == ("bfloat16", "true")


def test_a_picture_says_how_it_was_made(here, ldm):
    ldm(
        f"txt2img 'un café 🙂' {QUICK} --negative 赤い --n 2 --cfg-rescale 0.7 --cfg-interval 0.5 9 --clip-skip 2 "
        "--sampler ddim --eta 1"
    )
    facts = read_metadata("outputs/00002.png")
    digest = facts.pop("model_hash")
    version = facts.pop("version")
    assert facts == {
        "task": "txt2img", "prompt": "un café 🙂", "negative_prompt": "赤い", "seed": "8", "sampler": "ddim",
        "grid": "ddim", "steps": "2", "cfg": "7.5", "size": "32x32", "model": "tiny.safetensors", "family": "sd1",
        "prediction": "eps", "dtype": "float32", "cfg_rescale": "0.7", "cfg_interval": "0.5 9.0", "eta": "1.0",
        "clip_skip": "2", "weighting": "true",
    }  # fmt: skip
    assert digest == hashlib.sha256(Path("tiny.safetensors").read_bytes()).hexdigest()[:10]
    assert version
    ldm(f"img2img a {QUICK} --init photo.png --width 32 --strength 0.5")
    facts = read_metadata("outputs/00003.png")
    assert (facts["task"], facts["strength"], facts["init"], facts["size"]) == ("img2img", "0.5", "photo.png", "32x24")
    assert re.fullmatch("[0-9a-f]{10}", facts["init_hash"])


def test_the_same_command_gives_the_same_bytes_in_every_process(here, ldm):
    ldm(f"txt2img 'a cat' {QUICK} --out a.png")
    process = in_a_process(f"txt2img 'a cat' {QUICK} --out b.png", here, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=900)
    assert (process.returncode, out, err) == (0, "b.png\n", "")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_several_pictures_have_the_seeds_that_follow_and_do_not_depend_on_the_batch(here, ldm):
    assert ldm(f"txt2img 'a cat' {QUICK} --n 3").lines == [f"outputs/0000{n}.png" for n in (1, 2, 3)]
    assert ldm(f"txt2img 'a cat' {QUICK} --n 3 --batch 2").lines == [f"outputs/0000{n}.png" for n in (4, 5, 6)]
    assert [read_metadata(f"outputs/0000{n}.png")["seed"] for n in range(1, 7)] == ["7", "8", "9"] * 2
    for n in (1, 2, 3):
        one, other = (np.asarray(open_image(f"outputs/0000{k}.png")).astype(int) for k in (n, n + 3))
        assert np.abs(one - other).max() <= 1


def test_a_random_seed_is_printed_and_kept(here, ldm):
    result = ldm("txt2img 'a cat' --ckpt tiny.safetensors --steps 1")
    (line,) = result.errors
    seed = int(line.removeprefix("ldm: seed "))
    assert 0 <= seed < 2**32
    ldm(f"txt2img 'a cat' --ckpt tiny.safetensors --steps 1 --seed {seed}")
    assert read_metadata("outputs/00001.png")["seed"] == str(seed)
    assert Path("outputs/00001.png").read_bytes() == Path("outputs/00002.png").read_bytes()


def test_a_sheet_holds_all_pictures(here, ldm):
    assert ldm(f"txt2img 'a cat' {QUICK} --n 3 --sheet").lines[-1] == "outputs/00001-sheet.png"
    assert open_image("outputs/00001-sheet.png").width == 2 * (32 + 8) + 8
    assert np.array_equal(open_image("outputs/00001-sheet.png").crop((8, 8, 40, 40)), open_image("outputs/00001.png"))
    facts = read_metadata("outputs/00001-sheet.png")
    assert (facts["seed"], facts["seeds"]) == ("7", "7 8 9")
    assert ldm(f"txt2img 'a cat' {QUICK} --sheet --out cat.png").lines == ["cat.png", "cat-sheet.png"]


def test_a_preview_shows_the_current_estimate_in_one_file(here, ldm, monkeypatch):
    seen = []
    save = write.save
    monkeypatch.setattr(
        write, "save", lambda picture, *args, **how: (seen.append(picture.size), save(picture, *args, **how))[1]
    )
    ldm("txt2img 'a cat' --ckpt tiny.safetensors --seed 7 --steps 6 --preview 2 --n 3 --batch 2")
    assert sorted(os.listdir("outputs")) == ["00001-preview.png", "00001.png", "00002.png", "00003.png"]
    assert seen == [(88, 48)] * 3 + [(32, 32)] * 2 + [(32, 32)] * 3 + [(32, 32)]
    assert ldm("txt2img 'a cat' --ckpt tiny.safetensors --seed 7 --steps 6 --preview --out cat.png").code == 0
    assert Path("cat-preview.png").exists()


@pytest.mark.parametrize(("sampler", "previewed"), [("dpmpp_2m", [1, 3, 5]), ("heun", [3, 7, 10]), ("plms", [2, 4, 6])])
def test_previews_count_steps_where_some_take_two_network_calls(tmp_path, monkeypatch, sampler, previewed):
    seen, x = [], torch.zeros(1)

    def decode(model, x0):
        seen.append(int(x0))
        raise NonFinite("too early")

    monkeypatch.setattr(place.precision, "decode", decode)
    sampling, reported = Sampling(sampler=sampler, steps=6), []
    total = sampling.calls(sampling.sigmas(Schedule()))
    home = place.Place(tmp_path, is_file=False, overwrite=False)
    on_step = home.previewing(SimpleNamespace(), 2, reported.append)
    for i in range(total):
        on_step(Step(i, total, 1.0, x, x + i, 6))
    assert seen == previewed
    assert len(reported) == total == previewed[-1] + 1


def test_previews_count_the_steps_of_the_part_that_is_redrawn(here, ldm, monkeypatch):
    """Of 6 steps at strength 0.7 there are 4 left, in 7 calls of Heun's method: a preview after 2 and after 4."""
    Image.new("RGB", (32, 32)).save("init.png")
    seen, save = [], write.save
    monkeypatch.setattr(
        write, "save", lambda picture, path, *args, **how: (seen.append(1), save(picture, path, *args, **how))[1]
    )
    line = "img2img 'a cat' --init init.png --strength 0.7 --ckpt tiny.safetensors --seed 7 --steps 6 --sampler heun"
    assert ldm(f"{line} --preview 2").code == 0
    assert len(seen) == 3


def test_a_preview_that_cannot_be_drawn_is_left_out(here, ldm, monkeypatch):
    decode = precision.decode
    monkeypatch.setattr(
        place.precision,
        "decode",
        lambda model, x, **how: decode(model, x * float("nan") if decoding.pop() else x, **how),
    )
    decoding = [False, True]
    assert ldm(f"txt2img 'a cat' {QUICK} --preview 2").code == 0
    assert os.listdir("outputs") == ["00001.png"]


# --- where they go --------------------------------------------------------------------------------------------------


def test_names_that_are_taken_get_a_number(here, ldm):
    for expected in ("cat.png", "cat-2.png", "cat-3.png"):
        assert ldm(f"txt2img a {QUICK} --out cat.png").lines == [expected]
    assert ldm(f"txt2img a {QUICK} --out dog.png --n 2").lines == ["dog.png", "dog-2.png"]


def test_overwrite_replaces_what_out_names_and_no_more(here, ldm):
    Path("cat.png").write_text("old")
    Path("cat-2.png").write_text("old")
    Path("cat-3.png").write_text("precious")
    assert ldm(f"txt2img a {QUICK} --out cat.png --overwrite --n 2 --sheet").lines == [
        "cat.png",
        "cat-2.png",
        "cat-sheet.png",
    ]
    assert open_image("cat.png").size == open_image("cat-2.png").size == (32, 32)
    assert Path("cat-3.png").read_text() == "precious"


def test_a_directory_is_made_only_on_request(here, ldm):
    result = ldm(f"txt2img a {QUICK} --out runs/today")
    assert (result.code, result.errors) == (
        2,
        ["ldm: error: --out: directory runs/today/ does not exist; make it, or add --mkdir"],
    )
    assert ldm(f"txt2img a {QUICK} --out runs/today --mkdir").lines == ["runs/today/00001.png"]
    assert ldm(f"txt2img a {QUICK} --out runs/b/cat.png --mkdir").lines == ["runs/b/cat.png"]


@pytest.mark.parametrize("name", ["two words", "-leading", "größe 🙂", "dir.with.dots", "x" * 200])
def test_odd_names_of_directories_work(name, here, ldm):
    assert ldm(f"txt2img a {QUICK} --mkdir", f"--out={name}").code == 0
    assert os.listdir(here / name) == ["00001.png"]


def test_a_full_disk_is_noticed_before_the_model_is_loaded(here, ldm, monkeypatch):
    monkeypatch.setattr(weights, "load", forbidden)
    monkeypatch.setattr(place.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10_000}))
    result = ldm(f"txt2img a {QUICK} --out .")
    assert result.code == 3
    assert "MB needed in ., 0.01 MB free; make room" in result.errors[0]


def test_a_fault_while_writing_keeps_the_pictures_before_it(here, ldm, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(0)
        if len(calls) > 2:  # a file and its directory for each picture
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    result = ldm(f"txt2img a {QUICK} --n 3")
    assert (result.code, result.lines) == (3, ["outputs/00001.png"])
    assert result.errors == ["ldm: error: outputs/00002.png: could not be written: No space left on device"]
    assert os.listdir("outputs") == ["00001.png"]


def test_a_place_that_cannot_be_written_to_is_noticed_before_the_model_is_loaded(here, ldm, monkeypatch):
    real = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *mode)

    monkeypatch.setattr(weights, "load", forbidden)
    monkeypatch.setattr(place.os, "open", refuse)
    result = ldm(f"txt2img a {QUICK} --out .")
    assert (result.code, result.errors) == (3, ["ldm: error: --out: cannot write into .: Permission denied"])


# --- what goes wrong ------------------------------------------------------------------------------------------------


def forbidden(*args, **how):
    raise AssertionError("weights were read before everything was checked")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND; see 'ldm --help'"),
        ("txt2img", "PROMPT: none given; write it in quotes, or name a file with --prompts; see 'ldm txt2img --help'"),
        ("img2img x", "the following arguments are required: --init; see 'ldm img2img --help'"),
        ("txt2im x", "COMMAND: invalid choice: 'txt2im'"),
        ("txt2img a red cube", "red: unknown to ldm txt2img; put the prompt in quotes"),
        ("txt2img x --step 3", "--step: unknown to ldm txt2img; did you mean --steps?"),
        ("txt2img x --qqq", "--qqq: unknown to ldm txt2img; see 'ldm txt2img --help'"),
        ("txt2img x --steps 2.5", "--steps: '2.5' is not a whole number"),
        ("txt2img x --steps 0", "--steps: 0; give a whole number from 1 to 1000"),
        ("txt2img x --steps 1001", "--steps: 1001; give at most 1000 (the model has 1000 training steps)"),
        ("txt2img x --steps 3 --grid ddim_original", "--steps: ddim_original has no 3 steps"),
        ("txt2img x --sampler dpmpp_2n", "--sampler: 'dpmpp_2n' is unknown; dpmpp_2m? All: ddim "),
        ("txt2img x --grid kerras", "--grid: 'kerras' is unknown; karras? All: "),
        ("txt2img x --cfg many", "--cfg: 'many' is not a number"),
        ("txt2img x --cfg nan", "--cfg: nan; give a number from -100 to 100"),
        ("txt2img x --cfg-rescale 2", "--cfg-rescale: 2.0; give a number from 0 to 1"),
        ("txt2img x --cfg-interval 3 1", "--cfg-interval: (3.0, 1.0); give two sigmas"),
        ("txt2img x --eta 1", "--eta: sampler dpmpp_2m has none"),
        ("txt2img x --clip-skip 0", "--clip-skip: 0; give a whole number from 1"),
        ("txt2img x --seed -1", "--seed: -1; give a whole number from 0 to"),
        ("txt2img x --seed 1.5", "--seed: '1.5' is not a whole number"),
        ("txt2img x --seed 18446744073709551615 --n 2", "--seed: 18446744073709551616; give at most"),
        ("txt2img x --n 0", "--n: 0; give a whole number from 1"),
        ("txt2img x --batch -1", "--batch: -1; give"),
        ("txt2img x --width 0", "--width: 0; give 8 to 16384 pixels"),
        ("txt2img x --height 16385", "--height: 16385; give 8 to 16384 pixels"),
        ("txt2img x --device tpu", "--device: 'tpu' is unknown; use auto, cpu, cuda or cuda:N"),
        ("txt2img x --dtype int8", "--dtype: 'int8' is unknown; use auto, float32, float16, bfloat16"),
        ("txt2img x --config sd11", "--config: 'sd11' is unknown; sd1? All: sd1 "),
        ("txt2img x --preview 0", "--preview: 0; give 1 or more steps"),
        ("txt2img --preview 'a cat'", "--preview: 'a cat' is not a whole number; write the prompt before --preview"),
        ("txt2img x --out a.jpg", "--out: a.jpg: pictures are written as PNG"),
        ("txt2img x --out nowhere", "--out: directory nowhere/ does not exist; make it, or add --mkdir"),
        ("txt2img x --out photo.png/x", "--out: directory photo.png/x/ does not exist"),
        ("txt2img x --out tiny.safetensors", "--out: tiny.safetensors is not a directory"),
        ("txt2img x --overwrite", "--overwrite: only with a --out that names a .png"),
        ("txt2img x --overwrite --out link.png", "--out: link.png is there and is not a regular file"),
        (f"txt2img x --out {'d' * 5000}", "--out: "),
        (f"txt2img '{'x' * 70_000}'", "PROMPT: 70000 bytes; the limit is 65536, shorten it"),
        (f"txt2img x --negative '{'a ' * 70_000}'", "--negative: 140000 bytes; the limit is 65536"),
        ("img2img x --init photo.pmg", "photo.pmg: does not exist; did you mean photo.png?"),
        ("img2img x --init tiny.safetensors", "tiny.safetensors: is not a picture in a format that is read"),
        ("img2img x --init photo.png --strength 1.5", "--strength: 1.5; give a number from 0 to 1"),
        ("img2img x --init photo.png --strength 0.01", "--strength: 0.01 leaves none of 25 steps: give at least 0.04"),
        ("samplers --steps 0", "--steps: 0; give a whole number from 1 to 1000"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2_before_any_weight_is_read(line, message, here, ldm, monkeypatch):
    monkeypatch.setattr(weights, "load", forbidden)
    Path("link.png").symlink_to("photo.png")
    result = ldm(line)
    assert result.code == 2
    assert result.lines == []
    assert len(result.errors) == 1
    assert result.errors[0].startswith(f"ldm: error: {message}")
    assert len(result.errors[0]) <= len("ldm: error: ") + 202
    assert not Path("outputs").exists()


def test_a_device_that_is_not_there_is_never_replaced_by_another(here, ldm, monkeypatch):
    monkeypatch.setattr(weights, "load", forbidden)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = ldm(f"txt2img x {QUICK} --device cuda")
    assert result.code == 2
    assert re.fullmatch(
        r"ldm: error: --device: there is no cuda, 0 CUDA devices were found \(torch [^)]*\); use --device cpu",
        result.errors[0],
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "there is no cuda:2, 2 CUDA devices" in ldm(f"txt2img x {QUICK} --device cuda:2").errors[0]
    assert models.device_of("auto") == torch.device("cuda")
    assert models.device_of("cuda:1") == torch.device("cuda:1")


def test_auto_computes_in_half_precision_only_where_the_hardware_does(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(models, "has_bfloat16", lambda: False)
    assert models.dtype_of("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(models, "has_bfloat16", lambda: True)
    assert models.dtype_of("auto", torch.device("cpu")) == torch.bfloat16
    assert models.dtype_of("auto", torch.device("cuda")) == torch.float16
    assert torch.backends.cudnn.allow_tf32
    assert models.dtype_of("float32", torch.device("cuda")) == torch.float32
    assert not torch.backends.cudnn.allow_tf32


def test_a_missing_or_damaged_checkpoint_is_named(here, ldm):
    result = ldm("txt2img x --seed 1 --ckpt tiny.safetensor")
    assert result.code == 2
    assert result.errors[0].startswith("ldm: error: tiny.safetensor: does not exist")
    Path("bad.safetensors").write_bytes(b"\0" * 64)
    result = ldm("txt2img x --seed 1 --ckpt bad.safetensors")
    assert result.code == 2
    assert result.errors[0].startswith("ldm: error: bad.safetensors: ")


def test_pictures_that_do_not_fit_into_memory_are_refused(here, ldm, monkeypatch):
    result = ldm(f"txt2img x {QUICK} --width 16384 --height 16384")
    if models.free_memory(torch.device("cpu")) is not None:
        assert result.code == 4
        assert "16384x16384 in batches of 1 needs about 68.7 GB" in result.errors[0]
        assert "needs about 137 GB" in ldm(f"txt2img x {QUICK} --width 16384 --height 16384 --tile 0").errors[0]
    monkeypatch.setattr(models, "free_memory", lambda device: 1000)
    assert ldm(f"txt2img x {QUICK}").code == 4
    monkeypatch.setattr(models, "free_memory", lambda device: None)
    assert ldm(f"txt2img x {QUICK}").code == 0


def test_running_out_of_memory_is_exit_code_4(here, ldm, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        monkeypatch.setattr(tasks, "txt2img", raising(error))
        result = ldm(f"txt2img x {QUICK}")
        assert (result.code, result.errors) == (
            4,
            ["ldm: error: out of memory; use a smaller --width and --height, --batch 1 or --dtype bfloat16"],
        )


def test_a_result_that_is_no_number_is_exit_code_5_and_no_picture(here, ldm):
    model = build()
    model.unet.out[2].bias.fill_(float("nan"))
    weights.save(model, "nan.safetensors")
    result = ldm("txt2img x --steps 2 --seed 7 --dtype float32 --ckpt nan.safetensors")
    assert result.code == NonFinite.exit_code == 5
    assert re.match(
        r"ldm: error: UNet: NaN or infinity at sigma 14\.61 in float32, first at out\.2; weights not finite: "
        r"out\.2\.bias",
        result.errors[0],
    )
    assert os.listdir("outputs") == []


def raising(error: BaseException):
    def fail(*args, **how):
        raise error

    return fail


def test_a_fault_of_the_program_is_one_line_and_debug_shows_where(here, ldm, monkeypatch):
    monkeypatch.setattr(tasks, "txt2img", raising(KeyError("a\nb\x1b[31m")))
    result = ldm(f"txt2img x {QUICK}")
    assert (result.code, len(result.errors)) == (1, 1)
    assert result.errors[0].startswith("ldm: error: a fault of this program, KeyError: ")
    assert "\x1b" not in result.errors[0]
    result = ldm(f"txt2img x {QUICK} --debug")
    assert result.errors[0] == "Traceback (most recent call last):"
    assert result.errors[-1].startswith("ldm: error: a fault of this program")
    monkeypatch.setattr(tasks, "txt2img", raising(OSError(errno.EIO, "Input/output error")))
    assert ldm(f"txt2img x {QUICK}").code == 3


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (terminal.Terminated(), 143)])
def test_an_interrupt_keeps_the_finished_pictures(error, code, here, ldm, monkeypatch):
    draw, calls = tasks.txt2img, []

    def third_fails(*args, **how):
        calls.append(0)
        if len(calls) == 3:
            raise error
        return draw(*args, **how)

    monkeypatch.setattr(tasks, "txt2img", third_fails)
    result = ldm(f"txt2img x {QUICK} --n 5")
    assert (result.code, result.lines) == (code, ["outputs/00001.png", "outputs/00002.png"])
    assert result.errors == ["ldm: stopped; the pictures listed are complete"]
    assert sorted(os.listdir("outputs")) == ["00001.png", "00002.png"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_run_and_leaves_no_temporary_file(number, code, here):
    process = in_a_process(
        "txt2img x --ckpt tiny.safetensors --steps 2 --seed 1 --n 1000", here, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == "outputs/00001.png\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=900)
    assert process.returncode == code
    assert err.splitlines()[-1] == "ldm: stopped; the pictures listed are complete"
    listed = {"00001.png", *(Path(line).name for line in out.splitlines())}
    written = set(os.listdir("outputs"))
    assert listed <= written
    assert len(written) <= len(listed) + 1  # one may have got its name when the signal came
    assert not [name for name in written if name.endswith(".tmp")]


def test_a_reader_that_goes_away_is_silence_and_exit_code_141(here):
    process = in_a_process("samplers", here, stdout=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(timeout=900), err) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_exit_code_3(here):
    with open("/dev/full", "w") as full:
        process = in_a_process("samplers --steps 2", here, stdout=full)
        err = process.stderr.read()
    assert process.wait(timeout=900) == 3
    assert err.startswith("ldm: error: [Errno 28] No space left on device")


def test_a_terminal_without_unicode_gets_escapes(here):
    process = in_a_process(
        f"txt2img 🙂 {QUICK} --mkdir --out größe🙂",
        here,
        stdout=subprocess.PIPE,
        env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    out, err = process.communicate(timeout=900)
    assert (process.returncode, err) == (0, "")
    assert out == "gr\\xf6\\xdfe\\U0001f642/00001.png\n"


# --- warnings -------------------------------------------------------------------------------------------------------


def test_a_size_is_rounded_with_one_warning(here, ldm):
    result = ldm(f"txt2img x {QUICK} --width 30 --n 2")
    assert result.errors == ["ldm: warning: --width: 30 becomes 32, a multiple of 8"]
    assert open_image("outputs/00001.png").size == (32, 32)
    assert ldm(f"img2img x {QUICK} --init photo.png").errors == [
        "ldm: warning: --init: 50x37 becomes 48x40, multiples of 8"
    ]


def test_a_prompt_that_is_cut_is_reported_once(here, ldm):
    result = ldm(f"txt2img '{'word ' * 80}' {QUICK} --n 2 --truncate")
    assert result.errors == ["ldm: warning: prompt: 80 tokens, 75 are read; dropped from 'word' on"]
    assert read_metadata("outputs/00001.png")["truncate"] == "true"
    assert ldm(f"txt2img '{'word ' * 80}' {QUICK}").errors == []
    assert not np.array_equal(open_image("outputs/00001.png"), open_image("outputs/00003.png"))


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ("--seed 4294967296", "--seed: torch uses the low 32 bits, so 4294967296 gives the same picture as 0"),
        ("--dtype float16", "--dtype: float16 on the CPU is slow"),
        ("--width 72", "72x32 from a model trained at 32x32: things may appear twice"),
    ],
)
def test_what_may_surprise_is_said_and_done(options, warning, here, ldm):
    result = ldm(f"txt2img x {QUICK} {options}")
    assert result.code == 0
    assert len(result.errors) == 1
    assert result.errors[0].startswith(f"ldm: warning: {warning}")


def test_warnings_of_other_programs_for_programmers_are_left_out(here, ldm, monkeypatch):
    draw = tasks.txt2img

    def warn(*args, **how):
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("two\nlines \x1b[31m", UserWarning, stacklevel=1)
        return draw(*args, **how)

    monkeypatch.setattr(tasks, "txt2img", warn)
    assert ldm(f"txt2img x {QUICK}").errors == ["ldm: warning: two\\u000alines \\u001b[31m"]


# --- the rest -------------------------------------------------------------------------------------------------------


def test_a_bar_moves_only_on_a_terminal(here, ldm, monkeypatch):
    assert ldm(f"txt2img x {QUICK}").errors == []

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    assert main([*shlex.split(f"txt2img x {QUICK} --n 3 --batch 2")]) == 0
    assert "1-2 of 3" in screen.getvalue()
    assert "3-3 of 3" in screen.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    assert main([*shlex.split(f"txt2img x {QUICK} --width 30")]) == 0


def test_samplers_lists_everything_with_its_real_cost(ldm):
    result = ldm("samplers --steps 10")
    assert result.code == 0
    text = "\n".join(result.lines)
    for name in (*SAMPLERS, *GRIDS):
        assert re.search(rf"^{name} ", text, re.MULTILINE), name
    for name, grid, calls in (
        ("ddim", "ddim", 10),
        ("plms", "ddim", 11),
        ("heun", "karras", 19),
        ("dpmpp_2m", "karras", 10),
        ("lcm", "trailing", 10),
    ):
        assert re.search(rf"^{name} +{grid} +{calls}  \S", text, re.MULTILINE), name
    assert "(Song et al. 2021, eq. 12)" in text
    assert "  t      901 801 701 601 501 401 301 201 101 1 end" in result.lines
    assert any(line.startswith("  sigma  14.61 9.103 ") for line in result.lines)


def test_a_sampler_and_a_grid_of_ones_own_work_in_every_command(here, ldm, monkeypatch):
    def mine(denoise, x, sigmas, *, noise=None):
        """Euler's method under another name."""
        return euler(denoise, x, sigmas)

    def coarse(schedule, steps):
        """Half of the steps asked for."""
        return karras(schedule, (steps + 1) // 2)

    monkeypatch.setitem(SAMPLERS, "mine", mine)
    monkeypatch.setitem(GRIDS, "coarse", coarse)
    for options, same in (
        ("--sampler mine --steps 2", "--sampler euler --steps 2"),
        ("--sampler mine --grid coarse --steps 4", "--sampler euler --steps 2"),
    ):
        for out, given in (("a.png", options), ("b.png", same)):
            assert ldm(f"txt2img 'a cat' {QUICK} --overwrite --out {out} {given}").errors == []
        assert np.array_equal(open_image("a.png"), open_image("b.png"))
        facts = read_metadata("a.png")
        assert (facts["sampler"], facts["grid"]) == ("mine", "coarse" if "coarse" in options else "karras")
    assert ldm(f"txt2img 'a cat' {QUICK} --grid-of sampler=mine,euler --grid-of grid=coarse,karras").errors == []
    text = "\n".join(ldm("samplers --steps 10").lines)
    assert re.search(r"^mine +karras +10  Euler's method under another name\.$", text, re.MULTILINE)
    assert re.search(r"^coarse +Half of the steps asked for\.$", text, re.MULTILINE)
    (error,) = ldm(f"txt2img 'a cat' {QUICK} --sampler mind").errors
    assert error.startswith("ldm: error: --sampler: 'mind' is unknown; mine?")


def test_samplers_says_where_a_grid_has_no_such_count(ldm):
    result = ldm("samplers --steps 3")
    assert result.code == 0
    assert any("ddim_original has no 3 steps" in line for line in result.lines)


def test_every_command_explains_itself_with_examples_that_parse(ldm):
    assert ldm("--version").lines[0].startswith("ldm ")
    overview = "\n".join(ldm("--help").lines)
    for name, command in COMMANDS.items():
        assert command.help in overview
        result = ldm(f"{name} --help")
        assert result.code == 0
        assert "exit codes:" in result.lines
        for example in command.examples.strip().splitlines():
            assert example.strip() in map(str.strip, result.lines)
            assert arguments.parse(COMMANDS, shlex.split(example)[1:]).command == name


def test_every_option_says_what_it_does(ldm):
    text = "\n".join(ldm("img2img --help").lines)
    options = [
        "--init", "--strength", "--ckpt", "--config", "--ema", "--negative", "--sampler", "--grid", "--steps", "--cfg",
        "--cfg-rescale", "--cfg-interval", "--seed", "--n", "--batch", "--width", "--height", "--eta", "--clip-skip",
        "--device", "--dtype", "--out", "--mkdir", "--overwrite", "--sheet", "--preview", "--debug",
    ]  # fmt: skip
    for option in options:
        assert re.search(rf"^  {option}\b", text, re.MULTILINE), option


def test_a_wrong_flag_is_refused_within_a_second_of_computing(here):
    """Beyond what importing torch takes: the weights are not touched."""
    begun = time.process_time()
    assert main(["txt2img", "x", "--ckpt", "tiny.safetensors", "--steps", "0"]) == 2
    assert time.process_time() - begun < 1
