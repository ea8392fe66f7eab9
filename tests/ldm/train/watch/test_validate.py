"""Validation: a loss that can be compared between steps and runs, and pictures of every family."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.models.seeded import normal
from ldm.conditioning.cond import Sizes
from ldm.errors import ArgumentError, OutputError
from ldm.images import from_pil, to_pil
from ldm.pictures.read import read_metadata
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.recipe import Objective, Watch
from ldm.train.tasks import Autoencoding, Diffusion, Loss
from ldm.train.watch.validate import save_pictures, validation_loss, validation_pictures
from tests.made.families import build, tiny

WATCH = Watch(timesteps=2, pictures=3, prompts=("a red cube", "a blue ball"), steps=2, cfg=2.0)


def held_out(n: int, start: int = 0, **more) -> Batch:
    image = normal("held out", (8, 3, 32, 32)).clamp(-1, 1)[start : start + n]
    return Batch(
        tuple(range(n)), ("a red cube",) * n, (32, 32), (Sizes(),) * n, torch.ones(n), **{"image": image} | more
    )


class Recorder(nn.Module):
    """A task whose loss is the timestep, and which remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked: list[tuple[int, int, float]] = []

    def at(self, batch: Batch, draws: Draws, t: Tensor) -> Loss:
        assert not torch.is_grad_enabled()
        assert all(i < 0 for i in draws.index), "training's own draws"
        self.asked += zip([len(batch.index)] * len(t), t.tolist(), draws.normal("noise", ()).tolist(), strict=True)
        return Loss(t.float() * batch.weight, t, 1000)


def test_the_loss_is_a_mean_over_the_first_pictures_and_the_middles_of_equal_parts_of_the_schedule():
    task = Recorder()
    result = validation_loss(task, [held_out(2), held_out(2, 2), held_out(2, 4)], WATCH, 1000)
    assert result == {"validation_loss": 500.0, "validation_levels": [[250, 250.0], [750, 750.0]]}
    assert [(n, t) for n, t, _ in task.asked] == [(2, 250), (2, 250), (2, 750), (2, 750), (1, 250), (1, 750)]
    assert len({noise for *_, noise in task.asked}) == 6


def test_noise_depends_on_picture_and_level_alone_not_on_batches_or_the_run():
    noises = []
    for batches, watch in [
        ([held_out(3)], WATCH),
        ([held_out(1), held_out(2, 1)], WATCH),
        ([held_out(3)], replace(WATCH, timesteps=6)),
        ([held_out(3)], replace(WATCH, seed=1)),
    ]:
        task = Recorder()
        validation_loss(task, batches, watch, 1000)
        noises.append({noise for _, t, noise in task.asked if t in (250, 750)})
    assert noises[0] == noises[1]
    assert noises[0] == noises[2]
    assert not noises[0] & noises[3]


def test_a_task_without_levels_is_asked_once():
    task = Recorder()
    assert validation_loss(task, [held_out(1)], WATCH, 1)["validation_levels"] == [[0, 0.0]]
    assert len(task.asked) == 1


@pytest.mark.parametrize(("batches", "pictures"), [([], 3), ([held_out(2)], 0)])
def test_without_pictures_there_is_no_loss(batches, pictures):
    assert validation_loss(Recorder(), batches, replace(WATCH, pictures=pictures), 1000) == {}


def test_the_tasks_are_validated_and_the_same_twice():
    model = build(tiny("sd1"))
    task = Diffusion(model, Objective())
    first = validation_loss(task, [held_out(2)], WATCH, 1000)
    torch.rand(1)
    assert validation_loss(task, [held_out(2)], WATCH, 1000) == first
    assert [t for t, _ in first["validation_levels"]] == [250, 750]
    assert validation_loss(Autoencoding(model.vae, 1e-6), [held_out(2)], WATCH, 1)["validation_loss"] > 0


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "count"),
    [("sd1", 2), ("sdxl-base", 2), ("sd1-inpainting", 2), ("sd2-depth", 2), ("sd-image-variations", 4)],
)
def test_every_family_makes_its_pictures_and_again_the_same(family, count):
    model = build(tiny(family))
    pictures = validation_pictures(model, WATCH, 0, [held_out(2)])
    assert [picture.size for picture in pictures] == [(32, 32)] * count
    assert len({picture.tobytes() for picture in pictures}) == count
    assert [picture.tobytes() for picture in validation_pictures(model, WATCH, 0, [held_out(2)])] == [
        picture.tobytes() for picture in pictures
    ]


def test_inpainting_keeps_what_is_around_the_middle():
    picture = from_pil(validation_pictures(build(tiny("sd1-inpainting")), WATCH, 0, [held_out(1)])[0])
    changed = (picture - from_pil(to_pil(held_out(1).image))).abs().amax(dim=(0, 1)) > 0
    rows, columns = changed.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 23, 8, 23)


def test_a_depth_map_takes_the_place_of_the_depth_network():
    model = build(tiny("sd2-depth"))
    model.depth = None
    near, far = (
        validation_pictures(model, WATCH, 0, [held_out(1, depth=depth)])
        for depth in (normal("near", (1, 1, 32, 32)), normal("far", (1, 1, 32, 32)))
    )
    assert near[0].tobytes() != far[0].tobytes()
    with pytest.raises(ArgumentError, match="holds no depth network"):
        validation_pictures(model, WATCH, 0, [held_out(1)])


def test_a_cached_latent_is_decoded_where_the_picture_is_not_kept():
    model = build(tiny("sd-image-variations"))
    with torch.no_grad():
        moments = model.vae.moments(held_out(1).image)
        seen = model.vae.decode(model.vae.latent(moments))
    cached = validation_pictures(model, WATCH, 0, [held_out(1, image=None, moments=moments)])
    rounded = from_pil(to_pil(seen))
    assert [p.tobytes() for p in cached] == [
        p.tobytes() for p in validation_pictures(model, WATCH, 0, [held_out(1, image=rounded)])
    ]


def test_size_seed_and_negative_prompt_are_the_recipes():
    model = build(tiny("sd1"))

    def made(size: int = 0, **watch) -> list[bytes]:
        pictures = validation_pictures(model, replace(WATCH, **watch), size)
        assert {picture.size for picture in pictures} == {(size or 32,) * 2}
        return [picture.tobytes() for picture in pictures]

    same = {"prompts": ("a red cube",) * 2}
    assert made(**same)[1] == made(**same, seed=1)[0]
    assert made(negative="blue")[0] != made()[0]
    made(size=48)


def test_nothing_is_drawn_without_prompts_and_a_model_that_needs_a_picture_says_so():
    assert validation_pictures(build(tiny("sd1")), replace(WATCH, prompts=()), 0) == []
    with pytest.raises(ArgumentError, match=r"family sd1-inpainting needs a picture; set data.held_out above 0"):
        validation_pictures(build(tiny("sd1-inpainting")), WATCH, 0)


def test_pictures_are_saved_under_their_step_with_their_prompts(tmp_path):
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for _ in range(2):  # a resumed run writes them again
        paths = save_pictures(pictures, WATCH, tmp_path, 500)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "validation/step-000500/00.png",
        "validation/step-000500/01.png",
    ]
    assert read_metadata(paths[1]) == {"prompt": "a blue ball", "step": "500"}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="validation pictures cannot be written"):
        save_pictures(pictures, WATCH, tmp_path / "file", 500)
