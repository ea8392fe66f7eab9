"""The text towers against the original implementations."""

import pytest
import torch

from benchmarks.models.golden import relative, tiny_clip_l, tiny_openclip
from benchmarks.models.seeded import golden
from ldm.conditioning.prompts import encode_text
from ldm.errors import ArgumentError

TOLERANCE = 1e-5  # of the reference's rms; measured 0 on one machine, rounding elsewhere


@torch.no_grad()
def test_the_tower_of_sd1_gives_what_transformers_gives() -> None:
    tower, file = tiny_clip_l(), golden("text")
    ids = file["ids_pad_eot"].long()
    tokens, pooled = tower(ids)
    assert relative(tokens, file["clip-l-tiny/last_hidden_state"]) < TOLERANCE
    assert relative(pooled, file["clip-l-tiny/pooled"]) < TOLERANCE
    assert relative(tower(ids, skip=1, norm=False)[0], file["clip-l-tiny/hidden_states_-2"]) < TOLERANCE


@torch.no_grad()
def test_the_tower_of_sd2_and_sdxl_gives_what_open_clip_gives() -> None:
    tower, file = tiny_openclip(), golden("text")
    ids = file["ids_pad0"].long()
    tokens, pooled = tower(ids)
    assert relative(tokens, file["openclip-tiny/last_ln_final"]) < TOLERANCE
    assert relative(pooled, file["openclip-tiny/pooled_projected"]) < TOLERANCE
    assert relative(tower(ids, skip=1)[0], file["openclip-tiny/penultimate_ln_final"]) < TOLERANCE
    assert relative(tower(ids, skip=1, norm=False)[0], file["openclip-tiny/penultimate_raw"]) < TOLERANCE


@torch.no_grad()
def test_pooling_reads_the_first_end_of_text_even_among_larger_ids() -> None:
    """The original takes argmax(ids), which an added token (id > 49407) would attract; the published tokens have
    none."""
    tower = tiny_clip_l()
    ids = torch.tensor([[49406, 320, 49407, 49407, 49407]])
    longer = torch.cat([ids, ids[:, -1:]], dim=1)
    assert torch.allclose(tower(ids)[1], tower(longer)[1], atol=1e-6)


@torch.no_grad()
def test_what_follows_a_token_does_not_change_it() -> None:
    tower = tiny_clip_l()
    ids = torch.tensor([[49406, 320, 1125, 539, 49407]])
    other = ids.clone()
    other[0, 3] = 2368
    assert torch.equal(tower(ids)[0][:, :3], tower(other)[0][:, :3])


@torch.no_grad()
def test_clip_skip_counts_layers_from_the_one_the_model_was_trained_with() -> None:
    towers = torch.nn.ModuleList([tiny_clip_l()])
    ids_tokens, _ = encode_text(towers, ["a photo"])
    skipped, _ = encode_text(towers, ["a photo"], clip_skip=2)
    from ldm.conditioning.tokenizer import tokenize

    assert torch.equal(ids_tokens, towers[0](tokenize(["a photo"]))[0])
    assert torch.equal(skipped, towers[0](tokenize(["a photo"]), skip=1)[0])


@pytest.mark.parametrize("clip_skip", [0, 4, -1])
def test_a_layer_that_is_not_there_is_refused(clip_skip: int) -> None:
    with pytest.raises(ArgumentError, match="clip skip"):
        encode_text(torch.nn.ModuleList([tiny_clip_l()]), ["a photo"], clip_skip=clip_skip)
