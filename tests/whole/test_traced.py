"""How much of the house takes part in one small picture is counted rightly, and stays within what was decided."""

from __future__ import annotations

import pytest

from tests.whole.traced import LIMITS, MODULE_LIMITS, Count, counts, lengths, taking_part

# The limits that are met, by name in LIMITS or MODULE_LIMITS. What is met once stays so.
HELD: dict[str, tuple[str, ...]] = {
    "files": ("python", "reading", "txt2img"),
    "lines": ("python", "reading", "txt2img"),
    "imported": ("reading", "txt2img"),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Count]:
    return counts(tuple(LIMITS))


def test_what_takes_part_is_what_was_executed(found):
    parts = taking_part(found)
    assert {"samplers/dpmpp.py", "ldm/denoiser.py", "ldm/networks/vae.py"} <= {*parts["python"]} & {*parts["txt2img"]}
    assert not {*parts["python"]} & {*parts["reading"]}
    assert "ldm/__main__.py" in parts["txt2img"]
    assert all(file in found["txt2img"].imported for file in parts["txt2img"])
    assert "samplers/unipc.py" not in parts["txt2img"]  # imported at most


def test_limits_that_are_met_stay_so(found):
    parts, length = taking_part(found), lengths()
    taken = {
        "files": {name: len(files) for name, files in parts.items()},
        "lines": {name: sum(length[file] for file in files) for name, files in parts.items()},
        "imported": {name: len(each.imported) for name, each in found.items()},
    }
    limits = {
        "files": {name: files for name, (files, _) in LIMITS.items()},
        "lines": {name: lines for name, (_, lines) in LIMITS.items()},
        "imported": MODULE_LIMITS,
    }
    for what, names in HELD.items():
        for name in names:
            assert taken[what][name] <= limits[what][name], (what, name)
