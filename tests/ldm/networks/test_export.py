"""The readable networks export, and compile as one graph: what comes out is bit for bit what they compute as they
are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.golden import tiny_safety
from benchmarks.models.seeded import normal
from ldm.model import LatentDiffusion
from tests.made.families import build, tiny

model = cache(lambda family: build(tiny(family)))


class Calls(nn.Module):
    """A method of a network as a module of its own, which is what torch.export takes."""

    def __init__(self, network: nn.Module, method: str):
        super().__init__()
        self.network, self.method = network, method

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.network, self.method)(*inputs)


def unet(family: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = tiny(family).unet
    x, t = normal("x", (2, config.in_channels, 6, 10)), torch.tensor([3.0, 801.5])
    context = normal("context", (2, 7, config.context_dim))
    if config.noise_levels is not None:
        return model(family).unet, (x, t, context, torch.tensor([20, 35]))
    if config.vector_dim is not None:
        return model(family).unet, (x, t, context, normal("y", (2, config.vector_dim)))
    return model(family).unet, (x, t, context)


def text(of: LatentDiffusion) -> tuple[nn.Module, tuple[Tensor, ...]]:
    ids = torch.randint(0, 49000, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 9:] = 49407
    return of.text[-1], (ids,)


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    **{f"unet of {family}": lambda family=family: unet(family) for family in ("sd1", "x4-upscaler", "sdxl-base")},
    "vae decode": lambda: (Calls(model("sd1").vae, "decode"), (normal("z", (1, 4, 4, 6)),)),
    "vae moments": lambda: (Calls(model("sd1").vae, "moments"), (normal("image", (1, 3, 32, 48)),)),
    "vae of the x4 upscaler": lambda: (Calls(model("x4-upscaler").vae, "decode"), (normal("z", (1, 4, 4, 6)),)),
    "text": lambda: text(model("sd1")),
    "text with a projection": lambda: text(model("sdxl-base")),
    "vision": lambda: (model("sd-image-variations").vision, (normal("image", (2, 3, 28, 28)),)),
    "depth": lambda: (model("sd2-depth").depth, (normal("image", (1, 3, 64, 96)),)),
    "safety": lambda: (tiny_safety(), (normal("image", (2, 3, *[tiny_safety().config.image] * 2)),)),
}


def same(a: Tensor | tuple[Tensor, ...], b: Tensor | tuple[Tensor, ...]) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(map(torch.equal, a, b))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_an_export_gives_the_same_bits(case: str) -> None:
    network, inputs = CASES[case]()
    assert same(torch.export.export(network, inputs).module()(*inputs), network(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("case", ["unet of sdxl-base", "vae decode", "text"])
def test_a_network_compiles_as_one_graph(case: str) -> None:
    torch.compiler.reset()
    network, inputs = CASES[case]()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert same(compiled(*inputs), network(*inputs))
