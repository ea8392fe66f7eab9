"""Prompts to the tokens and the pooled embedding of the text towers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ldm.conditioning.emphasis import Fault, parse_marks, warn
from ldm.conditioning.tokenizer import TruncationWarning, encode, first_dropped, framed, readable
from ldm.errors import ArgumentError, printable
from ldm.networks.clip import CLIPText, Given
from ldm.networks.modules import Modules

COMMA = 267  # the id of a comma that ends a word
BACKTRACK = 20  # tokens at the end of a piece in which a comma ends it early, as in A1111's web UI
MAX_CHUNKS = 1000  # pieces of one prompt
MARKED = re.compile(r"[()\[\]\\]|BREAK")  # what a prompt has that does not weigh the same all over


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word whose token embeddings were learnt (textual inversion, Gal et al. 2022). Raises ArgumentError."""

    name: str  # stands for it in prompts, in capitals or not
    vectors: Mapping[int, Tensor]  # width of a text tower -> [n, width]; the same n for all

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ArgumentError("embedding: it has no name; give one with NAME=FILE", key="embedding")
        shapes = {width: tuple(tensor.shape) for width, tensor in self.vectors.items()}
        if not shapes or any(len(shape) != 2 or shape[0] < 1 or shape[1] != width for width, shape in shapes.items()):
            what = f"embedding {self.name[:40]}: shapes {shapes}; give [n, width] for each width of a text tower"
            raise ArgumentError(what, key="embedding")
        if len({n for n, _ in shapes.values()}) > 1:
            what = f"embedding {self.name[:40]}: {shapes} vectors; all text towers must have the same number of them"
            raise ArgumentError(what, key="embedding")

    @property
    def n(self) -> int:
        """Tokens that it stands for."""
        return len(next(iter(self.vectors.values())))


class _Unit(NamedTuple):
    """A token or an embedding, neither of which is cut in two."""

    id: int  # of the token; 0 for an embedding
    n: int  # places that it takes
    weight: float
    embedding: Embedding | None


def chunks_needed(
    towers: Modules[CLIPText], prompts: Sequence[str], *, weighting: bool = False, embeddings: Sequence[Embedding] = ()
) -> int:
    """In how many pieces the longest of these prompts is read: as `chunks` of `encode_text` it gives all one length."""
    _require_fit(towers, embeddings)
    room = _room(towers)
    return max((len(_layout(_units(prompt, weighting, embeddings)[0], room)) for prompt in set(prompts)), default=1)


def is_read(towers: Modules[CLIPText], prompt: str, embedding: Embedding) -> bool:
    """Whether the embedding is in the first piece of a prompt, which is read without weights."""
    first, *_ = _layout(_units(prompt, False, [embedding])[0], _room(towers), limit=1)
    return any(unit.embedding is embedding for unit in first)


def _room(towers: Modules[CLIPText]) -> int:
    """Tokens in a piece, without start and end."""
    return min(tower.config.length for tower in towers) - 2


def _units(prompt: str, weighting: bool, embeddings: Sequence[Embedding]) -> tuple[list[list[_Unit]], list[Fault]]:
    """The units of each section, and the faults of the brackets."""
    text = readable(prompt)
    sections, faults = parse_marks(prompt) if weighting and MARKED.search(text) else ([[(text, 1.0)]], [])
    units = [[unit for text, weight in part for unit in _text_units(text, weight, embeddings)] for part in sections]
    return units, faults


def _text_units(text: str, weight: float, embeddings: Sequence[Embedding]) -> list[_Unit]:
    if not embeddings:
        return [_Unit(token, 1, weight, None) for token in encode(text)]
    by_length = sorted(embeddings, key=lambda e: len(e.name), reverse=True)  # of two that begin alike, the longer
    units, at = [], 0
    for found in re.finditer("|".join(f"({_as_word(e.name)})" for e in by_length), text, re.IGNORECASE):
        embedding = next(e for e, part in zip(by_length, found.groups(), strict=True) if part)
        units += [_Unit(token, 1, weight, None) for token in encode(text[at : found.start()])]
        units.append(_Unit(0, embedding.n, weight, embedding))
        at = found.end()
    return units + [_Unit(token, 1, weight, None) for token in encode(text[at:])]


