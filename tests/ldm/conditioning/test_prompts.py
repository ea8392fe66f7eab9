"""Weights, pieces and learnt words in prompts, up to the tokens that the towers give."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.golden import CLIP_L_TINY, fill, relative, tiny_clip_l, tiny_openclip
from benchmarks.models.seeded import normal
from ldm.conditioning.emphasis import PromptWarning
from ldm.conditioning.prompts import Embedding, chunks_needed, encode_text
from ldm.conditioning.tokenizer import END, START, TruncationWarning, encode
from ldm.errors import ArgumentError

TOLERANCE = 1e-5  # of the reference's rms: float32 rounding in three layers, as in test_clip


@pytest.fixture(scope="module")
def one() -> nn.ModuleList:
    return nn.ModuleList([tiny_clip_l()])


@pytest.fixture(scope="module")
def two() -> nn.ModuleList:
    """Towers side by side that differ in padding, activation and projection, as SDXL's do."""
    return nn.ModuleList([tiny_clip_l(), tiny_openclip()])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Recorder(nn.Module):
    """A tower that notes what it is asked."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.config, self.text_model, self.tower = tower.config, tower.text_model, tower
        self.ids: list[Tensor] = []

    def forward(self, ids, *rest):
        self.ids.append(ids)
        return self.tower(ids, *rest)


def ids_of(tower: nn.Module, prompts: list[str], **keywords) -> list[list[int]]:
    """What is between start and end in each piece."""
    recorder = Recorder(tower)
    encode_text(nn.ModuleList([recorder]), prompts, **keywords)
    assert all(row[0] == START for row in recorder.ids[0].tolist())
    return [row[1 : row.index(END)] for row in recorder.ids[0].tolist()]


def words(n: int, word: str = "word") -> str:
    return " ".join([word] * n)


DOWN = 1 / 1.1  # the weight of [brackets]


def test_brackets_are_text_unless_weights_are_asked_for(one):
    assert ids_of(one[0], ["a (cat:1.3) BREAK"]) == [encode("a (cat:1.3) BREAK")]
    assert ids_of(one[0], ["a (cat:1.3) dog"], weighting=True) == [encode("a cat dog")]


@pytest.mark.parametrize("prompt", ["a cat", "a (cat:1) dog", "(a cat, a dog:1.0)"])
def test_a_weight_of_one_everywhere_changes_no_bit(prompt, two):
    plain = prompt.replace("(", "").replace(":1.0)", "").replace(":1)", "")
    for ours, theirs in zip(encode_text(two, [prompt], weighting=True), encode_text(two, [plain]), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_multiply_tokens_and_the_mean_of_the_piece_is_restored(one):
    """A1111's rule, written out for one prompt."""
    plain, pooled = encode_text(one, ["a cat dog"])
    weighted, still = encode_text(one, ["a (cat:1.5) [dog]"], weighting=True)
    expected = plain.clone()
    expected[:, 2] *= 1.5
    expected[:, 3] *= DOWN
    expected *= plain.mean() / expected.mean()
    assert relative(weighted, expected) < TOLERANCE
    assert torch.allclose(weighted.mean(), plain.mean(), rtol=1e-4)
    assert torch.equal(pooled, still)


def test_a_prompt_without_weights_is_the_same_bits_beside_one_with_them(two):
    pair, _ = encode_text(two, ["a cat", "a (dog:1.4)"], weighting=True)
    plain, _ = encode_text(two, ["a cat", "a dog"])
    assert torch.equal(pair[0], plain[0])
    assert not torch.equal(pair[1], plain[1])


def test_the_mean_is_left_alone_where_restoring_it_would_turn_every_sign(one):
    plain, _ = encode_text(one, [words(75)])
    weighted, _ = encode_text(one, [f"({words(75)}:-1)"], weighting=True)
    assert (plain.sum() - 2 * plain[:, 1:76].sum()) / plain.sum() < 0
    assert torch.equal(weighted[:, [0, 76]], plain[:, [0, 76]])
    assert torch.equal(weighted[:, 1:76], -plain[:, 1:76])


def test_weights_in_half_precision_are_applied_in_float32(one):
    import copy

    half = copy.deepcopy(one).to(torch.bfloat16)
    weighted, _ = encode_text(half, ["a (cat and a dog in the rain:1.3)"], weighting=True)
    plain, _ = encode_text(half, ["a cat and a dog in the rain"])
    expected = plain.float()
    expected[:, 2:9] *= 1.3
    expected *= plain.float().mean() / expected.mean()
    assert weighted.dtype == torch.bfloat16
    assert (
        (weighted.float() - expected).abs() <= (2**-9 + 1e-5) * 2 * expected.abs()
    ).all()  # half a unit in the last place of 8 bits: one rounding


