"""Every task from the command line, on a tiny checkpoint of each family that it is for, and on the model that ships."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import weights
from ldm import blocks, tasks
from ldm.conditioning.cond import Sizes
from ldm.model import LatentDiffusion
from ldm.pictures.read import open_image, read_metadata
from tests.made.families import build, tiny

QUICK = {"seeds": [7], "steps": 2, "weighting": True}
SHIPPED = "--seed 7 --steps 6 --cfg 3 --dtype float32"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family, written when first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def path(family: str) -> Path:
        file = folder / f"{family}.safetensors"
        return file if file.exists() else weights.save(build(tiny(family)), file)

    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a photo, a mask of its left half, a depth map and the photo with a transparent top."""
    monkeypatch.chdir(tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8))
    photo.save("photo.png")
    mask = Image.new("L", photo.size)
    mask.paste(255, (0, 0, 20, 32))
    mask.save("mask.png")
    mask.rotate(90, expand=True).resize(photo.size).save("depth.png")
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.linspace(0, 255, 32, dtype=np.uint8)[:, None], 40, axis=1)))
    clear.save("clear.png")
    return tmp_path


def same(path: str, image: Image.Image) -> bool:
    return np.array_equal(open_image(path), image)


Drawn = Callable[[LatentDiffusion, Image.Image], list[Image.Image]]


def left_half(photo: Image.Image) -> Image.Image:
    return Image.fromarray(np.where(np.arange(photo.width) < 20, 255, 0).astype(np.uint8)[None].repeat(photo.height, 0))


