"""Emphasis in prompts: `(word:1.3)` and its relatives -> texts with weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from ldm.conditioning.tokenizer import readable

EMPHASIS = 1.1  # what one pair of brackets does
MAX_WEIGHT, MAX_DEPTH = 100.0, 100

_NUMBER = r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf(?:inity)?)"
_MARK = re.compile(rf"\\[\\()\[\]]|[()\[\]]|:\s*({_NUMBER})\s*\)", re.IGNORECASE)

Fault = tuple[re.Match[str], str]  # a bracket, and why it is text


class PromptWarning(UserWarning):
    """Brackets in a prompt that weigh nothing and are taken as text."""


def parse(prompt: str) -> list[list[tuple[str, float]]]:
    r"""The sections of a prompt, each a list of (text, weight): the syntax of A1111's web UI.

    (text) weighs 1.1, [text] 1 / 1.1, (text:1.3) 1.3; in one another they multiply. The word BREAK begins a section.
    \( \) \[ \] \\ are characters of the text; `species:seal` is text, as a weight ends in a number and a parenthesis.
    Brackets are text too, and a PromptWarning says so, where they have no partner, are more than 100 deep, or would
    give a weight that is not within -100 to 100. (A1111 closes brackets that are still open at the end instead.)
    """
    sections, faults = parse_marks(prompt)
    if faults:
        warn(faults)
    return sections


def warn(faults: Sequence[Fault]) -> None:
    """A PromptWarning about the first of the faults, of which there is at least one."""
    mark, what = min(faults, key=lambda fault: fault[0].start())
    where = f"{mark[0][-1]!r} at character {mark.start() + 1}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    remedy = "write \\( \\) \\[ \\] for brackets that are"
    warnings.warn(f"prompt: {where} {what}{more}: taken as text; {remedy}", PromptWarning, stacklevel=4)


def parse_marks(prompt: str) -> tuple[list[list[tuple[str, float]]], list[Fault]]:
    """The sections of `parse`, and the faults of the brackets."""
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
                deep = "is more than 100 deep" if len(weights) > MAX_DEPTH else None
                faults.append((mark, deep or f"is a weight of {weight:g}, beyond {MAX_WEIGHT:g}"))
                pieces.append((mark[0], weights[-1]))
        else:
            pieces.append((mark[0][1:] if mark[0].startswith("\\") else mark[0], weights[-1]))
    pieces.append((prompt[at:], 1.0))
    return _sections(pieces), faults


def _pairs(marks: Sequence[re.Match[str]]) -> tuple[dict[int, tuple[int, float]], list[Fault]]:
    """Brackets with a partner, {place of the opening: (place of the closing, factor)}, and faults for those without."""
    pairs: dict[int, tuple[int, float]] = {}
    alone: list[int] = []
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
            while marks[stack[-1]][0] != wanted:  # a bracket that is still open inside has no partner
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
