"""`ldm prune`: what it writes, what it says, and what it refuses before it reads a weight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weights
from ldm.changes import surgery
from ldm.config import FAMILIES
from tests.made.sparse import published
from weights.checkpoint import described
from weights.models import embedded


def test_half_of_the_model_that_ships_is_written_loads_and_is_recognised(ldm, tmp_path: Path):
    out = tmp_path / "half.safetensors"
    code, lines, err = ldm(f"prune {embedded()} {out} --plan half --dtype bf16")
    assert (code, err) == (0, [])
    assert lines == [f"{out}: a UNet of 5.9 million parameters, 55.3% of 10.7; a model of family blocks"]
    meant = surgery.prune(weights.load(dtype=torch.bfloat16), "half")
    small, state = weights.load(out, dtype=torch.bfloat16), meant.state_dict()
    assert small.config == meant.config
    assert all(value.equal(state[name]) for name, value in small.state_dict().items())
    with weights.open_file(out) as file:
        assert {spec.dtype for spec in file.specs.values()} == {torch.bfloat16}
    (family,) = [line.split()[1] for line in ldm(f"inspect {out}")[1] if line.split()[0] == "family"]
    assert family == "blocks"


def test_what_cannot_be_pruned_is_refused_before_any_weight_is_read(
    ldm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def read(*given, **named):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("ldm.changes.surgery.prune", read)
    source = embedded()
    (tmp_path / "there.safetensors").write_bytes(b"x")
    for line, said in {
        f"{source} {tmp_path / 'x.safetensors'} --plan third": "--plan: invalid choice: 'third' (choose from ",
        f"{source} {tmp_path / 'x.safetensors'} --plan ssd-1b": "plan: 'ssd-1b' is for SDXL base, this is a model of "
        "family blocks; use 'half'",
        f"{tmp_path / 'none.safetensors'} {tmp_path / 'x.safetensors'} --plan half": "none.safetensors: does not exist",
        f"{tmp_path / 'there.safetensors'} {tmp_path / 'x.safetensors'} --plan half": "there.safetensors: ",
    }.items():
        code, out, (error,) = ldm(f"prune {line}")
        assert (code, out) == (2, [])
        assert said in error
    code, _, (error,) = ldm(f"prune {source} {tmp_path / 'there.safetensors'} --plan half")
    assert code == 3
    assert "exists already; choose another name or --overwrite" in error
    code, _, (error,) = ldm(f"prune {source} {tmp_path / 'none' / 'x.safetensors'} --plan half")
    assert code == 3
    assert not (tmp_path / "x.safetensors").exists()


PRUNE = """
import sys
from benchmarks.machine import peak_memory
from ldm.__main__ import main
code = main(["prune", sys.argv[1], sys.argv[2], "--plan", "ssd-1b"])
print(peak_memory())
sys.exit(code)
"""


@pytest.mark.slow
def test_sdxl_at_its_full_size_becomes_ssd_1b_in_12_gb_of_memory(tmp_path: Path):
    """In float16, from a mapped file: what is mapped counts, too."""
    source, out = published("sdxl-base", tmp_path / "xl.safetensors"), tmp_path / "small.safetensors"
    run = subprocess.run([sys.executable, "-c", PRUNE, source, out], capture_output=True, text=True, check=True)
    said, peak = run.stdout.splitlines()
    print(f"peak {int(peak) / 1e9:.2f} GB")
    assert said == f"{out}: a UNet of 1331.3 million parameters, 51.9% of 2567.5; a model of family ssd-1b"
    assert int(peak) < 12e9
    assert weights.config_of(out) == FAMILIES["ssd-1b"]
    with weights.open_file(out) as file:
        del file.metadata["ldm.config"]  # by its shapes alone, as other programs know it
        assert described(file).config == FAMILIES["ssd-1b"]