def _as_word(name: str) -> str:
    """A pattern for the name where it is not a part of a longer word."""
    before, after = r"(?<!\w)" if re.match(r"\w", name) else "", r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + re.escape(name) + after


def _layout(sections: Sequence[Sequence[_Unit]], room: int, limit: int | None = None) -> list[Sequence[_Unit]]:
    """Pieces of at most `room` tokens. A full one ends after the last comma among its last 20 tokens, if there is one.

    limit  the number of pieces that will be read: the last ends where it is full, as no piece continues it
    """
    chunks: list[Sequence[_Unit]] = []
    for section in sections:
        at = 0
        while True:
            end, used = at, 0
            while end < len(section) and used + section[end].n <= room:
                used += section[end].n
                end += 1
            if end < len(section) and len(chunks) + 1 != limit:
                commas = [k for k in range(max(at, end - BACKTRACK), end) if section[k].id == COMMA]
                end = commas[-1] + 1 if commas else end
            chunks.append(section[at:end])
            at = end
            if at == len(section):
                break
    if len(chunks) > MAX_CHUNKS:
        what = f"prompt: it would be read in {len(chunks)} pieces; the limit is {MAX_CHUNKS}, shorten it"
        raise ArgumentError(what, key="prompt")
    return chunks


def _cut(chunks: list[Sequence[_Unit]], limit: int) -> list[Sequence[_Unit]]:
    """The first `limit` pieces; a TruncationWarning names the first word dropped."""
    kept, dropped = [u for chunk in chunks[:limit] for u in chunk], [u for chunk in chunks[limit:] for u in chunk]
    if dropped:
        everything, k = kept + dropped, len(kept)
        if dropped[0].embedding:
            word = dropped[0].embedding.name
        else:  # the tokens around the cut, as far as there are no embeddings among them
            begin = next((i + 1 for i in range(k - 1, -1, -1) if everything[i].embedding), 0)
            end = next((i for i in range(k, len(everything)) if everything[i].embedding), len(everything))
            word = first_dropped([u.id for u in everything[begin:end]], k - begin)
        total, read = (sum(u.n for u in units) for units in (everything, kept))
        what = f"prompt: {total} tokens, {read} are read; dropped from '{printable(word)[:60]}' on"
        warnings.warn(what, TruncationWarning, stacklevel=4)
    return chunks[:limit]


