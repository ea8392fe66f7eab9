"""Strings to token ids, by the byte-pair encoding that open_clip ships: no file beside the package, no network."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ldm.errors import ArgumentError, printable

START, END = 49406, 49407
MAX_BYTES = 65536  # of a prompt, in UTF-8
MAX_WORD = 1000  # letters: the encoding takes quadratic time in the length of a word


class TruncationWarning(UserWarning):
    """A prompt was longer than the text tower reads."""


@cache
def _bpe() -> Any:  # open_clip's SimpleTokenizer
    """open_clip's tokenizer, from its own file: importing the package would pull in torchvision and timm, for 3 s."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ArgumentError(
            "the tokenizer's vocabulary comes with open_clip_torch, which is not installed: pip install open_clip_torch"
        )
    if "open_clip.tokenizer" in sys.modules:
        return sys.modules["open_clip.tokenizer"].SimpleTokenizer()
    file = str(Path(package.submodule_search_locations[0]) / "tokenizer.py")
    loader = SourceFileLoader("_open_clip_tokenizer", file)
    module = ModuleType(loader.name)
    module.__file__ = file  # it looks for its vocabulary beside itself
    loader.exec_module(module)
    return module.SimpleTokenizer()


def readable(prompt: str) -> str:
    """The prompt with U+FFFD for unpaired surrogates, which have no bytes. Raises ArgumentError for one over 64 KiB."""
    prompt = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    size = len(prompt.encode())
    if size > MAX_BYTES:
        raise ArgumentError(f"prompt: {size} bytes; the limit is {MAX_BYTES}, shorten it", key="prompt")
    return prompt


def encode(prompt: str) -> list[int]:
    """Token ids of the whole prompt, without start and end. Unpaired surrogates count as U+FFFD.

    Raises ArgumentError for a prompt over 64 KiB, or with a word of more than 1000 characters.
    """
    prompt = readable(prompt)
    longest = max(map(len, prompt.split()), default=0)
    if longest > MAX_WORD:
        remedy = "shorten it or add spaces"
        raise ArgumentError(f"prompt: a word of {longest} characters; the limit is {MAX_WORD}, {remedy}", key="prompt")
    return _bpe().encode(prompt)


def first_dropped(ids: Sequence[int], kept: int) -> str:
    """The first word that does not fit whole into the first `kept` of these ids."""
    pieces = [_bpe().decoder[i] for i in ids]
    begin = kept
    while begin > 0 and not pieces[begin - 1].endswith("</w>"):
        begin -= 1
    end = next((i for i in range(kept, len(ids)) if pieces[i].endswith("</w>")), len(ids) - 1)
    return _bpe().decode(ids[begin : end + 1]).strip()


def framed(ids: Sequence[int], length: int, pad: int) -> list[int]:
    """Start, at most length - 2 ids, end, then `pad` up to `length`."""
    return [START, *ids, END] + [pad] * (length - 2 - len(ids))


def tokenize(prompts: Sequence[str], length: int = 77, pad: int = END) -> Tensor:
    """Ids [b, length]: start, the prompt, end, then `pad` (49407 in OpenAI's towers, 0 in OpenCLIP's).

    A prompt that does not fit is cut, its last id becoming end; a TruncationWarning names the first word dropped.
    """
    rows = []
    for prompt in prompts:
        ids = encode(prompt)
        if len(ids) > length - 2:
            dropped = first_dropped(ids, length - 2)
            warnings.warn(
                f"prompt: {len(ids)} tokens, {length - 2} are read; dropped from '{printable(dropped)[:60]}' on",
                TruncationWarning,
                stacklevel=2,
            )
            ids = ids[: length - 2]
        rows.append(framed(ids, length, pad))
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)


def vocabulary() -> dict[str, int]:
    """{piece of text: its id} of the encoding, in the order of the ids."""
    return {piece: i for i, piece in sorted(_bpe().decoder.items())}


def merges() -> list[tuple[str, str]]:
    """The pairs of pieces that the encoding joins, the most frequent first."""
    return sorted(_bpe().bpe_ranks, key=_bpe().bpe_ranks.__getitem__)