def test_two_pieces_are_two_prompts_side_by_side(two):
    first, second = words(75, "cat"), words(40, "dog")
    tokens, pooled = encode_text(two, [f"{first} {second}"])
    apart, pooled_apart = encode_text(two, [first, second])
    assert tokens.shape == (1, 154, 128)
    assert torch.equal(tokens[0], apart.flatten(0, 1))
    assert torch.equal(pooled, pooled_apart[:1])


def test_a_break_ends_a_piece(two):
    tokens, pooled = encode_text(two, ["a cat BREAK (a dog:1.2)"], weighting=True)
    apart, pooled_apart = encode_text(two, ["a cat", "(a dog:1.2)"], weighting=True)
    assert torch.equal(tokens[0], apart.flatten(0, 1))
    assert torch.equal(pooled, pooled_apart[:1])


def test_prompts_of_one_batch_are_drawn_out_with_empty_pieces(one):
    long, short = words(80), "a cat"
    pair, pooled = encode_text(one, [short, long])
    padded, _ = encode_text(one, [short, ""])
    assert pair.shape[1] == 154
    assert relative(pair[0], padded.flatten(0, 1)) < TOLERANCE
    assert relative(pooled, encode_text(one, [short, words(75)])[1]) < TOLERANCE


def test_the_number_of_pieces_can_be_asked_for_and_given(one):
    long = words(80)
    assert [
        chunks_needed(one, prompts) for prompts in ([], [""], ["a cat"], [words(75)], [words(76)], ["a", long])
    ] == [1, 1, 1, 1, 2, 2]
    assert chunks_needed(one, ["a BREAK b BREAK c"]) == 1
    assert chunks_needed(one, ["a BREAK b BREAK c"], weighting=True) == 3
    count = chunks_needed(one, [long, ""])
    cond, uncond = encode_text(one, [long], chunks=count)[0], encode_text(one, [""], chunks=count)[0]
    assert cond.shape == uncond.shape == (1, 154, 64)


def test_counting_pieces_says_nothing_of_brackets_as_encoding_will(one):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunks_needed(one, ["a cat :)"], weighting=True)
    with pytest.warns(PromptWarning) as caught:
        encode_text(one, ["a cat :)"] * 3, weighting=True)
    assert len(caught) == 1


def test_a_full_piece_ends_after_the_last_comma_among_its_last_20_tokens(one):
    def cut(before: int, after: int) -> list[int]:
        return [len(piece) for piece in ids_of(one[0], [f"{words(before)}, {words(after)}"])]

    assert cut(55, 40) == [56, 40]  # the comma is the 20th from the end
    assert cut(54, 40) == [75, 20]  # the 21st
    assert cut(74, 40) == [75, 40]
    assert cut(20, 30) == [51]


def test_a_piece_is_as_long_as_the_tower_reads():
    short = CLIP_L_TINY.__class__(**{**CLIP_L_TINY.__dict__, "length": 32})
    from ldm.networks.clip import CLIPText

    tower = fill(CLIPText(short), lambda key: f"short/{key}")
    assert [len(piece) for piece in ids_of(tower, [words(70)])] == [30, 30, 10]
    assert encode_text(nn.ModuleList([tower]), [words(70)])[0].shape == (1, 96, 64)


def test_one_piece_cuts_to_the_brim_and_names_the_first_word_dropped(one):
    with pytest.warns(TruncationWarning, match="82 tokens, 75 are read; dropped from 'zebra' on"):
        (kept,) = ids_of(one[0], [f"{words(60)}, {words(14)} zebra {words(5)} end"], chunks=1)
    assert kept == encode(f"{words(60)}, {words(14)}")
    assert len(encode("xylophonist")) > 1
    with pytest.warns(TruncationWarning, match="from 'xylophonist' on"):
        ids_of(one[0], [f"{words(74)} xylophonist"], chunks=1)
    with pytest.warns(TruncationWarning, match="3 tokens, 1 are read; dropped from 'second' on"):
        assert ids_of(one[0], ["first BREAK second third"], chunks=1, weighting=True) == [encode("first")]