def encode_text(
    towers: Modules[CLIPText], prompts: Sequence[str], clip_skip: int = 1, *,
    weighting: bool = False, chunks: int | None = None, embeddings: Sequence[Embedding] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prompts -> tokens [b, n, sum of widths] of all towers side by side, and the last tower's pooled embedding [b, d].

    clip_skip   1: the layer each tower was trained to give; n: n - 1 layers earlier, through the same norm
    weighting   read the syntax of `parse`: the tokens of a piece that comes out of a tower are multiplied by their
                weights. Then the whole piece, also start, end and padding, is multiplied by the factor that restores
                its mean, as in A1111's web UI for one picture
    chunks      pieces of 75 tokens in which each prompt is read (30 for the model that ships), each with start, end and
                padding of its own; n is 77 times as many. None: as many as the longest needs. 1: cut after one,
                with a TruncationWarning. Prompts that meet in one batch, the negative too, need the same number: see
                `chunks_needed`. Shorter prompts go on with empty pieces
    embeddings  each stands, where its name is written, for as many tokens as it has vectors
    The pooled embedding is that of the first piece, without weights. A piece ends after a comma if there is one among
    its last 20 tokens, and never inside an embedding. Raises ArgumentError for a layer that a tower does not have, an
    embedding that was made for towers of other widths, or text that `encode` refuses.
    """
    for tower in towers:
        layers = tower.config.layers - tower.config.skip
        if not 1 <= clip_skip <= layers:
            raise ArgumentError(f"clip skip is {clip_skip}: this text tower gives layers 1 to {layers} from the end")
    whole = isinstance(chunks, Integral) and not isinstance(chunks, bool)
    if chunks is not None and not (whole and 1 <= chunks <= MAX_CHUNKS):
        raise ArgumentError(f"chunks: {chunks!r}; give a whole number from 1 to {MAX_CHUNKS}", key="chunks")
    _require_fit(towers, embeddings)
    laid: dict[str, list[Sequence[_Unit]]] = {}
    for prompt in dict.fromkeys(prompts):
        units, faults = _units(prompt, weighting, embeddings)
        if faults:
            warn(faults)
        laid[prompt] = _layout(units, _room(towers), chunks)
        if chunks is not None:
            laid[prompt] = _cut(laid[prompt], chunks)
    count = chunks or max(map(len, laid.values()), default=1)
    rows = [row for prompt in prompts for row in [*laid[prompt], *([[]] * (count - len(laid[prompt])))]]
    outputs = [_encode(tower, rows, tower.config.skip + clip_skip - 1) for tower in towers]
    tokens = torch.cat([out for out, _ in outputs], dim=-1)
    return rearrange(tokens, "(b k) n d -> b (k n) d", k=count), outputs[-1][1][::count]


def _encode(tower: CLIPText, rows: Sequence[Sequence[_Unit]], skip: int) -> tuple[Tensor, Tensor]:
    """Pieces -> weighted tokens [b k, length, width] and pooled [b k, d]."""
    config, device = tower.config, tower.text_model.final_layer_norm.weight.device
    ids = [framed([u.id for u in row for _ in range(u.n)], config.length, config.pad) for row in rows]
    batch = torch.tensor(ids, dtype=torch.long, device=device).view(len(ids), config.length)
    tokens, pooled = tower(batch, skip, config.norm, _given(rows, config.width, device))
    weights = torch.ones(len(rows), config.length)
    for k, row in enumerate(rows):
        of_tokens = [u.weight for u in row for _ in range(u.n)]
        weights[k, 1 : 1 + len(of_tokens)] = torch.tensor(of_tokens)
    return (tokens if weights.eq(1).all() else _weighted(tokens, weights.to(tokens.device))), pooled


def _given(rows: Sequence[Sequence[_Unit]], width: int, device: torch.device) -> Given | None:
    """The vectors of the embeddings, and where they go."""
    found = []
    for k, row in enumerate(rows):
        place = 1  # after the start
        for unit in row:
            if unit.embedding:
                found.append((k, place, unit.embedding.vectors[width]))
            place += unit.n
    if not found:
        return None
    at = torch.tensor([(k, place + i) for k, place, vectors in found for i in range(len(vectors))], device=device)
    return at[:, 0], at[:, 1], torch.cat([vectors for _, _, vectors in found]).to(device)


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    """Tokens [b, n, d] times weights [b, n], with the mean of each [n, d] as it was, unless its sign has changed."""
    x = tokens.float() * weights[..., None]
    before, after = tokens.float().mean(dim=(1, 2), keepdim=True), x.mean(dim=(1, 2), keepdim=True)
    scale = before / after
    return (x * torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)).to(tokens.dtype)


def _require_fit(towers: Modules[CLIPText], embeddings: Sequence[Embedding]) -> None:
    """Raises ArgumentError for an embedding that these towers cannot read, or two of one name."""
    widths, room = sorted({tower.config.width for tower in towers}), _room(towers)
    names = [e.name.lower() for e in embeddings]
    for e in embeddings:
        fault = None
        if sorted(e.vectors) != widths:
            of, model = (" and ".join(map(str, each)) for each in (sorted(e.vectors), widths))
            fault = f"made for text of width {of}; this model's is {model}: use one made for it"
        elif e.n > room:
            fault = f"{e.n} vectors; this model reads {room} tokens at once: use one with fewer"
        elif names.count(e.name.lower()) > 1:
            fault = "two have this name; give one another with NAME=FILE"
        if fault:
            raise ArgumentError(f"embedding {e.name[:40]}: {fault}", key="embedding")
