"""The GroupNorm of training against its plain meaning."""

import pytest
import torch
from torch import nn

from benchmarks.models.seeded import normal
from ldm.fast import fast_group_norms


@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 32, 5, 7), (1, 96, 1, 1)])
def test_the_fast_group_norm_has_the_value_and_the_gradient_of_the_plain_one(shape: tuple[int, ...]) -> None:
    plain = nn.GroupNorm(32, shape[1], dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(normal("weight", plain.weight.shape))
        plain.bias.copy_(normal("bias", plain.bias.shape))
    x = (3 * normal("x", shape).double() + 1).requires_grad_()
    dy = normal("dy", shape).double()
    inputs = [x, plain.weight, plain.bias]
    y = plain(x)
    expected = torch.autograd.grad(y, inputs, dy)
    fast = fast_group_norms(nn.Sequential(plain))
    assert torch.equal(fast(x), y)
    for ours, theirs in zip(torch.autograd.grad(fast(x), inputs, dy), expected, strict=True):
        assert torch.allclose(
            ours, theirs, rtol=1e-9, atol=1e-9
        )  # float64: 1e-16 times the few thousand terms of a sum


def test_the_fast_group_norm_passes_the_numerical_gradient_check() -> None:
    norm = fast_group_norms(nn.Sequential(nn.GroupNorm(2, 4, dtype=torch.float64)))
    assert torch.autograd.gradcheck(norm, normal("x", (2, 4, 2, 3)).double().requires_grad_())
