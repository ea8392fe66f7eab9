"""New words: where they start, what learns, and the files that teach them to other programs."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weights
from benchmarks.models.seeded import normal
from ldm.changes.inversion import as_embedding, new_token
from ldm.conditioning.prompts import Embedding
from ldm.conditioning.tokenizer import encode
from ldm.errors import ArgumentError, OutputError
from ldm.model import LatentDiffusion
from tests.made.families import build, tiny

TWO, WIDE = normal("two vectors", (2, 64)), normal("wide", (2, 80))


@lru_cache(maxsize=4)
def model(family: str = "sd1") -> LatentDiffusion:
    return build(tiny(family))


def told(network: LatentDiffusion, prompt: str, **how: object) -> Tensor:
    """Everything that a prompt tells, as one vector."""
    cond = network.tell([prompt], (64, 64), **how)
    return torch.cat([cond.context.flatten(), *([] if cond.y is None else [cond.y.flatten()])])


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "widths"), [("sd1", [64]), ("sdxl-base", [64, 80]), ("sdxl-refiner", [80])])
def test_a_new_word_starts_as_the_word_it_is_like(family: str, widths: list[int]):
    network = model(family)
    parameters = new_token(network, "<seal>", "cat", 2)
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        f"<seal>.{width}": (2, width) for width in widths
    }
    assert all(p.requires_grad and p.is_leaf and p.dtype == torch.float32 for p in parameters.values())
    word = as_embedding("<seal>", parameters)
    assert torch.equal(told(network, "a <seal> on a rock", embeddings=[word]), told(network, "a cat cat on a rock"))


def test_what_it_is_like_may_be_several_tokens_that_are_taken_in_turn():
    network = model()
    word = as_embedding("<seal>", new_token(network, "<seal>", "red cat", 3))
    assert torch.equal(told(network, "<seal> swims", embeddings=[word]), told(network, "red cat red swims"))


@pytest.mark.parametrize("family", ["sd1", "sdxl-base"])
def test_its_gradient_is_that_of_the_rows_it_started_as(family: str):
    """As if the token's own embedding learnt, which stays what it was."""
    network = deepcopy(model(family))
    parameters = new_token(network, "<seal>", "cat")
    out = told(network, "a <seal> beside a <seal>", embeddings=[as_embedding("<seal>", parameters)])
    toward = normal("g", out.shape)
    (out * toward).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    tables = [tower.text_model.embeddings.token_embedding.weight.requires_grad_() for tower in network.text]
    (told(network, "a cat beside a cat") * toward).sum().backward()
    (cat,) = encode("cat")
    for table in tables:
        ours, theirs = parameters[f"<seal>.{table.shape[1]}"].grad, table.grad[cat]
        assert (ours - theirs).abs().max() <= 64 * 2**-24 * theirs.abs().max()


def test_a_word_is_read_as_its_parameters_are_now_and_learns_a_meaning():
    network = model()
    parameters = new_token(network, "<seal>", "cat")
    word = as_embedding("<seal>", parameters)
    wanted, vectors = told(network, "a dog").detach(), parameters["<seal>.64"]
    distances = []
    for _ in range(12):
        distance = (told(network, "a <seal>", embeddings=[word]) - wanted).square().mean()
        (gradient,) = torch.autograd.grad(distance, vectors)
        vectors.data -= 0.3 * gradient / gradient.norm()
        distances.append(distance.item())
    assert distances[-1] < 0.5 * distances[0], distances


def test_condition_is_tell_without_gradients():
    network = model()
    word = as_embedding("<seal>", new_token(network, "<seal>", "cat"))
    cond = network.condition(["a <seal>"], (64, 64), embeddings=[word])
    assert not cond.context.requires_grad
    assert torch.equal(cond.context, network.tell(["a <seal>"], (64, 64), embeddings=[word]).context)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "vectors", "keys"),
    [
        ("sd1", {64: TWO}, {"<seal>": TWO}),
        ("sdxl-base", {80: WIDE, 64: TWO}, {"clip_l": TWO, "clip_g": WIDE}),
        ("sdxl-refiner", {80: WIDE}, {"clip_g": WIDE}),
    ],
)
def test_a_saved_word_has_the_keys_of_other_programs_and_is_read_again(
    family: str, vectors: dict[int, Tensor], keys: dict[str, Tensor], tmp_path: Path
):
    path = weights.save_embedding(
        Embedding("<seal>", vectors), tmp_path / "seal.safetensors", tiny(family), metadata={"steps": "100"}
    )
    stored = load_file(path)
    assert stored.keys() == keys.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in keys.items())
    again = weights.load_embedding(path)
    assert again.name == "seal"
    assert again.vectors.keys() == vectors.keys()
    assert all(torch.equal(again.vectors[width], tensor) for width, tensor in vectors.items())
    with weights.open_file(path) as file:
        assert file.metadata == {"format": "pt", "ldm.embedding.name": "<seal>", "steps": "100"}