TASKS: dict[str, tuple[str, str, Drawn]] = {  # a name -> the family, the command line, the same in Python
    "txt2img sd1": ("sd1", "txt2img 'a (cat:1.4)'", lambda m, p: tasks.txt2img(m, "a (cat:1.4)", **QUICK)),
    "txt2img sd2": ("sd2-base", "txt2img 'a cat' --negative ''",
        lambda m, p: tasks.txt2img(m, "a cat", negative="", **QUICK)),
    "txt2img sd2-v": ("sd2-v", "txt2img 'a (cat:1.4)' --no-weighting",
        lambda m, p: tasks.txt2img(m, "a (cat:1.4)", **QUICK | {"weighting": False})),
    "txt2img sdxl": (
        "sdxl-base", "txt2img 'a cat' --original-size 48x24 --crop 1,2 --target-size 96x64",
        lambda m, p: tasks.txt2img(m, "a cat", sizes=Sizes((24, 48), (1, 2), (64, 96)), **QUICK),
    ),
    "txt2img ssd-1b": ("ssd-1b", "txt2img 'a cat' --negative dog",
        lambda m, p: tasks.txt2img(m, "a cat", negative="dog", **QUICK)),
    "txt2img --hires": ("sd1", "txt2img 'a cat' --hires 1.5x --strength 0.9",
        lambda m, p: tasks.hires(m, "a cat", scale=1.5, strength=0.9, **QUICK)),
    "hires pixel": ("sdxl-base", "hires 'a cat'", lambda m, p: tasks.hires(m, "a cat", scale=2, **QUICK)),
    "hires latent": ("sd1", "hires 'a cat' --scale 2 --enlarge latent --width 24",
        lambda m, p: tasks.hires(m, "a cat", enlarge="latent", width=24, **QUICK)),
    "img2img": ("sd2-base", "img2img 'a cat' --init photo.png --strength 0.5",
        lambda m, p: tasks.img2img(m, p, "a cat", strength=0.5, **QUICK)),
    "img2img refiner": (
        "sdxl-refiner", "img2img 'a cat' --init photo.png --aesthetic 8 --negative-aesthetic 1",
        lambda m, p: tasks.img2img(m, p, "a cat", sizes=Sizes(aesthetic=8, negative_aesthetic=1), **QUICK),
    ),
    "inpaint": ("sd1", "inpaint 'a cat' --init photo.png --mask mask.png",
        lambda m, p: tasks.inpaint(m, p, left_half(p), "a cat", **QUICK)),
    "inpaint 9 channels": (
        "sd1-inpainting", "inpaint 'a cat' --init photo.png --mask mask.png --feather 3 --strength 0.9",
        lambda m, p: tasks.inpaint(m, p, left_half(p), "a cat", feather=3, strength=0.9, **QUICK),
    ),
    "inpaint sd2": ("sd2-inpainting", "inpaint 'a cat' --init photo.png --mask mask.png --width 56",
        lambda m, p: tasks.inpaint(m, p, left_half(p), "a cat", width=56, **QUICK)),
    "inpaint sdxl": ("sdxl-inpainting", "inpaint 'a cat' --init photo.png --mask mask.png",
        lambda m, p: tasks.inpaint(m, p, left_half(p), "a cat", **QUICK)),
    "outpaint": (
        "sd1", "outpaint 'a cat' --init photo.png --extend left=8 --extend bottom=5 --feather 2",
        lambda m, p: tasks.outpaint(m, p, {"left": 8, "bottom": 5}, "a cat", feather=2, **QUICK),
    ),
    "outpaint 9 channels": ("sd2-inpainting", "outpaint 'a cat' --init photo.png --extend top=16",
        lambda m, p: tasks.outpaint(m, p, {"top": 16}, "a cat", **QUICK)),
    "depth2img": ("sd2-depth", "depth2img 'a cat' --init photo.png",
        lambda m, p: tasks.depth2img(m, p, "a cat", **QUICK)),
    "depth2img map": (
        "sd2-depth", "depth2img 'a cat' --init photo.png --depth depth.png --strength 1",
        lambda m, p: tasks.depth2img(m, p, "a cat", depth=open_image("depth.png"), strength=1, **QUICK),
    ),
    "upscale": ("x4-upscaler", "upscale '' --init photo.png --noise-level 100",
        lambda m, p: tasks.upscale(m, p, "", noise_level=100, **QUICK)),
    "variations": ("sd-image-variations", "variations --init photo.png",
        lambda m, p: tasks.variations(m, p, cfg=3.0, seeds=[7], steps=2)),
    "variations original": (
        "sd-image-variations", "variations --init photo.png --preprocessing original --cfg 2 --height 24",
        lambda m, p: tasks.variations(m, p, preprocessing="original", cfg=2.0, height=24, seeds=[7], steps=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_command_writes_the_picture_of_the_python_function(name, here, ldm, models):
    family, line, drawn = TASKS[name]
    code, lines, errors = ldm(f"{line} --ckpt {models(family)} --steps 2 --seed 7 --dtype float32 --no-fast")
    assert (code, lines, errors) == (0, ["outputs/00001.png"], [])
    (image,) = drawn(weights.load(models(family)), open_image("photo.png"))
    assert same("outputs/00001.png", image)
    facts = read_metadata("outputs/00001.png")
    assert (facts["task"], facts["family"], facts["seed"]) == (line.split()[0], family, "7")


def test_what_is_not_in_the_mask_stays_to_the_last_bit(here, ldm, models):
    ldm(f"inpaint 'a cat' --init photo.png --mask mask.png --ckpt {models('sd1')} --steps 2 --seed 7")
    photo, painted = np.asarray(open_image("photo.png")), np.asarray(open_image("outputs/00001.png"))
    assert np.array_equal(painted[:, 20:], photo[:, 20:])
    assert np.mean(painted[:, :20] != photo[:, :20]) > 0.9


def test_the_transparent_part_of_a_picture_can_be_its_mask(here, ldm, models):
    code, _, errors = ldm(
        f"inpaint 'a cat' --init clear.png --mask-from alpha --ckpt {models('sd1')} --steps 2 --seed 7"
    )
    assert (code, errors) == (0, [])
    photo, painted = np.asarray(open_image("clear.png")), np.asarray(open_image("outputs/00001.png"))
    changed = np.mean(painted != photo, axis=(1, 2)) > 0.5
    assert changed.tolist() == [True] * 16 + [False] * 16  # alpha rises from 0 to 255 over 32 rows
    assert np.array_equal(painted[16:], photo[16:])
    ldm(
        f"inpaint 'a cat' --init photo.png --mask clear.png --mask-from alpha --ckpt {models('sd1')} --steps 2 --seed 7"
    )
    assert np.array_equal(np.asarray(open_image("outputs/00002.png"))[16:], np.asarray(open_image("photo.png"))[16:])


def test_the_refiner_takes_over_or_redraws(here, ldm, models):
    base, refiner = models("sdxl-base"), models("sdxl-refiner")
    common = f"txt2img 'a cat' --ckpt {base} --refiner {refiner} --steps 6 --seed 7 --dtype float32 --no-fast"
    assert ldm(common)[0] == ldm(f"{common} --refine-from 0.5")[0] == ldm(f"{common} --refine-strength 0.4")[0] == 0
    both, options = (weights.load(base), weights.load(refiner)), QUICK | {"steps": 6}
    for number, keywords in enumerate(({}, {"refine_from": 0.5}, {"refine_strength": 0.4}), 1):
        (image,) = tasks.txt2img(both[0], "a cat", refiner=both[1], **keywords, **options)
        assert same(f"outputs/0000{number}.png", image)
    facts = read_metadata("outputs/00003.png")
    assert (facts["refiner"], facts["refine_strength"]) == ("sdxl-refiner.safetensors", "0.4")
    assert "refine_from" not in facts
    assert read_metadata("outputs/00002.png")["refine_from"] == "0.5"


def test_interpolate_writes_frames_and_an_animation(here, ldm, models):
    code, lines, errors = ldm(
        f"interpolate 'a cat' 'a dog' --seeds 7 --frames 4 --ckpt {models('sd1')} --steps 2 --dtype float32 --no-fast "
        "--fps 5"
    )
    assert (code, errors) == (0, [])
    assert lines == [*(f"outputs/0000{n}.png" for n in (1, 2, 3, 4)), "outputs/00001-animation.webp"]
    frames = tasks.interpolate(
        weights.load(models("sd1")), ["a cat", "a dog"], seeds=[7], frames=4, steps=2, weighting=True, batch=1
    )
    assert all(same(f"outputs/0000{n}.png", frame) for n, frame in enumerate(frames, 1))
    facts = read_metadata("outputs/00003.png")
    assert (facts["prompt"], facts["seed"], facts["frame"]) == ("a cat\na dog", "7", "3 of 4")
    with Image.open("outputs/00001-animation.webp") as animation:
        assert (animation.n_frames, animation.size) == (4, (32, 32))
        animation.seek(1)
        animation.load()
        assert animation.info["duration"] == 200


def test_interpolate_goes_from_seed_to_seed_into_a_named_gif(here, ldm, models):
    line = (
        f"interpolate 'a cat' --seeds 1,2,3 --frames 5 --batch 2 --animation gif --out way.png --ckpt "
        f"{models('sd1')} --steps 1"
    )
    assert ldm(line)[1] == ["way.png", "way-2.png", "way-3.png", "way-4.png", "way-5.png", "way-animation.gif"]
    assert ldm(line)[1][-1] == "way-animation-2.gif"
    assert ldm(f"{line} --overwrite")[1][-1] == "way-animation.gif"
    with Image.open("way-animation.gif") as animation:
        assert animation.n_frames == 5


def test_interpolate_without_seeds_says_which_it_took(here, ldm, models):
    code, lines, errors = ldm(f"interpolate 'a cat' 'a dog' --frames 2 --ckpt {models('sd1')} --steps 1")
    assert code == 0
    assert errors[0] == f"ldm: seed {read_metadata(lines[0])['seed']}"


@pytest.mark.parametrize(
    ("family", "line", "message"),
    [
        ("sd1-inpainting", "txt2img x", "needs mask, masked_image: it is not for text alone; use inpaint"),
        ("sd1", "depth2img x --init photo.png", "takes no depth: use a depth model, or img2img"),
        ("sd1", "upscale x --init photo.png", "is no upscaler: use an x4 upscaler, or hires"),
        ("sd1", "variations --init photo.png", "takes text, not a picture"),
        ("sd1", "txt2img x --aesthetic 7", "takes no sizes; SDXL models do"),
        ("sd1", "txt2img x --refiner {sdxl-refiner}", "cannot go on with the latents of sd1"),
    ],
)
def test_a_model_for_another_task_is_refused_with_the_right_one(family, line, message, here, ldm, models):
    for name in ("sdxl-refiner",):
        line = line.replace(f"{{{name}}}", str(models(name)))
    code, lines, errors = ldm(f"{line} --ckpt {models(family)} --steps 2 --seed 7")
    assert (code, lines, len(errors)) == (2, [], 1)
    assert message in errors[0]


# --- on the model that ships ----------------------------------------------------------------------------------------


@pytest.fixture
def scene(here) -> np.ndarray:
    """A yellow sphere, as scene.png, with floor.png, a mask of the floor left of it."""
    picture = blocks.render(blocks.sample(3))
    Image.fromarray(picture).save("scene.png")
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[48:, :46] = 255
    Image.fromarray(mask).save("floor.png")
    return picture


def test_the_floor_of_a_scene_is_repainted_and_the_rest_is_not_touched(scene, ldm):
    code, _, errors = ldm(
        f"inpaint 'a red cube to the left of a yellow sphere' --init scene.png --mask floor.png --feather 4 {SHIPPED} "
        "--steps 8"
    )
    assert (code, errors) == (0, [])
    painted = np.asarray(open_image("outputs/00001.png"))
    kept = np.asarray(Image.open("floor.png")) == 0
    assert np.array_equal(painted[kept], scene[kept])
    assert np.mean(painted[~kept] != scene[~kept]) > 0.5
    red = painted[~kept].astype(int)
    assert np.mean((red[:, 0] > 120) & (red[:, 0] > 2 * red[:, 1])) > 0.1  # of the hole; it is about 0.2


def test_a_scene_goes_on_at_its_sides(scene, ldm):
    assert ldm(f"outpaint 'a red cube' --init scene.png --extend left=16 --extend right=16 {SHIPPED}")[0] == 0
    painted = np.asarray(open_image("outputs/00001.png"))
    assert painted.shape == (128, 160, 3)
    assert np.array_equal(painted[:, 16:144], scene)


def test_a_scene_of_twice_the_size_looks_like_the_small_one(here, ldm):
    ldm(f"txt2img 'a red cube' {SHIPPED}")
    assert ldm(f"hires 'a red cube' --scale 2x --strength 0.4 {SHIPPED}")[0] == 0
    small, large = (open_image(f"outputs/0000{n}.png") for n in (1, 2))
    assert large.size == (256, 256)
    shrunk = np.asarray(large.resize(small.size, Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(shrunk.ravel(), np.asarray(small).ravel())[0, 1] > 0.8


def test_a_way_between_scenes_begins_and_ends_with_them(here, ldm):
    assert (
        ldm(f"interpolate 'a red cube' 'a blue sphere' --seeds 7 --frames 3 {SHIPPED.replace('--seed 7', '')}")[0] == 0
    )
    ldm(f"txt2img 'a red cube' {SHIPPED}")
    ldm(f"txt2img 'a blue sphere' {SHIPPED}")
    assert same("outputs/00004.png", open_image("outputs/00001.png"))
    assert same("outputs/00005.png", open_image("outputs/00003.png"))
    assert sorted(os.listdir("outputs"))[0] == "00001-animation.webp"
