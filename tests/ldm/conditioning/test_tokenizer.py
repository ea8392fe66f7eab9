"""Token ids against open_clip's, and what is said when a prompt is cut."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

from benchmarks.models.seeded import GOLDEN
from ldm.conditioning.tokenizer import END, START, TruncationWarning, encode, tokenize
from ldm.errors import ArgumentError


def test_ids_are_those_of_open_clip() -> None:
    file = json.loads((GOLDEN / "tokens.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        assert tokenize(file["prompts"], pad=0).tolist() == file["ids_padded_with_0"]


def test_openai_towers_are_padded_with_the_end() -> None:
    assert tokenize(["cat"]).tolist() == [[START, 2368] + [END] * 75]


def test_nothing_is_said_of_a_prompt_that_fits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenize([" ".join(["word"] * 75)])[0, -1] == END


def test_the_first_word_dropped_is_named() -> None:
    with pytest.warns(TruncationWarning, match=r"76 tokens, 75 are read; dropped from 'zebra' on"):
        ids = tokenize([" ".join(["word"] * 75) + " zebra"])
    assert ids[0, -1] == END
    assert ids[0, -2] != END


def test_a_word_cut_in_its_middle_is_named_whole() -> None:
    assert len(encode("xylophonist")) > 1
    with pytest.warns(TruncationWarning, match="from 'xylophonist' on"):
        tokenize([" ".join(["word"] * 74) + " xylophonist"])


def test_characters_that_would_confuse_a_terminal_are_escaped() -> None:
    with pytest.warns(TruncationWarning) as caught:
        tokenize([" ".join(["word"] * 75) + " \u202egnp"])
    assert "\u202e" not in str(caught[0].message)


@pytest.mark.parametrize("prompt", ["", " ", "\ud800", "a\x00b", "\u202egnp", "👩‍👩‍👧", "e\u0301" * 20, "((((" * 100])
def test_any_text_is_encoded(prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        assert tokenize([prompt]).shape == (1, 77)


def test_an_unpaired_surrogate_counts_as_the_replacement_character() -> None:
    assert encode("a\ud800b") == encode("a\ufffdb")


def test_a_prompt_without_end_is_refused() -> None:
    with pytest.raises(ArgumentError, match="1048576 bytes; the limit is 65536"):
        encode("a " * 2**19)
    with pytest.raises(ArgumentError, match="a word of 60000 characters"):
        encode("a" * 60000)


def test_no_prompts_are_an_empty_batch() -> None:
    assert tokenize([]).shape == (0, 77)
    assert tokenize([]).dtype == torch.long


def test_the_vocabulary_is_read_without_importing_open_clip() -> None:
    program = (
        "import sys, ldm.conditioning.tokenizer as t; t.encode('a cat'); "
        "assert not {'open_clip', 'torchvision', 'timm'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
