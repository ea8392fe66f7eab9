"""Textual-inversion files in every published form, and what is said of other files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.models.golden import tiny_clip_l
from ldm.conditioning.prompts import Embedding, encode_text
from ldm.errors import FileError
from tests.made.checkpoints import pretended, save_safetensors, save_zip
from tests.made.words import FORMS, ONE, TWO, WIDE, a1111
from weights.adapters.embedding import load_embedding


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_gives_its_vectors_by_width(form, tmp_path):
    write, expected = FORMS[form]
    embedding = load_embedding(write(tmp_path))
    assert isinstance(embedding, Embedding)
    assert embedding.name == "seal"
    assert set(embedding.vectors) == set(expected)
    for width, vectors in expected.items():
        assert torch.equal(embedding.vectors[width], vectors)
        assert embedding.vectors[width].dtype == torch.float32


def test_it_may_be_given_another_name(tmp_path):
    assert (
        load_embedding(save_safetensors({"x": TWO}, tmp_path / "learned_embeds.safetensors"), "<seal>").name == "<seal>"
    )


@torch.no_grad()
def test_a_file_teaches_a_tower_its_word(tmp_path):
    towers = nn.ModuleList([tiny_clip_l()])
    learnt = load_embedding(save_zip(a1111(TWO), tmp_path / "seal.pt"))
    ours, _ = encode_text(towers, ["a seal"], embeddings=[learnt])
    assert torch.equal(ours, encode_text(towers, ["a seal"], embeddings=[Embedding("seal", {64: TWO})])[0])
    assert not torch.equal(ours, encode_text(towers, ["a seal"])[0])


def test_nothing_of_the_file_is_needed_after_it_was_read(tmp_path):
    path = save_safetensors({"x": TWO}, tmp_path / "seal.safetensors")
    embedding = load_embedding(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(embedding.vectors[64], TWO)


MANY = {f"model.diffusion_model.{i}.weight": ONE for i in range(11)}
OTHERS = {
    "a LoRA": ({"lora_unet_x.lora_up.weight": TWO, "lora_unet_x.lora_down.weight": TWO}, "is a LoRA .*use --lora"),
    "a LoRA of one tensor": ({"lora_unet_x.diff": TWO}, "is a LoRA"),
    "a model": (MANY, "has 11 tensors .*a model or a part of one, not an embedding; use --ckpt"),
    "two words": ({"<a>": TWO, "<b>": TWO}, "holds 2 tensors .*save each in a file of its own"),
    "two placeholders": ({"string_to_param": {"*": TWO, "@": TWO}}, "holds 2 tensors"),
    "more beside its parameters": ({"string_to_param": {"*": TWO}, "noise": TWO}, "has noise beside its vectors"),
    "more beside its towers": ({"clip_l": TWO, "t5": TWO}, "has t5 beside its vectors"),
    "two of one width": ({"clip_l": TWO, "clip_g": TWO}, "two sets of vectors of width 64"),
    "other counts": ({"clip_l": TWO, "clip_g": WIDE[:1]}, "has 2 of width 64 and 1 of width 128 vectors"),
    "three dimensions": ({"x": TWO[None]}, r"x has the shape \[1, 2, 64\]"),
    "no dimension": ({"x": torch.tensor(1.0)}, r"x has the shape \[\]"),
    "no vectors": ({"x": TWO[:0]}, r"has the shape \[0, 64\]"),
    "vectors of nothing": ({"x": TWO[:, :0]}, r"has the shape \[2, 0\]"),
    "1001 vectors": ({"x": torch.zeros(1001, 4)}, r"n up to 1000"),
    "whole numbers": ({"x": torch.ones(2, 64, dtype=torch.int64)}, "x holds int64 numbers"),
    "NaN": ({"x": TWO / torch.tensor(0.0) * 0}, "x holds NaN or infinity"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_files_are_refused_with_what_they_are(other, tmp_path):
    contents, message = OTHERS[other]
    with pytest.raises(FileError, match=message) as caught:
        load_embedding(save_zip(contents, tmp_path / "seal.pt"))
    assert len(str(caught.value)) <= 200
    assert not str(caught.value).endswith("...")
    assert caught.value.path is not None


def test_a_list_and_code_are_refused_by_the_reader(tmp_path):
    with pytest.raises(FileError, match="holds list, not named tensors"):
        load_embedding(save_zip([{"*": TWO}], tmp_path / "seal.pt"))
    with (
        pretended("trainer.words.Learner") as (kind,),
        pytest.raises(FileError, match=r"refers to trainer\.words\.Learner"),
    ):
        load_embedding(save_zip({"x": TWO, "y": kind()}, tmp_path / "evil.pt"))