def test_a_word_before_an_embedding_is_not_part_of_what_was_dropped(one):
    learnt = Embedding("seal", {64: torch.zeros(3, 64)})
    with pytest.warns(TruncationWarning, match="80 tokens, 75 are read; dropped from 'zebra' on"):
        ids_of(one[0], [f"{words(72)} seal zebra {words(4)}"], chunks=1, embeddings=[learnt])
    with pytest.warns(TruncationWarning, match="77 tokens, 74 are read; dropped from 'seal' on"):
        ids_of(one[0], [f"{words(74)} seal"], chunks=1, embeddings=[learnt])


def test_short_prompts_in_one_piece_are_what_the_tower_gives(two):
    from ldm.conditioning.tokenizer import tokenize

    prompts = ["a cat", "", "rain on a tin roof, at night"]
    tokens, pooled = encode_text(two, prompts)
    (first, _), (second, theirs) = two[0](tokenize(prompts)), two[1](tokenize(prompts, pad=0))
    assert torch.equal(tokens, torch.cat([first, second], dim=-1))
    assert torch.equal(pooled, theirs)


@pytest.mark.parametrize("chunks", [0, -1, True, 1.5, 10**9])
def test_a_number_of_pieces_that_is_none_is_refused(chunks, one):
    with pytest.raises(ArgumentError, match="chunks: "):
        encode_text(one, ["a"], chunks=chunks)


def test_more_than_1000_pieces_are_refused(one):
    with pytest.raises(ArgumentError, match="1002 pieces; the limit is 1000"):
        chunks_needed(one, ["BREAK " * 1001], weighting=True)


def test_no_prompts_are_an_empty_batch(one):
    tokens, pooled = encode_text(one, [])
    assert tokens.shape == (0, 77, 64)
    assert pooled.shape == (0, 64)


def test_a_learnt_word_gives_what_an_added_token_gives_in_transformers(one):
    transformers = pytest.importorskip("transformers", reason="the comparison needs the extra 'bench'")
    c = CLIP_L_TINY
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=c.vocab, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            intermediate_size=c.mlp, hidden_act=c.activation, eos_token_id=END,
        )
    )  # fmt: skip
    own = theirs.state_dict()
    theirs.load_state_dict(
        {
            k: one[0].state_dict()[k if k.startswith("text_model.") else f"text_model.{k}"]
            for k in own
            if "position_ids" not in k
        },
        strict=False,
    )
    theirs.eval().resize_token_embeddings(c.vocab + 2, mean_resizing=False)
    vectors = normal("learnt", (2, c.width))
    theirs.get_input_embeddings().weight[c.vocab :] = vectors
    before, after = encode("a photo of"), encode("in the rain")
    ids = [START, *before, c.vocab, c.vocab + 1, *after, END]
    ids += [END] * (77 - len(ids))
    expected = theirs(torch.tensor([ids])).last_hidden_state
    tokens, pooled = encode_text(
        one, ["a photo of <seal> in the rain"], embeddings=[Embedding("<seal>", {64: vectors})]
    )
    assert relative(tokens, expected) < TOLERANCE
    assert relative(pooled, expected[:, ids.index(END)]) < TOLERANCE  # not where the largest id is


def test_each_tower_gets_the_vectors_of_its_width():
    from dataclasses import replace

    from ldm.networks.clip import CLIPText

    narrow = fill(CLIPText(replace(CLIP_L_TINY, width=32)), lambda key: f"narrow/{key}")
    towers = nn.ModuleList([tiny_clip_l(), narrow])
    vectors = {64: normal("64", (2, 64)), 32: normal("32", (2, 32))}
    tokens, _ = encode_text(towers, ["a seal"], embeddings=[Embedding("seal", vectors)])
    for tower, part in zip(towers, tokens.split([64, 32], dim=-1), strict=True):
        alone, _ = encode_text(
            nn.ModuleList([tower]),
            ["a seal"],
            embeddings=[Embedding("seal", {tower.config.width: vectors[tower.config.width]})],
        )
        assert torch.equal(part, alone)
        assert not torch.equal(part, encode_text(nn.ModuleList([tower]), ["a seal"])[0])


def test_the_vectors_of_a_token_of_the_vocabulary_change_nothing(one):
    """The same place, the same numbers: only the way there differs."""
    (token,) = encode("cat")
    own = one[0].text_model.embeddings.token_embedding.weight[[token]]
    assert torch.equal(
        encode_text(one, ["a cat here"], embeddings=[Embedding("cat", {64: own})])[0],
        encode_text(one, ["a cat here"])[0],
    )


