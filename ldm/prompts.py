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
from torch import Tensor, nn

from ldm.clip import CLIPText, Given
from ldm.config import TextConfig
from ldm.errors import ArgumentError, printable
from ldm.tokenizer import TruncationWarning, encode, first_dropped, framed, readable

COMMA = 267  # the id of a comma that ends a word
BACKTRACK = 20  # tokens at the end of a piece in which a comma ends it early, as in A1111's web UI
MAX_CHUNKS = 1000  # pieces of one prompt
EMPHASIS = 1.1  # what one pair of brackets does
MAX_WEIGHT, MAX_DEPTH = 100.0, 100

_NUMBER = r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf(?:inity)?)"
_MARK = re.compile(rf"\\[\\()\[\]]|[()\[\]]|:\s*({_NUMBER})\s*\)", re.IGNORECASE)

Fault = tuple[re.Match[str], str]  # a bracket, and why it is text


class PromptWarning(UserWarning):
    """Brackets in a prompt that weigh nothing and are taken as text."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word whose token embeddings were learnt from pictures (textual inversion, Gal et al. 2022). Raises ArgumentError."""

    name: str  # stands for it in prompts, in capitals or not
    vectors: Mapping[int, Tensor]  # width of a text tower -> [n, width]; the same n for all

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ArgumentError("embedding: it has no name; give one with NAME=FILE", key="embedding")
        shapes = {width: tuple(tensor.shape) for width, tensor in self.vectors.items()}
        if not shapes or any(len(shape) != 2 or shape[0] < 1 or shape[1] != width for width, shape in shapes.items()):
            raise ArgumentError(f"embedding {self.name[:40]}: shapes {shapes}; give [n, width] for each width of a text tower", key="embedding")
        if len({n for n, _ in shapes.values()}) > 1:
            raise ArgumentError(f"embedding {self.name[:40]}: {shapes} vectors; all text towers must have the same number of them", key="embedding")

    @property
    def n(self) -> int:
        """Tokens that it stands for."""
        return len(next(iter(self.vectors.values())))


# --- weights --------------------------------------------------------------------------------------------------------


def parse(prompt: str) -> list[list[tuple[str, float]]]:
    r"""The sections of a prompt, each a list of (text, weight): the syntax of A1111's web UI.

    (text) weighs 1.1, [text] 1 / 1.1, (text:1.3) 1.3; in one another they multiply. BREAK, a word of its own, begins a section.
    \( \) \[ \] \\ are characters of the text; `species:seal` is text, as a weight ends in a number and a parenthesis.
    Brackets are text too, and a PromptWarning says so, where they have no partner, are more than 100 deep, or would give a weight
    that is not within -100 to 100. (A1111 closes what is left open at the end of the prompt instead.)
    """
    sections, faults = _parse(prompt)
    _warn(faults)
    return sections


def _warn(faults: Sequence[Fault]) -> None:
    if faults:
        mark, what = min(faults, key=lambda fault: fault[0].start())
        where = f"{mark[0][-1]!r} at character {mark.start() + 1}"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        warnings.warn(f"prompt: {where} {what}{more}: taken as text; write \\( \\) \\[ \\] for brackets that are", PromptWarning, stacklevel=4)


def _parse(prompt: str) -> tuple[list[list[tuple[str, float]]], list[Fault]]:
    """Sections, and what is wrong with the brackets."""
    prompt = readable(prompt)
    marks = list(_MARK.finditer(prompt))
    pairs, faults = _pairs(marks)
    closing = set()  # ends of the pairs that weigh
    weights = [1.0]  # of the brackets around this place
    pieces: list[tuple[str, float]] = []
    at = 0
    for i, mark in enumerate(marks):
        pieces.append((prompt[at : mark.start()], weights[-1]))
        at = mark.end()
        if i in closing:
            weights.pop()
        elif i in pairs:
            end, factor = pairs[i]
            weight = weights[-1] * factor
            if len(weights) <= MAX_DEPTH and abs(weight) <= MAX_WEIGHT:  # NaN is not
                weights.append(weight)
                closing.add(end)
            else:
                faults.append((mark, "is more than 100 deep" if len(weights) > MAX_DEPTH else f"is a weight of {weight:g}, beyond {MAX_WEIGHT:g}"))
                pieces.append((mark[0], weights[-1]))
        else:
            pieces.append((mark[0][1:] if mark[0].startswith("\\") else mark[0], weights[-1]))
    pieces.append((prompt[at:], 1.0))
    return _sections(pieces), faults