def test_what_learns_can_be_saved_as_it_is_and_in_half_the_space(tmp_path: Path):
    parameters = new_token(model(), "<seal>", "cat", 2)
    path = weights.save_embedding(
        as_embedding("<seal>", parameters), tmp_path / "seal.safetensors", tiny("sd1"), dtype=torch.float16
    )
    assert torch.equal(load_file(path)["<seal>"], parameters["<seal>.64"].half())


def test_diffusers_reads_the_word_and_its_vectors(tmp_path: Path):
    pytest.importorskip("diffusers")
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin, load_textual_inversion_state_dicts

    class NoWords:
        def get_vocab(self) -> dict[str, int]:
            return {}

    path = weights.save_embedding(Embedding("<seal>", {64: TWO}), tmp_path / "seal.safetensors", tiny("sd1"))
    tokens, vectors = TextualInversionLoaderMixin._retrieve_tokens_and_embeddings(
        [None], load_textual_inversion_state_dicts([str(path)]), NoWords()
    )
    assert tokens == ["<seal>"]
    assert torch.equal(vectors[0], TWO)


# --- what cannot be done ----------------------------------------------------------------------------------------------


def of_one_width() -> LatentDiffusion:
    network = LatentDiffusion.__new__(LatentDiffusion)
    torch.nn.Module.__init__(network)
    network.config, network.text = tiny("sdxl-base"), torch.nn.ModuleList([model().text[0], model().text[0]])
    return network


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: new_token(model("sd-image-variations"), "<seal>", "cat"),
            "a model of family sd-image-variations takes an image instead of text, and can learn no word"),
        (lambda: new_token(of_one_width(), "<seal>", "cat"),
            "two text towers of this model have one width, and a word has one set of vectors for each width"),
        (lambda: new_token(model(), "<seal>", "cat", 0), "vectors: 0; give a whole number from 1 to 75"),
        (lambda: new_token(model(), "<seal>", "cat", 76), "vectors: 76; give a whole number from 1 to 75"),
        (lambda: new_token(model(), "<seal>", "cat", 1.0), "vectors: 1.0; give a whole number from 1 to 75"),
        (lambda: new_token(model(), "<seal>", "  "),
            "like: '  ' is 0 tokens, the new word has 1: give one to 1 tokens, or more vectors"),
        (lambda: new_token(model(), "<seal>", "red cat"),
            "like: 'red cat' is 2 tokens, the new word has 1: give one to 1 tokens, or more vectors"),
        (lambda: new_token(model(), " ", "cat"), "embedding: it has no name; give one with NAME=FILE"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_refused_with_the_reason(attempt: Callable[[], object], message: str):
    with pytest.raises(ArgumentError) as caught:
        attempt()
    assert str(caught.value) == message


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path: Path):
    path, word, config = tmp_path / "seal.safetensors", Embedding("<seal>", {64: TWO}), tiny("sd1")
    for embedding, to, family, message in (
        (
            word,
            tmp_path / "seal.pt",
            config,
            "seal.pt: other programs read a word from a .safetensors; give it that ending",
        ),
        (
            word,
            path,
            tiny("sdxl-base"),
            "made for text of width 64; this model's is 64 and 80: give the config that was trained",
        ),
        (word, path, tiny("sd-image-variations"), "made for text of width 64; this model's is no width"),
        (
            Embedding("lora_seal", {64: TWO}),
            path,
            config,
            "lora_seal: a file with a tensor of this name is read as something else; choose another word",
        ),
        (Embedding("clip_l", {64: TWO}), path, config, "choose another word"),
    ):
        with pytest.raises(ArgumentError, match=message):
            weights.save_embedding(embedding, to, family)
    with pytest.raises(ArgumentError, match="cannot hold weights"):
        weights.save_embedding(word, path, config, dtype=torch.int8)
    assert not list(tmp_path.iterdir())
    weights.save_embedding(word, path, config)
    with pytest.raises(OutputError, match="exists"):
        weights.save_embedding(word, path, config)
