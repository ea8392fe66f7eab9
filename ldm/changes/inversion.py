"""New words for the text towers, learnt as token embeddings alone: textual inversion (Gal et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor, nn

from ldm.conditioning.prompts import Embedding
from ldm.conditioning.tokenizer import encode
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion


def new_token(model: LatentDiffusion, word: str, like: str, vectors: int = 1) -> dict[str, nn.Parameter]:
    """The parameters of a new word: {"word.768": [vectors, 768], ...}, one for each text tower, named by its width.

    like     the text whose tokens it starts as, repeated ("single-word coarse descriptor": Gal et al. 2022, section 3)
    vectors  tokens that the word stands for
    They are float32, on the tower's device. Raises ArgumentError for a model without text towers, a word without
    letters, more vectors than a tower reads at once, and a `like` of no token or of more than there are vectors.
    """
    towers = {tower.config.width: tower for tower in model.text}
    if not towers:
        name = model.config.name
        raise ArgumentError(f"a model of family {name} takes an image instead of text, and can learn no word")
    if len(towers) < len(model.text):
        what = "two text towers of this model have one width, and a word has one set of vectors for each width"
        raise ArgumentError(what)
    room = min(tower.config.length for tower in model.text) - 2
    if isinstance(vectors, bool) or not isinstance(vectors, Integral) or not 1 <= vectors <= room:
        raise ArgumentError(f"vectors: {vectors!r}; give a whole number from 1 to {room}", key="vectors")
    ids = encode(like)
    if not 1 <= len(ids) <= vectors:
        what = f"like: {like[:60]!r} is {len(ids)} tokens, the new word has {vectors}"
        raise ArgumentError(f"{what}: give one to {vectors} tokens, or more vectors", key="like")
    ids = [ids[i % len(ids)] for i in range(vectors)]
    start = {width: tower.text_model.embeddings.token_embedding.weight.detach()[ids] for width, tower in towers.items()}
    parameters = {f"{word}.{width}": nn.Parameter(tokens.to(torch.float32)) for width, tokens in start.items()}
    as_embedding(word, parameters)
    return parameters


def as_embedding(word: str, parameters: Mapping[str, Tensor]) -> Embedding:
    """The word for prompts, with its parameters' values when it is read, and gradients. Raises ArgumentError."""
    return Embedding(word, {vectors.shape[1]: vectors for vectors in parameters.values()})