def _pairs(marks: Sequence[re.Match[str]]) -> tuple[dict[int, tuple[int, float]], list[Fault]]:
    """Where each bracket that has a partner ends and what it multiplies by, {opening: (closing, factor)}; and those that have none."""
    pairs: dict[int, tuple[int, float]] = {}
    alone = []
    open_ = {"(": 0, "[": 0}
    stack: list[int] = []
    for i, mark in enumerate(marks):
        if mark[0] in open_:
            stack.append(i)
            open_[mark[0]] += 1
        elif not mark[0].startswith("\\"):
            wanted = "[" if mark[0] == "]" else "("
            if not open_[wanted]:
                alone.append(i)
                continue
            while marks[stack[-1]][0] != wanted:  # what is still open inside has no partner
                alone.append(stack.pop())
                open_[marks[alone[-1]][0]] -= 1
            open_[wanted] -= 1
            pairs[stack.pop()] = i, float(mark[1]) if mark[1] else EMPHASIS if wanted == "(" else 1 / EMPHASIS
    return pairs, [(marks[i], "has no partner") for i in alone + stack]


def _sections(pieces: Sequence[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """Neighbours of one weight joined, then all cut at BREAK."""
    joined: list[tuple[list[str], float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1][0].append(text)
        elif text:
            joined.append(([text], weight))
    sections: list[list[tuple[str, float]]] = [[]]
    for texts, weight in joined:
        first, *rest = re.split(r"\bBREAK\b", "".join(texts))
        if first:
            sections[-1].append((first, weight))
        sections += [[(text, weight)] if text else [] for text in rest]
    return sections


# --- pieces ---------------------------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """What is not cut in two: a token, or an embedding."""

    id: int  # of the token; 0 for an embedding
    n: int  # places that it takes
    weight: float
    embedding: Embedding | None


def chunks_needed(towers: Sequence[CLIPText], prompts: Sequence[str], *, weighting: bool = False, embeddings: Sequence[Embedding] = ()) -> int:
    """In how many pieces the longest of these prompts is read: what `encode_text` must be told as `chunks` to give all the same length."""
    _require_fit(towers, embeddings)
    room = _room(towers)
    return max((len(_layout(_units(prompt, weighting, embeddings)[0], room)) for prompt in set(prompts)), default=1)


def is_read(towers: Sequence[CLIPText], prompt: str, embedding: Embedding) -> bool:
    """Whether the first piece of a prompt, without weights, comes to the embedding."""
    first, *_ = _layout(_units(prompt, False, [embedding])[0], _room(towers), limit=1)
    return any(unit.embedding is embedding for unit in first)


def _room(towers: Sequence[CLIPText]) -> int:
    """Tokens in a piece, without start and end."""
    return min(tower.config.length for tower in towers) - 2


def _units(prompt: str, weighting: bool, embeddings: Sequence[Embedding]) -> tuple[list[list[_Unit]], list[Fault]]:
    """The units of each section, and what is wrong with the brackets."""
    sections, faults = _parse(prompt) if weighting else ([[(readable(prompt), 1.0)]], [])
    return [[unit for text, weight in section for unit in _text_units(text, weight, embeddings)] for section in sections], faults


def _text_units(text: str, weight: float, embeddings: Sequence[Embedding]) -> list[_Unit]:
    if not embeddings:
        return [_Unit(token, 1, weight, None) for token in encode(text)]
    by_length = sorted(embeddings, key=lambda e: len(e.name), reverse=True)  # of two that begin alike, the longer
    units, at = [], 0
    for found in re.finditer("|".join(f"({_as_word(e.name)})" for e in by_length), text, re.IGNORECASE):
        embedding = by_length[found.lastindex - 1]
        units += [_Unit(token, 1, weight, None) for token in encode(text[at : found.start()])]
        units.append(_Unit(0, embedding.n, weight, embedding))
        at = found.end()
    return units + [_Unit(token, 1, weight, None) for token in encode(text[at:])]


def _as_word(name: str) -> str:
    """A pattern for the name where it is not a part of a longer word."""
    return (r"(?<!\w)" if re.match(r"\w", name) else "") + re.escape(name) + (r"(?!\w)" if re.search(r"\w$", name) else "")


def _layout(sections: Sequence[Sequence[_Unit]], room: int, limit: int | None = None) -> list[Sequence[_Unit]]:
    """Pieces of at most `room` tokens. A piece that is full ends after the last comma among its last 20 tokens, else where it is full.

    limit  as many pieces will be read: the last of them is filled to the brim, as nothing goes on after it
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
        raise ArgumentError(f"prompt: it would be read in {len(chunks)} pieces; the limit is {MAX_CHUNKS}, shorten it", key="prompt")
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
        warnings.warn(f"prompt: {total} tokens, {read} are read; dropped from '{printable(word)[:60]}' on", TruncationWarning, stacklevel=4)
    return chunks[:limit]


# --- towers ---------------------------------------------------------------------------------------------------------


def encode_text(
    towers: nn.ModuleList, prompts: Sequence[str], clip_skip: int = 1, *, weighting: bool = False, chunks: int | None = None, embeddings: Sequence[Embedding] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prompts -> tokens [b, n, sum of widths] of all towers side by side, and the last tower's pooled embedding [b, d].

    clip_skip   1: the layer each tower was trained to give; n: n - 1 layers earlier, through the same norm
    weighting   read the syntax of `parse`: the tokens of a piece that comes out of a tower are multiplied by their weights, then the
                piece (all its places, start, end and padding too) by what restores its mean, as in A1111's web UI for one picture
    chunks      pieces of 75 tokens in which each prompt is read (30 for the model that ships), each with a start, an end and padding
                of its own; n is 77 times as many. None: as many as the longest needs. 1: cut, with a TruncationWarning, after one.
                Prompts that meet in one batch, the negative too, need the same number: see `chunks_needed`. Shorter ones go on
                with empty pieces.
    embeddings  each stands, where its name is written, for as many tokens as it has vectors
    The pooled embedding is that of the first piece, without weights. A piece does not end inside an embedding, and ends after a comma
    if there is one among the last 20 tokens. Raises ArgumentError for a layer that a tower has not, an embedding that was made for
    towers of other widths, or text that `encode` refuses.
    """
    for tower in towers:
        config: TextConfig = tower.config
        if not 1 <= clip_skip <= config.layers - config.skip:
            raise ArgumentError(f"clip skip is {clip_skip}: this text tower gives layers 1 to {config.layers - config.skip} from the end")
    if chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, Integral) or not 1 <= chunks <= MAX_CHUNKS):
        raise ArgumentError(f"chunks: {chunks!r}; give a whole number from 1 to {MAX_CHUNKS}", key="chunks")
    _require_fit(towers, embeddings)
    laid: dict[str, list[Sequence[_Unit]]] = {}
    for prompt in dict.fromkeys(prompts):
        units, faults = _units(prompt, weighting, embeddings)
        _warn(faults)
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
    tokens, pooled = tower(torch.tensor(ids, dtype=torch.long, device=device).view(len(ids), config.length), skip, config.norm, _given(rows, config.width, device))
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


def _require_fit(towers: Sequence[CLIPText], embeddings: Sequence[Embedding]) -> None:
    """Raises ArgumentError for an embedding that these towers cannot read, or two of one name."""
    widths, room = sorted({tower.config.width for tower in towers}), _room(towers)
    names = [e.name.lower() for e in embeddings]
    for e in embeddings:
        if sorted(e.vectors) != widths:
            mine, theirs = (" and ".join(map(str, each)) for each in (sorted(e.vectors), widths))
            raise ArgumentError(f"embedding {e.name[:40]}: made for text of width {mine}; this model's is {theirs}: use one made for it", key="embedding")
        if e.n > room:
            raise ArgumentError(f"embedding {e.name[:40]}: {e.n} vectors; this model reads {room} tokens at once: use one with fewer", key="embedding")
        if names.count(e.name.lower()) > 1:
            raise ArgumentError(f"embedding {e.name[:40]}: two have this name; give one another with NAME=FILE", key="embedding")
