"""New words for the text towers, learnt as token embeddings while everything else stays (textual inversion, Gal et al. 2022)."""

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
    """What `word` is to learn: {"word.768": [vectors, 768], ...}, one for each text tower, named by its width; float32, where the tower is.

    like     what it starts as; its tokens, in turn, until there are enough (Gal et al. 2022, section 3: "a single-word coarse descriptor")
    vectors  tokens that the word stands for
    Raises ArgumentError for a model without text towers, a word without letters, more vectors than a tower reads at once, and a `like` of
    no token or of more than there are vectors.
    """
    towers = {tower.config.width: tower for tower in model.text}
    if not towers:
        raise ArgumentError(
            f"a model of family {model.config.name} is told an image instead of text, and can learn no word"
        )
    if len(towers) < len(model.text):
        raise ArgumentError(
            "two text towers of this model have one width, and a word has one set of vectors for each width"
        )
    room = min(tower.config.length for tower in model.text) - 2
    if isinstance(vectors, bool) or not isinstance(vectors, Integral) or not 1 <= vectors <= room:
        raise ArgumentError(f"vectors: {vectors!r}; give a whole number from 1 to {room}", key="vectors")
    ids = encode(like)
    if not 1 <= len(ids) <= vectors:
        raise ArgumentError(
            f"like: {like[:60]!r} is {len(ids)} tokens, the new word has {vectors}: give one to {vectors} tokens, or more vectors",
            key="like",
        )
    ids = [ids[i % len(ids)] for i in range(vectors)]
    tables = {width: tower.text_model.embeddings.token_embedding.weight for width, tower in towers.items()}
    parameters = {
        f"{word}.{width}": nn.Parameter(table.detach()[ids].to(torch.float32, copy=True))
        for width, table in tables.items()
    }
    as_embedding(word, parameters)
    return parameters


def as_embedding(word: str, parameters: Mapping[str, Tensor]) -> Embedding:
    """What `LatentDiffusion.tell` takes, so that `word` stands for the parameters of `new_token`: for their values whenever it is read, with
    gradients. Raises ArgumentError for a word without letters."""
    return Embedding(word, {vectors.shape[1]: vectors for vectors in parameters.values()})
