"""Kept tensors: whole files or none, nothing stale, and the same as what they were made from."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.conditioning.prompts import encode_text
from ldm.errors import ArgumentError, FileError, OutputError
from ldm.model import LatentDiffusion
from ldm.train.data import encoded
from ldm.train.data.cache import Cache, weights_digest
from ldm.train.data.examples import Examples
from ldm.train.recipe import Data, Run
from tests.made.families import TINY, build
from tests.made.pictures import captioned

RUN = Run(micro=2)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build()


@pytest.fixture
def photos(tmp_path) -> Data:
    for i, size in enumerate([(32, 32), (40, 32), (32, 50)]):
        captioned(tmp_path / f"photos/{i}.png", f"number {i}", seed=i, size=size)
    return Data(path=str(tmp_path / "photos"), cache_latents=True, cache_text=True, flip=True)


def filled(data: Data, model: LatentDiffusion, cache: Path) -> tuple[Examples, list[tuple[str, int, int]]]:
    told: list[tuple[str, int, int]] = []
    examples = Examples(data, RUN, model, cache=cache)
    examples.encode(on_progress=lambda *what: told.append(what))
    return examples, told


def names(directory: Path, kind: str) -> set[str]:
    return {name for piece in directory.glob(f"{kind}-*") for name in Cache(directory, kind)._pieces[piece]}


# --- the files ------------------------------------------------------------------------------------------------------


def test_what_is_put_is_there_for_whoever_looks_later(tmp_path):
    cache, other = Cache(tmp_path / "new", "x"), Cache(tmp_path / "new", "x")
    cache.put({"a": torch.arange(3.0), "b": torch.ones(2, 2)[:, 1]})
    assert "a" in cache
    assert "a" not in other
    assert torch.equal(other.get("a"), torch.arange(3.0))
    assert torch.equal(other.get("b"), torch.ones(2))
    with pytest.raises(KeyError):
        other.get("c")
    assert "a" not in Cache(tmp_path / "new", "y")


def test_only_what_is_asked_for_is_kept(tmp_path):
    cache = Cache(tmp_path, "x")
    cache.put({"a": torch.zeros(1), "b": torch.ones(1)})
    cache.put({"c": torch.ones(1)})
    cache.keep(["b"])
    assert names(tmp_path, "x") == {"b"}
    assert torch.equal(Cache(tmp_path, "x").get("b"), torch.ones(1))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_piece_counts_as_nothing_and_is_removed(tmp_path):
    Cache(tmp_path, "x").put({"a": torch.zeros(50)})
    (piece,) = tmp_path.iterdir()
    piece.write_bytes(piece.read_bytes()[:-60])
    cache = Cache(tmp_path, "x")
    assert "a" not in cache
    cache.keep(["a"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    cache = Cache(tmp_path, "x")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="could not be written: No space left on device"):
        cache.put({"a": torch.zeros(1)})
    assert "a" not in cache
    assert not list(tmp_path.iterdir())


def test_a_digest_tells_names_types_shapes_and_values_apart():
    base = torch.nn.Linear(2, 3)
    same, turned, half, other = (torch.nn.Linear(2, 3) for _ in range(4))
    same.load_state_dict(base.state_dict())
    turned.load_state_dict(base.state_dict())
    turned.weight.data = turned.weight.data.view(2, 3)
    half.load_state_dict(base.state_dict())
    half.to(torch.bfloat16)
    assert weights_digest(base) == weights_digest(same)
    assert len({weights_digest(m) for m in (base, turned, half, other, torch.nn.Sequential(base))}) == 5


# --- what is in them ------------------------------------------------------------------------------------------------


def test_kept_latents_and_texts_are_those_of_the_model(photos, model, tmp_path):
    cached, told = filled(photos, model, tmp_path / "cache")
    assert told == [("captions", 3, 3), ("pictures", 6, 6)]
    plain = Examples(replace(photos, cache_latents=False, cache_text=False), RUN, model)
    for number in range(6):
        ours, theirs = cached.micro(number), plain.micro(number)
        assert ours.image is None
        assert theirs.moments is None is theirs.context
        assert (ours.index, ours.captions, ours.sizes) == (theirs.index, theirs.captions, theirs.sizes)
        alone = torch.cat([model.vae.moments(image[None]) for image in theirs.image])
        assert torch.equal(ours.moments, alone)
        context, pooled = zip(
            *(encode_text(model.text, [caption], chunks=1) for caption in theirs.captions), strict=True
        )
        assert torch.equal(ours.context, torch.cat(context))
        assert torch.equal(ours.pooled, torch.cat(pooled))


def test_what_is_held_out_is_kept_too_and_never_mirrored(photos, model, tmp_path):
    examples, told = filled(replace(photos, held_out=0.3), model, tmp_path / "cache")
    assert told[1] == ("pictures", 5, 5)
    (batch,) = examples.held_out(4)
    assert batch.moments.shape == (1, 8, 4, 4)
    assert batch.image is None


def test_nothing_is_encoded_twice(photos, model, tmp_path):
    filled(photos, model, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert filled(photos, model, tmp_path)[1] == []
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before


def test_a_picture_that_changes_is_encoded_anew_and_alone(photos, model, tmp_path):
    filled(photos, model, tmp_path / "cache")
    before = names(tmp_path / "cache", "latents")
    captioned(tmp_path / "photos/1.png", "number 1", seed=9, size=(40, 32))
    examples, told = filled(photos, model, tmp_path / "cache")
    assert told == [("pictures", 2, 2)]
    after = names(tmp_path / "cache", "latents")
    assert len(before & after) == 4
    assert len(after) == 6
    assert examples.micro(0).moments is not None


def test_a_caption_that_changes_is_encoded_anew_and_alone(photos, model, tmp_path):
    filled(photos, model, tmp_path / "cache")
    (tmp_path / "photos/1.txt").write_text("another")
    assert filled(photos, model, tmp_path / "cache")[1] == [("captions", 1, 1)]
    assert len(names(tmp_path / "cache", "text")) == 2 * 3


@pytest.mark.parametrize(
    ("network", "again"),
    [
        ("vae.encoder.conv_in", "pictures"),
        ("text.0.text_model.final_layer_norm", "captions"),
        ("vae.decoder.conv_in", None),
    ],
)
def test_a_model_that_changes_makes_everything_that_it_made_anew(photos, model, tmp_path, network, again):
    filled(photos, model, tmp_path / "cache")
    other = build()
    other.get_submodule(network).bias.data += 1
    _, told = filled(photos, other, tmp_path / "cache")
    assert {what for what, _, _ in told} == ({again} if again else set())
    assert len(names(tmp_path / "cache", "latents")) == 6


def test_a_pass_that_is_cut_off_keeps_what_it_has_written(photos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "PIECE", 2)

    def stop(what: str, done: int, total: int) -> None:
        if what == "pictures" and done == 4:
            raise KeyboardInterrupt

    examples = Examples(photos, RUN, model, cache=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        examples.encode(on_progress=stop)
    assert filled(photos, model, tmp_path / "cache")[1] == [("pictures", 2, 2)]


def test_ranks_share_the_work_and_see_each_others(photos, model, tmp_path):
    counts = []
    ranks = [Examples(photos, RUN, model, cache=tmp_path / "cache") for _ in range(2)]
    for rank, examples in enumerate(ranks):
        examples.encode(rank, 2, lambda what, done, total: counts.append((what, total)))
    assert counts == [("captions", 2), ("pictures", 3), ("captions", 1), ("pictures", 3)]
    for number in range(4):
        assert torch.equal(ranks[0].micro(number).moments, ranks[1].micro(number).moments)


def test_a_model_that_looks_at_pictures_gets_them_beside_their_latents(photos, tmp_path):
    inpainting = build(replace(TINY, unet=replace(TINY.unet, in_channels=9), concat=("mask", "masked_image")))
    batch = filled(photos, inpainting, tmp_path / "cache")[0].micro(0)
    assert batch.image.shape == (2, 3, 32, 32)
    assert batch.moments.shape == (2, 8, 4, 4)


def test_a_picture_that_turns_out_unreadable_is_replaced_and_listed(photos, model, tmp_path):
    path = tmp_path / "photos/1.png"
    path.write_bytes(path.read_bytes()[:-40])
    examples, _ = filled(replace(photos, bad_limit=0.5), model, tmp_path / "cache")
    assert [bad.id for bad in examples.bad] == ["1.png"]
    assert {caption for number in range(6) for caption in examples.micro(number).captions} == {"number 0", "number 2"}
    with pytest.raises(
        FileError, match=r"1 of 3 pictures cannot be used, more than data.bad_limit allows: 1.png is damaged"
    ):
        filled(photos, model, tmp_path / "cache")


def test_keys_that_do_not_go_together_are_refused(photos, model, tmp_path):
    with pytest.raises(ArgumentError, match="no directory"):
        Examples(photos, RUN, model)
    with pytest.raises(ArgumentError, match="centre crops only"):
        Examples(replace(photos, crop="random"), RUN, model, cache=tmp_path)
    with pytest.raises(ArgumentError, match="takes no text"):
        Examples(photos, RUN, build(replace(TINY, text=())), cache=tmp_path)


def test_asking_before_encoding_says_so(photos, model, tmp_path):
    with pytest.raises(ArgumentError, match="call encode before"):
        Examples(replace(photos, cache_latents=False), RUN, model, cache=tmp_path).micro(0)
    with pytest.raises(ArgumentError, match=r"picture [0-2]\.png is not in the cache; call encode before"):
        Examples(replace(photos, cache_text=False), RUN, model, cache=tmp_path).micro(0)
