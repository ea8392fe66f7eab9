"""Brackets in prompts: what they weigh, and what is said of those that cannot."""

from __future__ import annotations

import time
import warnings

import pytest

from ldm.conditioning.emphasis import PromptWarning, parse
from ldm.errors import ArgumentError

UP, DOWN = 1.1, 1 / 1.1
SYNTAX = {  # the first block: what A1111's web UI gives
    "a cat": [("a cat", 1)],
    "a (cat) here": [("a ", 1), ("cat", UP), (" here", 1)],
    "[cat]": [("cat", DOWN)],
    "(cat:1.3)": [("cat", 1.3)],
    "(cat : 1.3 )": [("cat ", 1.3)],
    "(cat:.5)(dog:-2)": [("cat", 0.5), ("dog", -2)],
    "((cat))": [("cat", UP * UP)],
    "(a [b] (c:2))": [("a ", UP), ("b", UP * DOWN), (" ", UP), ("c", UP * 2)],
    r"\(cat\) \[dog\] \\": [("(cat) [dog] \\", 1)],
    r"(cat\)s)": [("cat)s", UP)],
    "(cat:dog:1.5)": [("cat:dog", 1.5)],
    "[cat:1.3]": [("cat:1.3", DOWN)],
    "(a:1)(b:1)": [("ab", 1)],
    "": [],
    "()": [],
    # namespaces
    "species:seal, studio:dc": [("species:seal, studio:dc", 1)],
    "(species:seal)": [("species:seal", UP)],
    "(species:seal:1.2)": [("species:seal", 1.2)],
    "at 12:30": [("at 12:30", 1)],
    "(cat:1.3 dog)": [("cat:1.3 dog", UP)],
    "a\\b": [("a\\b", 1)],
}


@pytest.mark.parametrize("prompt", SYNTAX)
def test_brackets_weigh_what_they_hold(prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (section,) = parse(prompt)
    assert section == [(text, pytest.approx(weight)) for text, weight in SYNTAX[prompt]]


TEXT = {
    "a cat :)": ([("a cat :)", 1)], r"'\)' at character 8 has no partner"),
    "(cat": ([("(cat", 1)], "no partner"),
    "(cat:1.3": ([("(cat:1.3", 1)], "no partner"),
    "cat:1.3)": ([("cat:1.3)", 1)], "no partner"),
    "(a [b) c]": ([("a [b", UP), (" c]", 1)], r"'\[' at character 4 has no partner \(and 1 more\)"),
    "a ) [b]": ([("a ) ", 1), ("b", DOWN)], "no partner"),
    "(a:1e999)": ([("(a:1e999)", 1)], "weight of inf"),
    "(a:nan)": ([("(a:nan)", 1)], "weight of nan"),
    "(a (b):-inf)": ([("(a ", 1), ("b", UP), (":-inf)", 1)], "weight of -inf"),
    "(a:101)": ([("(a:101)", 1)], "weight of 101, beyond 100"),
    "((a:50):50)": ([("(a:50)", 50)], "weight of 2500"),
    "[" * 102 + "a" + "]" * 102: ([("[[a]]", pytest.approx(DOWN**100))], "more than 100 deep"),
}


@pytest.mark.parametrize("prompt", TEXT)
def test_brackets_that_cannot_weigh_are_text_and_a_warning_says_so(prompt):
    section, message = TEXT[prompt]
    with pytest.warns(PromptWarning, match=message) as caught:
        assert parse(prompt) == [section]
    assert len(caught) == 1
    assert len(str(caught[0].message)) <= 200


def test_a_break_begins_a_section_inside_brackets_too():
    assert parse("a BREAK b") == [[("a ", 1)], [(" b", 1)]]
    assert parse("(a BREAK b:2) c") == [[("a ", 2)], [(" b", 2), (" c", 1)]]
    assert parse("BREAK") == [[], []]
    assert parse("BREAKFAST break") == [[("BREAKFAST break", 1)]]


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 65536,
        "([" * 32768,
        "(a:1.1" * 10000,
        ":" * 65536,
        "(" * 32768 + ")" * 32768,
        ": " * 32768,
        "(a:" + "9" * 65000 + ")",
        "\\" * 65536,
    ],
)
def test_parsing_takes_time_in_proportion_to_the_prompt(prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        begin = time.process_time()
        parse(prompt)
    assert (
        time.process_time() - begin < 1
    )  # FAULTS 2.2; of the processor, as the machine may be busy: a quadratic way through takes minutes


def test_a_prompt_over_64_kib_is_refused_before_it_is_parsed():
    with pytest.raises(ArgumentError, match="65537 bytes; the limit is 65536"):
        parse("(" * 65537)
