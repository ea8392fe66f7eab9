"""A load holds the weights once: measured as the growth of a fresh process, at 200 MB here and at full size under `-m
slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.models.published import manifest, original_name, seeded, tiny
from benchmarks.models.seeded import weight
from ldm.config import FAMILIES, UNetConfig
from ldm.model import LatentDiffusion
from tests.made.checkpoints import TINY, lightning, save_safetensors, save_stream, save_zip
from weights import load, original_state
from weights.names.metadata import CONFIG_KEY, to_json

ROOT = Path(__file__).parents[2]
MB = 2**20

MEASURE = """
import json, sys, time
import torch
import weights
from weights.names.metadata import from_json
torch.set_num_threads(1)

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

path, config, dtype = sys.argv[1:]
base, start = peak(), time.perf_counter()
model = weights.load(path, from_json(config) if config else None, dtype=getattr(torch, dtype))
seconds, loaded = time.perf_counter() - start, peak()
for parameter in model.parameters():
    parameter.view(-1)[::256].sum()  # touches every page
print(json.dumps({"base": base, "load": loaded, "used": peak(), "seconds": seconds}))
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def measure(path: Path, dtype: str, config: str = "") -> dict[str, float]:
    """Peak resident bytes of a fresh process: with everything imported, after the load, and after all weights were
    used."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), config, dtype], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def within(path: Path, dtype: str, config: str, bound: float) -> dict[str, float]:
    """What `measure` gives, and where that is beyond the bound, what it gives the second time: on a busy machine the
    file's pages stay longer. Weights that are held twice are held twice each time."""
    figures = measure(path, dtype, config)
    return figures if figures["used"] - figures["base"] < bound else measure(path, dtype, config)


@pytest.fixture(scope="module")
def wide():
    """A model of 100 million parameters, 200 MB in float16, with tensors of no more than 30 MB."""
    unet = UNetConfig(model_channels=128, heads=4, context_dim=64)
    config = replace(TINY, unet=unet)
    with torch.device("meta"):
        names = {original_name(name): value.shape for name, value in LatentDiffusion(config).state_dict().items()}
    return to_json(config), {name: torch.zeros(shape, dtype=torch.float16) for name, shape in names.items()}


@linux
@pytest.mark.parametrize("kind", ["safetensors", "zip", "stream"])
def test_a_load_holds_the_weights_once(kind, wide, tmp_path):
    config, state = wide
    path = tmp_path / "x.ckpt"
    {
        "safetensors": lambda: save_safetensors(state, path, {CONFIG_KEY: config}),
        "zip": lambda: save_zip(state, path),
        "stream": lambda: save_stream(state, path),
    }[kind]()
    size = path.stat().st_size
    assert size > 180e6
    slack = 50 * MB
    same = within(path, "float16", config, size + slack)
    wider = within(path, "float32", config, 2 * size + slack)
    path.unlink()
    assert same["used"] - same["base"] < size + slack
    if kind != "stream":  # mapped: nothing is resident before it is used
        assert same["load"] - same["base"] < slack
    assert wider["used"] - wider["base"] < 2 * size + slack


@linux
@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_a_load_holds_stacked_and_transposed_weights_once(kind, tmp_path):
    """A text tower of OpenCLIP, whose matrices are read in thirds: 76 million parameters."""
    config = replace(
        tiny("sd2-base"),
        text=(replace(FAMILIES["sd2-base"].text[0], vocab=512, width=512, heads=8, mlp=2048, projection=512),),
    )
    with torch.device("meta"):
        model = LatentDiffusion(config)
    state = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in original_state(model).items()}
    path = tmp_path / "x.ckpt"
    save_safetensors(state, path, {CONFIG_KEY: to_json(config)}) if kind == "safetensors" else save_zip(state, path)
    size = path.stat().st_size
    assert size > 150e6
    slack = 100 * MB  # to hold the file or the stacks a second time would take 150 MB
    same = within(path, "float16", to_json(config), size + slack)
    wider = within(path, "float32", to_json(config), 2 * size + slack)
    path.unlink()
    assert same["used"] - same["base"] < size + slack
    assert same["load"] - same["base"] < slack  # mapped: nothing is resident before it is used
    assert wider["used"] - wider["base"] < 2 * size + slack


# -- full size ---------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16 safetensors", "float32 ckpt with Lightning extras", "float32 stream"])
def test_a_full_size_checkpoint_loads_bit_by_bit_in_bounded_memory(kind, tmp_path, capsys):
    half = kind.startswith("float16")
    state = seeded(manifest("sd1-pruned-fp16" if half else "sd1"))
    path = tmp_path / ("x.safetensors" if half else "x.ckpt")
    if half:
        save_safetensors(state, path)
        assert path.stat().st_size == 2_132_625_894  # as DreamShaper_8_pruned.safetensors, which has these tensors
    else:
        with lightning(state) as contents:
            (save_stream if "stream" in kind else save_zip)(contents, path)
    dtype = torch.float16 if half else torch.float32
    del state
    size = path.stat().st_size
    figures = measure(path, str(dtype).removeprefix("torch."))
    with capsys.disabled():
        shown = ", ".join(f"{key} {value / MB:.0f} MiB" for key, value in figures.items() if key != "seconds")
        print(f"\n{kind}: file {size / MB:.0f} MiB, loaded in {figures['seconds']:.1f} s; peak resident: {shown}")
    if "stream" not in kind:  # whose tensors lie at odd places and must be copied
        assert figures["load"] < size + 0.5e9  # everything counted, torch itself included
    assert figures["used"] - figures["base"] < size + 50 * MB
    model = load(path, dtype=dtype)
    assert model.config == FAMILIES["sd1"]
    for name, value in model.state_dict().items():
        assert value.equal(weight(original_name(name), value.shape).to(dtype)), name
    path.unlink()
