"""Modules exchanged for the length of a block, in readable and compiled networks; test_choice.py has a fast one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.errors import ArgumentError
from ldm.networks.attention import Attend, CrossAttention, SpatialTransformer
from ldm.networks.unet import UNet
from ldm.swap import swap
from tests.made.families import build

GIVEN = torch.ones(1, 4, 4, 4), torch.tensor([500.0]), torch.linspace(-1, 1, 77 * 64).view(1, 77, 64)


class Twice(nn.Module):
    """Another module, its result doubled."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *given: Tensor) -> Tensor:
        return 2 * self.module(*given)


def twice(path: str, module: nn.Module) -> nn.Module:
    return Twice(module)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return build().unet


def kinds(network: nn.Module) -> list[tuple[str, int]]:
    return [(path, id(module)) for path, module in network.named_modules(remove_duplicate=False)]


def attentions(network: nn.Module, name: str) -> list[CrossAttention]:
    return [module for path, module in network.named_modules() if path.endswith(f".{name}")]


def test_modules_are_exchanged_by_a_glob_and_put_back(unet):
    before, plain = kinds(unet), unet(*GIVEN)
    with swap(unet, twice, where="*.attn1.attend") as made:
        assert all(isinstance(each.attend, Twice) for each in attentions(unet, "attn1"))
        assert all(isinstance(each.attend, Attend) for each in attentions(unet, "attn2"))
        assert [id(module) for module in made.values()] == [id(each.attend) for each in attentions(unet, "attn1")]
        assert all(unet.get_submodule(path) is module for path, module in made.items())
        assert not torch.equal(unet(*GIVEN), plain)
    assert kinds(unet) == before
    assert torch.equal(unet(*GIVEN), plain)


def test_they_are_put_back_after_an_exception(unet):
    before = kinds(unet)
    with pytest.raises(RuntimeError, match="inside"), swap(unet, twice, where="*.attend"):
        raise RuntimeError("inside")
    assert kinds(unet) == before


def test_nothing_is_exchanged_where_a_replacement_cannot_be_made(unet):
    before, made = kinds(unet), []

    def second_fails(path: str, module: nn.Module) -> nn.Module:
        made.append(path)
        if len(made) == 2:
            raise RuntimeError("not this one")
        return Twice(module)

    with pytest.raises(RuntimeError, match="not this one"), swap(unet, second_fails, where="*.attend"):
        pytest.fail("the block ran")
    assert kinds(unet) == before


def test_a_function_of_path_and_module_chooses_too(unet):
    def wide(path: str, module: nn.Module) -> bool:
        return path.startswith("output_blocks.") and isinstance(module, nn.Linear) and module.out_features > 64

    with swap(unet, lambda path, module: nn.Identity(), where=wide) as made:
        assert made
        assert all(path.startswith("output_blocks.") for path in made)
        assert all(isinstance(unet.get_submodule(path), nn.Identity) for path in made)


def test_a_module_and_one_inside_it_and_one_of_two_names():
    inner = nn.Linear(2, 2)
    network = nn.Sequential(nn.Sequential(inner, nn.ReLU()), inner)
    before, x = kinds(network), torch.ones(1, 2)
    plain = inner(x.new_ones(1, 2))
    with swap(network, twice, where="0") as made, swap(network, twice, where="0.module.0"):
        assert list(made) == ["0"]
        assert torch.equal(network[0](x), 2 * torch.relu(2 * plain))
    with swap(network, twice, where=lambda path, module: path in ("0", "0.0", "1")):
        assert torch.equal(network[0](x), 2 * torch.relu(2 * plain))
        assert torch.equal(network[1](x), 2 * plain)
    assert kinds(network) == before


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("*.attn1.atend", r"no module of UNet matches '\*\.attn1\.atend'; nearest: \*\.attn1\.attend, \*\.attn2"),
        ("*.midle_block", r"nearest: \*\.middle_block,"),
        ("input_blocks.1.1.proj_inn", r"nearest: input_blocks\.1\.1\.proj_in,"),
        ("", "nearest: "),
        (lambda path, module: False, r"where: no module of UNet is chosen; nearest: out\.0, out\.1, out\.2$"),
    ],
)  # fmt: skip
def test_nothing_chosen_is_an_error_that_names_what_is_near(unet, where, message):
    with pytest.raises(ArgumentError, match=message), swap(unet, twice, where=where):
        pytest.fail("the block ran")


@pytest.fixture
def block() -> SpatialTransformer:
    """A small part of the UNet: what is compiled is traced, which takes long."""
    torch.manual_seed(0)
    block = SpatialTransformer(32, 64, heads=4, depth=1, linear_proj=True).requires_grad_(False)
    nn.init.normal_(block.proj_out.weight)
    return block


@pytest.mark.parametrize("in_place", [False, True])
def test_a_network_that_was_compiled_before_honours_it(block, in_place):
    given = torch.linspace(-1, 1, 32 * 16).view(1, 32, 4, 4), GIVEN[2]
    plain = block(*given)
    with swap(block, twice, where="*.attn1.attend"):
        expected = block(*given)
    how = {"backend": "eager", "fullgraph": True}
    network = block.compile(**how) or block if in_place else torch.compile(block, **how)
    assert torch.equal(network(*given), plain)
    with swap(network, twice, where="*.attn1.attend") as made:
        assert list(made) == ["transformer_blocks.0.attn1.attend"]
        assert torch.equal(network(*given), expected)
    assert torch.equal(network(*given), plain)
    assert not torch.equal(plain, expected)


def test_a_network_that_is_compiled_inside_has_it_only_there(block):
    given = torch.linspace(-1, 1, 32 * 16).view(1, 32, 4, 4), GIVEN[2]
    with swap(block, twice, where="*.attn1.attend"):
        network = torch.compile(block, backend="eager", fullgraph=True)
        assert torch.equal(network(*given), block(*given))
    assert torch.equal(network(*given), block(*given))