def test_learnt_words_stand_where_they_are_written(one):
    own = one[0].text_model.embeddings.token_embedding.weight
    learnt = [Embedding(name, {64: own[encode(words_)]}) for name, words_ in (("xx", "cat dog rain"), ("yy", "roof"))]
    assert encode("a cat dog rain roof by cat dog rain") == [
        token for word in ["a", "cat", "dog", "rain", "roof", "by", "cat", "dog", "rain"] for token in encode(word)
    ]
    ours, _ = encode_text(one, ["a xx yy by xx", "yy"], embeddings=learnt)
    assert torch.equal(ours, encode_text(one, ["a cat dog rain roof by cat dog rain", "roof"])[0])


def test_a_name_is_found_as_a_word_of_its_own_the_longest_first(one):
    learnt = [
        Embedding("sea", {64: normal("sea", (1, 64))}),
        Embedding("sea lion", {64: normal("sea lion", (3, 64))}),
        Embedding("<s>", {64: normal("s", (2, 64))}),
    ]

    def ids(prompt: str) -> list[int]:
        return ids_of(one[0], [prompt], embeddings=learnt)[0]

    assert ids("a SEA, a Sea Lion") == [*encode("a"), 0, *encode(", a"), 0, 0, 0]
    assert ids("seaside by-sea") == [*encode("seaside by-"), 0]
    assert ids("a<s>b") == [*encode("a"), 0, 0, *encode("b")]


def test_weights_apply_to_every_token_of_a_learnt_word(one):
    learnt = [Embedding("seal", {64: normal("seal", (2, 64))})]
    plain, _ = encode_text(one, ["a seal"], embeddings=learnt)
    weighted, _ = encode_text(one, ["a (seal:1.5)"], embeddings=learnt, weighting=True)
    expected = plain.clone()
    expected[:, 2:4] *= 1.5
    expected *= plain.mean() / expected.mean()
    assert relative(weighted, expected) < TOLERANCE


def test_a_learnt_word_is_not_cut_in_two(one):
    learnt = [Embedding("seal", {64: normal("seal", (4, 64))})]
    assert [len(piece) for piece in ids_of(one[0], [f"{words(71)} seal end"], embeddings=learnt)] == [75, 1]
    assert [len(piece) for piece in ids_of(one[0], [f"{words(72)} seal end"], embeddings=learnt)] == [72, 5]
    whole, _ = encode_text(one, [f"{words(72)} seal end"], embeddings=learnt)
    apart, _ = encode_text(one, [words(72), "seal end"], embeddings=learnt)
    assert torch.equal(whole[0], apart.flatten(0, 1))
    assert chunks_needed(one, [f"{words(72)} seal"], embeddings=learnt) == 2


def test_a_learnt_word_for_other_towers_is_refused_with_both_widths(one):
    for vectors in ({1024: torch.zeros(1, 1024)}, {64: torch.zeros(1, 64), 1024: torch.zeros(1, 1024)}):
        with pytest.raises(ArgumentError, match=r"seal: made for text of width .*1024; this model's is 64"):
            encode_text(one, ["a"], embeddings=[Embedding("seal", vectors)])
        with pytest.raises(ArgumentError, match="made for text of width"):
            chunks_needed(one, ["a"], embeddings=[Embedding("seal", vectors)])


def test_a_learnt_word_longer_than_a_piece_is_refused(one):
    with pytest.raises(ArgumentError, match="76 vectors; this model reads 75 tokens at once"):
        encode_text(one, ["a"], embeddings=[Embedding("seal", {64: torch.zeros(76, 64)})])


def test_two_learnt_words_of_one_name_are_refused(one):
    with pytest.raises(ArgumentError, match="two have this name"):
        encode_text(
            one,
            ["a"],
            embeddings=[Embedding("seal", {64: torch.zeros(1, 64)}), Embedding("Seal", {64: torch.zeros(1, 64)})],
        )


@pytest.mark.parametrize(
    ("name", "vectors", "message"),
    [
        (" ", {64: torch.zeros(1, 64)}, "no name"),
        ("seal", {}, "shapes"),
        ("seal", {64: torch.zeros(64)}, "shapes"),
        ("seal", {64: torch.zeros(0, 64)}, "shapes"),
        ("seal", {64: torch.zeros(1, 32)}, "shapes"),
        ("seal", {64: torch.zeros(1, 64), 32: torch.zeros(2, 32)}, "the same number"),
    ],
)
def test_an_embedding_that_is_none_is_refused(name, vectors, message):
    with pytest.raises(ArgumentError, match=message):
        Embedding(name, vectors)
