"""Micro-batches: functions of their number, whatever was asked for before, with bad pictures and a prior too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import ArgumentError, FileError
from ldm.model import LatentDiffusion
from ldm.train.data.batch import Batch
from ldm.train.data.examples import Examples
from ldm.train.data.opening import missing_prior
from ldm.train.data.plan import Plan
from ldm.train.recipe import Data, Run
from tests.made.families import TINY, build
from tests.made.pictures import captioned, picture, png, shard

RUN = Run(micro=2)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build()


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(7):
        captioned(tmp_path / f"photos/{i}.png", f"{i}\n{i} said otherwise", seed=i, size=(32 + i, 40))
    return tmp_path / "photos"


def same(a: Batch, b: Batch) -> bool:
    return (a.index, a.captions, a.sizes, a.size) == (b.index, b.captions, b.sizes, b.size) and torch.equal(
        a.image, b.image
    )


def shown(batch: Batch) -> list[str]:
    return [caption[0] for caption in batch.captions]


def test_a_micro_batch_depends_on_its_number_alone(photos, model):
    data = Data(path=str(photos), flip=True, crop="random")
    straight = [Examples(data, RUN, model).micro(0)]
    straight = [(examples := Examples(data, RUN, model)).micro(n) for n in range(9)]
    second_rank, backwards = Examples(data, RUN, model), Examples(data, RUN, model)
    assert all(same(second_rank.micro(n), straight[n]) for n in range(1, 9, 2))
    assert all(same(backwards.micro(n), straight[n]) for n in (8, 3, 3, 0, 7))
    assert [batch.index for batch in straight[:3]] == [(0, 1), (2, 3), (4, 5)]
    assert len(examples) == 8
    assert {name for batch in straight[:4] for name in shown(batch)} == set("0123456")
    other = Examples(data, replace(RUN, seed=1), model)
    assert not all(same(other.micro(n), straight[n]) for n in range(4))


def test_a_batch_holds_what_the_file_shows(tmp_path, model):
    captioned(tmp_path / "a.png", "a", size=(32, 32))
    batch = Examples(Data(path=str(tmp_path)), Run(micro=1), model).micro(0)
    levels = ((batch.image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(levels, Image.open(tmp_path / "a.png"))
    assert batch.size == (32, 32)
    assert torch.equal(batch.weight, torch.ones(1))
    assert batch.moments is batch.context is batch.pooled is batch.depth is None


def test_captions_cuts_and_mirrors_are_drawn_for_every_example(photos, model):
    data = Data(path=str(photos), flip=True, crop="random")
    batches = [Examples(data, RUN, model).micro(n) for n in range(12)]
    assert 0.2 < sum("otherwise" in c for b in batches for c in b.captions) / 24 < 0.8
    assert len({s.crop for b in batches for s in b.sizes}) > 3
    plain = Examples(replace(data, flip=False, crop="center"), RUN, model)
    assert {s.crop for n in range(12) for s in plain.micro(n).sizes} <= {(0, n // 2) for n in range(9)}


def test_mirrored_examples_are_mirror_images(tmp_path, model):
    for i in range(3):
        captioned(tmp_path / f"{i}.png", "x", seed=i, size=(32, 32))
    data, run = Data(path=str(tmp_path)), replace(RUN, micro=1)
    plain, flipped = Examples(data, run, model), Examples(replace(data, flip=True), run, model)
    pairs = [(plain.micro(n).image, flipped.micro(n).image) for n in range(20)]
    kept = [torch.equal(a, b) for a, b in pairs]
    assert 3 <= sum(kept) <= 17
    assert all(same or torch.equal(a.flip(3), b) for same, (a, b) in zip(kept, pairs, strict=True))


def test_buckets_put_pictures_of_one_shape_together(tmp_path, model):
    for i, size in enumerate([(32, 32), (30, 31), (24, 40), (40, 24), (41, 24)]):
        captioned(tmp_path / f"{i}.png", f"{i}", seed=i, size=size)
    examples = Examples(Data(path=str(tmp_path), buckets=True, bucket_step=8), RUN, model)
    assert examples.facts["buckets"] == {"24x40": 1, "32x32": 2, "40x24": 2}
    batches = [examples.micro(n) for n in range(3)]
    assert {batch.size: sorted(shown(batch)) for batch in batches} == {
        (32, 32): ["0", "1"],
        (24, 40): ["2", "2"],
        (40, 24): ["3", "4"],
    }
    assert all(batch.image.shape == (2, 3, *batch.size) for batch in batches)
    assert all(sizes.target == batch.size for batch in batches for sizes in batch.sizes)


def test_shards_and_scenes_are_sources_too(tmp_path, model):
    shard(tmp_path / "0.tar", {"1.png": png(size=(32, 32)), "1.txt": "one"})
    assert Examples(Data(source="shards", path=str(tmp_path / "*.tar")), RUN, model).micro(0).captions == ("one", "one")
    assert Examples(Data(source="scenes", scenes=3), RUN, model).micro(0).image.shape == (2, 3, 32, 32)


# --- what is held out -----------------------------------------------------------------------------------------------


def test_what_is_held_out_is_never_learnt_from_and_always_the_same(photos, model):
    data = Data(path=str(photos), held_out=0.3, flip=True, crop="random")
    examples = Examples(data, RUN, model)
    held = examples.held_out(16)
    names = {name for batch in held for name in shown(batch)}
    assert len(names) == 3 == examples.facts["held_out"]
    assert sorted(i for batch in held for i in batch.index) == [-3, -2, -1]
    assert not names & {name for n in range(8) for name in shown(examples.micro(n))}
    assert all("otherwise" not in caption for batch in held for caption in batch.captions)
    again = Examples(replace(data, flip=False, crop="center"), replace(RUN, seed=5), model).held_out(16)
    assert all(same(a, b) for a, b in zip(held, again, strict=True))
    assert [len(batch.index) for batch in examples.held_out(1)] == [1]
    assert examples.held_out(0) == [] == Examples(replace(data, held_out=0.0), RUN, model).held_out(9)
    with pytest.raises(FileError, match="leaves none of 7 pictures"):
        Examples(replace(data, held_out=0.99), RUN, model)


# --- bad pictures ---------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_a_picture_that_turns_out_damaged_gives_its_place_to_the_next(photos, model):
    data = Data(path=str(photos), bad_limit=0.3)
    whole = [Examples(data, RUN, model).micro(n) for n in range(8)]
    cut(photos / "3.png")
    examples = Examples(data, RUN, model)
    assert examples.bad == []
    batches = [examples.micro(n) for n in range(8)]
    assert [(bad.id, bad.why) for bad in examples.bad] == [("3.png", "is damaged or cut short; get it again")]
    expected = [["4" if name == "3" else name for name in shown(batch)] for batch in whole]
    assert [shown(batch) for batch in batches] == expected
    assert [batch.index for batch in batches] == [batch.index for batch in whole]
    late = Examples(data, RUN, model)
    assert same(late.micro(7), batches[7])


def test_more_bad_pictures_than_allowed_stop_the_run_with_the_first(photos, model):
    for i in (2, 5):
        cut(photos / f"{i}.png")
    examples = Examples(Data(path=str(photos), bad_limit=0.2), RUN, model)
    with pytest.raises(
        FileError, match=r"2 of 7 pictures cannot be used, more than data.bad_limit allows: [25].png is damaged"
    ):
        _ = [examples.micro(n) for n in range(4)]
    (photos / "0.txt").unlink()
    with pytest.raises(FileError, match=r"1 of 7 .* 0.png has no caption"):
        Examples(Data(path=str(photos)), RUN, model)


def test_a_picture_that_has_another_size_than_when_it_was_listed_is_not_stretched(photos, model):
    examples = Examples(Data(path=str(photos), bad_limit=0.3), RUN, model)
    picture(photos / "3.png", seed=3, size=(40, 35))
    for n in range(8):
        examples.micro(n)
    assert [(bad.id, bad.why) for bad in examples.bad] == [
        ("3.png", "is 35x40 pixels and was 40x35 when it was listed")
    ]


def test_when_no_picture_of_a_shape_is_left_the_run_ends(photos, model):
    examples = Examples(Data(path=str(photos), bad_limit=1.0), RUN, model)
    for path in photos.glob("*.png"):
        cut(path)
    with pytest.raises(FileError, match="none of the 7 pictures of 32x32 pixels can be read any more"):
        examples.micro(0)


def test_a_picture_of_less_than_half_the_size_is_left_out(photos, model):
    captioned(photos / "small.png", "small", size=(15, 40))
    captioned(photos / "enough.png", "enough", size=(16, 40))
    examples = Examples(Data(path=str(photos), bad_limit=0.2), RUN, model)
    assert [(bad.id, bad.why) for bad in examples.bad] == [
        ("small.png", "is 40x15 pixels, less than half of 32x32; give a larger one, or a smaller data.size")
    ]
    with pytest.raises(FileError, match=r"no picture is left to learn from: .* less than half of 96x96"):
        Examples(Data(path=str(photos), size=96), RUN, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, "data.path: is not given"),
        ({"size": 36}, "must be multiples of 8"),
        ({"buckets": True, "bucket_step": 12}, "must be multiples of 8"),
        ({"buckets": True, "bucket_step": 64}, "leaves no bucket"),
        ({"source": "shards", "path": ""}, "data.path: is not given"),
    ],
)
def test_keys_that_cannot_be_honoured_are_refused(photos, model, change, message):
    with pytest.raises(ArgumentError, match=message):
        Examples(replace(Data(path=str(photos)), **change), RUN, model)


# --- facts ----------------------------------------------------------------------------------------------------------


def test_facts_change_with_the_data_and_with_nothing_else(photos, model):
    data = Data(path=str(photos), bad_limit=0.5)
    facts = Examples(data, RUN, model).facts
    assert facts == Examples(data, replace(RUN, seed=3), model).facts
    assert facts.keys() == {"hash", "pictures", "prior", "held_out", "buckets"}
    hashes = {facts["hash"]}
    picture(photos / "0.png", seed=50, size=(32, 40))
    hashes.add(Examples(data, RUN, model).facts["hash"])
    (photos / "1.txt").write_text("else")
    hashes.add(Examples(data, RUN, model).facts["hash"])
    hashes.add(Examples(replace(data, size=24), RUN, model).facts["hash"])
    (photos / "2.png").rename(photos / "2b.png")
    (photos / "2.txt").rename(photos / "2b.txt")
    hashes.add(Examples(data, RUN, model).facts["hash"])
    assert len(hashes) == 5


# --- prior preservation ---------------------------------------------------------------------------------------------


def test_instance_and_prior_pictures_take_turns_with_their_weights(photos, model, tmp_path):
    for i in range(3):
        picture(tmp_path / f"class/{i}.png", seed=i, size=(32, 32))
    data = Data(
        path=str(photos),
        caption="a photo of sks dog",
        prior=str(tmp_path / "class"),
        prior_caption="a photo of a dog",
        prior_pictures=3,
        prior_weight=0.5,
    )
    examples = Examples(data, RUN, model)
    batches = [examples.micro(n) for n in range(8)]
    assert [set(batch.captions) for batch in batches] == [{"a photo of sks dog"}, {"a photo of a dog"}] * 4
    assert [batch.weight.tolist() for batch in batches] == [[1.0, 1.0], [0.5, 0.5]] * 4
    assert [batch.index for batch in batches[:2]] == [(0, 1), (2, 3)]
    assert examples.facts["prior"] == 3
    assert len(examples) == 8 + 4
    alone = Examples(Data(path=str(photos), caption="x"), RUN, model)
    assert torch.equal(batches[4].image, alone.micro(2).image)


def test_prior_pictures_with_captions_of_their_own_keep_them(photos, model, tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / f"class/{name}.png", size=(32, 32))
    lines = [f'{{"file_name": "{name}.png", "text": "a {name}"}}' for name in ("cat", "dog")]
    (tmp_path / "class" / "metadata.jsonl").write_text("\n".join(lines))
    data = Data(
        path=str(photos), caption="x", prior=str(tmp_path / "class"), prior_caption="an animal", prior_pictures=2
    )
    assert set(Examples(data, RUN, model).micro(1).captions) == {"a cat", "a dog"}


def test_missing_prior_pictures_are_counted_for_whoever_makes_them(photos, model, tmp_path):
    data = Data(path=str(photos), caption="x", prior=str(tmp_path / "class"), prior_caption="a dog", prior_pictures=2)
    assert missing_prior(Data()) == 0
    assert missing_prior(data) == 2
    picture(tmp_path / "class/a.png", size=(32, 32))
    assert missing_prior(data) == 1
    with pytest.raises(ArgumentError, match="lacks 1 of 2 pictures"):
        Examples(data, RUN, model)
    picture(tmp_path / "class/b.png", size=(32, 32))
    picture(tmp_path / "class/c.png", size=(32, 32))
    assert missing_prior(data) == 0


def test_prior_pictures_may_not_lie_among_the_others(tmp_path):
    with pytest.raises(ArgumentError, match="lies in data"):
        missing_prior(Data(path=str(tmp_path), prior=str(tmp_path / "class"), prior_caption="a dog", prior_pictures=2))


# --- inputs of other families ---------------------------------------------------------------------------------------


def test_depth_maps_are_framed_with_their_pictures(model, tmp_path):
    told = build(replace(TINY, unet=replace(TINY.unet, in_channels=5), concat=("depth",)))
    for i in range(3):
        captioned(tmp_path / f"{i}.png", "x", seed=i, size=(32, 44))  # as high as asked, so that nothing is scaled
    assert Examples(Data(path=str(tmp_path)), RUN, told).micro(0).depth is None
    (tmp_path / "depth").mkdir()
    for i in range(3):
        Image.open(tmp_path / f"{i}.png").convert("L").save(tmp_path / f"depth/{i}.png")
    data = Data(path=str(tmp_path), crop="random", flip=True)
    batch = Examples(data, RUN, told).micro(0)
    assert batch.depth.shape == (2, 1, 32, 32)
    grey = (batch.image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert (batch.depth - grey).abs().max() < 1.1 / 127.5  # rounded to levels once
    assert Examples(data, RUN, model).micro(0).depth is None


def test_depth_maps_of_another_size_are_scaled_with_their_picture(model, tmp_path):
    told = build(replace(TINY, unet=replace(TINY.unet, in_channels=5), concat=("depth",)))
    captioned(tmp_path / "a.png", "x", size=(32, 44))
    ramp = Image.fromarray(np.tile(np.arange(0, 220, 10, dtype=np.uint8), (16, 1)))
    (tmp_path / "depth").mkdir()
    ramp.save(tmp_path / "depth/a.png")
    depth = Examples(Data(path=str(tmp_path)), Run(micro=1), told).micro(0).depth[0, 0]
    assert (depth.diff(dim=1) >= 0).all()
    assert depth[:, 0].mean().item() == pytest.approx(30 / 127.5 - 1, abs=10 / 127.5)
    assert depth[:, -1].mean().item() == pytest.approx(190 / 127.5 - 1, abs=10 / 127.5)


def test_how_many_pictures_of_one_size_are_seen_at_once_changes_nothing() -> None:
    streams = []
    for micro in (1, 2, 4, 6):
        plan = Plan([range(7)], micro, seed=3)
        streams.append([i for number in range(24 // micro) for i in plan.items(number)])
    assert streams[0] == streams[1] == streams[2] == streams[3]
    assert sorted(streams[0][:7]) == sorted(streams[0][7:14]) == list(range(7)), "every pass has all"
    assert streams[0][:7] != streams[0][7:14]
    back = Plan([range(7)], 2, seed=3)
    assert [back.items(n) for n in (11, 0, 5)] == [tuple(streams[0][2 * n : 2 * n + 2]) for n in (11, 0, 5)]
