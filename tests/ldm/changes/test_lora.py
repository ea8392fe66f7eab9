"""LoRA: every kind against plain algebra, and what a merge may not touch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import weights
from benchmarks.models.seeded import normal
from ldm.changes.lora import (
    Change,
    Changes,
    Decomposed,
    Full,
    Generalised,
    Hadamard,
    Kronecker,
    LowRank,
    apply,
    delta,
    merge,
)
from ldm.errors import ArgumentError
from tests.made.loras import Q, close, model, same_bits, state

WEIGHT, KERNEL = normal("w", (12, 8)), normal("k", (12, 8, 3, 3))


# --- the kinds, recomputed in float64 ---------------------------------------------------------------------------------


def test_lora_of_a_matrix_is_up_times_down_times_alpha_over_rank():
    down, up = normal("d", (4, 8)), normal("u", (12, 4))
    exact = sum(torch.outer(up.double()[:, i], down.double()[i]) for i in range(4))
    assert close(delta(LowRank(down, up, 2.0), WEIGHT), exact * 2 / 4)
    assert close(delta(LowRank(down, up), WEIGHT), exact)  # no alpha: alpha is the rank
    assert close(
        delta(LowRank(down[:, :, None, None], up[:, :, None, None]), WEIGHT), exact
    )  # stored as 1x1 convolutions
    assert torch.equal(delta(LowRank(down, up), WEIGHT[:, :, None, None])[:, :, 0, 0], delta(LowRank(down, up), WEIGHT))


@pytest.mark.parametrize("mid", [False, True])
def test_lora_of_a_convolution_does_what_its_layers_do_in_a_row(mid: bool):
    """The factors as the layers that they were trained as: a convolution down, perhaps one between, a 1x1 one up."""
    x = normal("x", (1, 8, 6, 6)).double()
    down, up, core = (
        normal("d", (4, 8, 1, 1) if mid else (4, 8, 3, 3)),
        normal("u", (12, 4, 1, 1)),
        normal("m", (4, 4, 3, 3)),
    )
    layers = (
        F.conv2d(F.conv2d(F.conv2d(x, down.double()), core.double()), up.double())
        if mid
        else F.conv2d(F.conv2d(x, down.double()), up.double())
    )
    made = delta(LowRank(down, up, 6.0, core if mid else None), KERNEL)
    assert made.shape == KERNEL.shape
    assert close(F.conv2d(x, made.double()).float(), layers * 6 / 4)


@pytest.mark.parametrize("weight", [WEIGHT, KERNEL], ids=["matrix", "kernel"])
def test_loha_is_the_elementwise_product_of_two(weight: Tensor):
    n = weight[0].numel()
    a, b, c, d = normal("1a", (12, 3)), normal("1b", (3, n)), normal("2a", (12, 3)), normal("2b", (3, n))
    exact = torch.from_numpy(
        np.matmul(a.double().numpy(), b.double().numpy()) * np.matmul(c.double().numpy(), d.double().numpy())
    ).reshape(weight.shape)
    assert close(delta(Hadamard(a, b, c, d, 1.5), weight), exact * 1.5 / 3)


def test_loha_of_a_convolution_may_be_two_tucker_products():
    a, b, c, d = normal("1a", (3, 12)), normal("1b", (3, 8)), normal("2a", (3, 12)), normal("2b", (3, 8))
    t1, t2 = normal("t1", (3, 3, 3, 3)), normal("t2", (3, 3, 3, 3))
    exact = torch.empty(12, 8, 3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            exact[:, :, i, j] = (a.double().T @ t1[:, :, i, j].double() @ b.double()) * (
                c.double().T @ t2[:, :, i, j].double() @ d.double()
            )
    assert close(delta(Hadamard(a, b, c, d, 2.0, t1, t2), KERNEL), exact * 2 / 3)


def blocks(one: Tensor, two: Tensor) -> Tensor:
    """The Kronecker product, block by block; `two` may be a kernel."""
    return torch.cat([torch.cat([one[i, j] * two for j in range(one.shape[1])], 1) for i in range(one.shape[0])], 0)


def test_lokr_is_a_kronecker_product_whose_alpha_counts_only_with_factors():
    w1, w2, kernel = normal("w1", (3, 2)), normal("w2", (4, 4)), normal("w2k", (4, 4, 3, 3))
    a1, b1, a2, b2, b2k = (
        normal("a1", (3, 2)),
        normal("b1", (2, 2)),
        normal("a2", (4, 2)),
        normal("b2", (2, 4)),
        normal("b2k", (2, 36)),
    )
    core, out, into = normal("t", (2, 2, 3, 3)), normal("to", (2, 4)), normal("ti", (2, 4))
    tucker = torch.stack(
        [
            torch.stack([out.double().T @ core[:, :, i, j].double() @ into.double() for j in range(3)], -1)
            for i in range(3)
        ],
        -2,
    )
    half = 0.5 / 2  # alpha / rank
    for change, weight, exact in (
        (Kronecker(w1, w2, 0.5), WEIGHT, blocks(w1.double(), w2.double())),
        (Kronecker(w1, kernel, 0.5), KERNEL, blocks(w1.double(), kernel.double())),
        (Kronecker((a1, b1), w2, 0.5), WEIGHT, blocks(a1.double() @ b1.double(), w2.double()) * half),
        (
            Kronecker((a1, b1), (a2, b2), 0.5),
            WEIGHT,
            blocks(a1.double() @ b1.double(), a2.double() @ b2.double()) * half,
        ),
        (
            Kronecker(w1, (a2, b2k), 0.5),
            KERNEL,
            blocks(w1.double(), (a2.double() @ b2k.double()).reshape(4, 4, 3, 3)) * half,
        ),
        (Kronecker(w1, (out, into), 0.5, core), KERNEL, blocks(w1.double(), tucker) * half),
    ):
        assert close(delta(change, weight), exact)


def test_glora_follows_the_weight():
    a1, a2, b1, b2 = normal("a1", (8, 2)), normal("a2", (2, 8)), normal("b1", (12, 2)), normal("b2", (2, 8))
    exact = WEIGHT.double() @ (a1.double() @ a2.double()) + b1.double() @ b2.double()
    assert close(delta(Generalised(a1, a2, b1, b2, 1.0), WEIGHT), exact / 2)
    kernel = normal("b2k", (2, 8, 3, 3))
    x = normal("x", (1, 8, 6, 6)).double()
    mixed = F.conv2d(
        x, (a1.double() @ a2.double())[:, :, None, None]
    )  # every pixel's channels, then the convolution itself
    layers = F.conv2d(mixed, KERNEL.double()) + F.conv2d(F.conv2d(x, kernel.double()), b1.double()[:, :, None, None])
    made = delta(Generalised(a1, a2, b1, kernel), KERNEL)
    assert close(F.conv2d(x, made.double()).float(), layers)


@pytest.mark.parametrize("weight", [WEIGHT, KERNEL], ids=["matrix", "kernel"])
@pytest.mark.parametrize("per", ["input", "output"])
def test_dora_gives_columns_their_trained_lengths(weight: Tensor, per: str):
    inner = LowRank(normal("d", (4, *weight.shape[1:])), normal("u", (12, 4)), 2.0)
    lengths = normal("m", (8 if per == "input" else 12,)).abs() + 0.5
    changed = (weight.double() + delta(inner, weight).double()).clone()
    for i, length in enumerate(lengths.double()):
        part = changed[:, i] if per == "input" else changed[i]
        part *= length / math.sqrt(sum(float(value) ** 2 for value in part.flatten()))
    made = delta(Decomposed(inner, lengths[None] if per == "input" else lengths[:, None]), weight)
    assert close(weight + made, changed)


def test_dora_leaves_a_column_of_zeros_at_zero():
    still = Full(torch.zeros(3, 2))
    assert torch.equal(delta(Decomposed(still, torch.ones(1, 2)), torch.zeros(3, 2)), torch.zeros(3, 2))


BAD: dict[str, tuple[Change, tuple[int, ...], str]] = {
    "another weight": (LowRank(torch.ones(4, 8), torch.ones(12, 4)), (12, 9), r"\[12, 8\], the model's is \[12, 9\]"),
    "another kernel": (
        LowRank(torch.ones(4, 8, 3, 3), torch.ones(12, 4)),
        (12, 8, 1, 1),
        r"\[12, 8, 3, 3\], the model's is \[12, 8, 1, 1\]",
    ),
    "ranks": (
        LowRank(torch.ones(4, 8), torch.ones(12, 3)),
        (12, 8),
        r"ranks of down and up do not fit: \[4, 8\], \[12, 3\]",
    ),
    "rank 0": (LowRank(torch.ones(0, 8), torch.ones(12, 0)), (12, 8), "rank is 0"),
    "vectors": (LowRank(torch.ones(8), torch.ones(12)), (12, 8), "down and up do not fit"),
    "mid": (
        LowRank(torch.ones(4, 8), torch.ones(12, 4), mid=torch.ones(3, 4, 3, 3)),
        (12, 8, 3, 3),
        "ranks of mid, up and down",
    ),
    "two products": (
        Hadamard(torch.ones(12, 2), torch.ones(2, 8), torch.ones(12, 2), torch.ones(2, 9)),
        (12, 8),
        "the two products",
    ),
    "loha ranks": (
        Hadamard(torch.ones(12, 2), torch.ones(2, 8), torch.ones(12, 3), torch.ones(3, 8)),
        (12, 8),
        "w1_b and w2_b",
    ),
    "tucker": (
        Kronecker(torch.ones(2, 2), (torch.ones(2, 6), torch.ones(2, 4)), t2=torch.ones(2, 3, 3, 3)),
        (12, 8, 3, 3),
        "Tucker core",
    ),
    "lokr": (Kronecker(torch.ones(2, 2, 2), torch.ones(6, 4)), (12, 8), "w1 and w2"),
    "lokr pair": (Kronecker((torch.ones(2, 3), torch.ones(2, 2)), torch.ones(6, 4)), (12, 8), "pair of factors"),
    "glora": (
        Generalised(torch.ones(9, 2), torch.ones(2, 9), torch.ones(12, 2), torch.ones(2, 8)),
        (12, 8),
        "a1, a2 and the weight",
    ),
    "glora ranks": (
        Generalised(torch.ones(8, 2), torch.ones(2, 8), torch.ones(12, 3), torch.ones(2, 8)),
        (12, 8),
        "the ranks of a1",
    ),
    "glora vectors": (
        Generalised(torch.ones(8), torch.ones(8), torch.ones(12), torch.ones(8)),
        (12, 8),
        "a1, a2, b1, b2 do not fit",
    ),
    "difference": (Full(torch.ones(8, 12)), (12, 8), r"\[8, 12\], the model's is \[12, 8\]"),
    "magnitudes": (Decomposed(Full(torch.ones(12, 8)), torch.ones(9, 1)), (12, 8), r"magnitudes are \[9, 1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_factors_that_do_not_fit_are_refused_with_their_shapes(case: str):
    change, shape, what = BAD[case]
    with pytest.raises(ArgumentError, match=what):
        delta(change, torch.ones(shape))


# --- merging ----------------------------------------------------------------------------------------------------------


def changes(seed: str, name: str = "a", r: int = 4) -> Changes:
    return Changes({Q: LowRank(normal(f"{seed} d", (r, 32)), normal(f"{seed} u", (32, r)), 2.0)}, name)


def test_a_merge_changes_only_what_the_lora_names_and_reports_it():
    tiny = model()
    before = state(tiny)
    merged = merge(tiny, [(changes("one", "style.safetensors"), 0.8)])
    assert merged.parameters == (Q,)
    assert merged.lines == ("style.safetensors at 0.8: 1 of 1 modules",)
    after = state(tiny)
    assert close(after.pop(Q), before[Q].double() + 0.8 * delta(changes("one")[Q], before[Q]).double())
    before.pop(Q)
    assert same_bits(before, after)


def test_two_loras_add_up_in_any_order():
    a, b = changes("one"), changes("two", r=2)
    tiny, other, base = model(), model(), model().state_dict()[Q]
    merge(tiny, [(a, 0.8), (b, -0.5)])
    merge(other, [(b, -0.5), (a, 0.8)])
    assert close(
        tiny.state_dict()[Q], base.double() + 0.8 * delta(a[Q], base).double() - 0.5 * delta(b[Q], base).double()
    )
    assert same_bits(state(tiny), state(other))


@pytest.mark.parametrize(
    ("values", "result"),
    [
        (
            (2.0**-12,) * 3,
            1 + 2.0**-10,
        ),  # 1 + 2^-12 is 1: only a sum of three, made before rounding, reaches the next number
        ((2048.0, 0.5, -2048.0), 1.5),  # 2048.5 is 2048
    ],
)
def test_several_loras_are_summed_in_float32_before_one_rounding(values: tuple[float, ...], result: float):
    """In float16 these sums come out as 1."""
    tiny = model().half()
    tiny.get_parameter(Q).fill_(1)
    loras = [Changes({Q: Full(torch.full((32, 32), value, dtype=torch.float16))}) for value in values]
    merge(tiny, [(lora, 1) for lora in loras])
    assert tiny.dtype == torch.float16
    assert torch.equal(tiny.get_parameter(Q), torch.full((32, 32), result, dtype=torch.float16))


def test_factors_of_half_precision_are_multiplied_in_float32():
    down, up = (torch.full(shape, 1 + 2.0**-10, dtype=torch.float16) for shape in ((1, 32), (32, 1)))
    assert torch.equal(delta(LowRank(down, up), torch.zeros(32, 32)), torch.full((32, 32), (1 + 2.0**-10) ** 2))


def test_scale_zero_leaves_every_bit():
    tiny = model()
    tiny.get_parameter(Q).view(-1)[:2] = torch.tensor([-0.0, math.inf])
    before = state(tiny)
    assert merge(tiny, [(changes("one"), 0.0)]).parameters == ()
    assert same_bits(before, state(tiny))


def test_a_negative_scale_takes_back_what_a_positive_one_gave():
    tiny = model()
    base = tiny.get_parameter(Q).detach().clone()
    apply(tiny, changes("one"), 1.0)
    moved = tiny.get_parameter(Q).detach().clone()
    apply(tiny, changes("one"), -1.0)
    assert not torch.equal(moved, base)
    assert (tiny.get_parameter(Q) - base).abs().max() <= 2 * 2**-24 * moved.abs().max() + 2**-24 * base.abs().max()


def test_the_old_tensors_and_the_file_they_are_mapped_from_keep_their_values(tmp_path):
    path = tmp_path / "tiny.safetensors"
    weights.save(model(), path)
    data, tiny = path.read_bytes(), weights.load(path)
    old = tiny.get_parameter(Q)
    values = old.detach().clone()
    apply(tiny, changes("one"))
    assert path.read_bytes() == data
    assert torch.equal(old, values)
    assert tiny.get_parameter(Q) is not old
    assert not tiny.get_parameter(Q).requires_grad
    assert tiny.unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight is tiny.get_parameter(Q)


@pytest.mark.parametrize(
    ("lora", "scale", "what"),
    [
        (changes("one"), math.nan, "nan is no finite number"),
        (changes("one"), "1", "'1' is no finite number"),
        (
            Changes({Q: Full(torch.ones(32, 31))}),
            1.0,
            r"to_q.weight: it changes a weight of \[32, 31\], the model's is \[32, 32\]",
        ),
        (Changes({"unet.nothing.weight": Full(torch.ones(1))}), 1.0, "has no parameter unet.nothing.weight"),
    ],
)
def test_nothing_is_merged_when_one_of_two_does_not_fit(lora: Changes, scale: float, what: str):
    tiny = model()
    before = state(tiny)
    with pytest.raises(ArgumentError, match=what):
        merge(tiny, [(changes("two"), 1.0), (lora, scale)])
    assert same_bits(before, state(tiny))
