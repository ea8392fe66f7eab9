"""The C++ operations against their meaning in float64, with as many lanes as any processor has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.seeded import normal, weight
from ldm.fast import compiler, cpu, plain
from tests.made.kernels import compiled_only

EPS = torch.finfo(torch.float32).eps

pytestmark = compiled_only


@pytest.fixture(params=[None, 4, 8, 16], ids=["native", "4 lanes", "8 lanes", "16 lanes"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The library for vectors of so many floats, which the compiler splits where the processor has shorter ones."""
    if request.param is not None:
        library = cpu.prepared(compiler.compiled("cpu.cpp", f"-DLANES={request.param}"))
        assert library.ldm_lanes() == request.param
        monkeypatch.setattr(cpu, "library", lambda: library)
    return request.param


@pytest.fixture(params=[1, 2, 5], ids=["1 thread", "2 threads", "5 threads"])
def threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def filled(module: nn.Module) -> nn.Module:
    module.load_state_dict({name: weight(name, value.shape) for name, value in module.state_dict().items()})
    return module.requires_grad_(False)


def close(ours: Tensor, exact: Tensor, terms: int, size: Tensor | float = 1.0) -> None:
    """Within the rounding of a sum of so many terms: 4 sqrt(terms) units in the last place of the sum of their absolute
    values, `size`."""
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    assert ours.is_contiguous()
    allowed = 4 * EPS * terms**0.5 * size + EPS * exact.abs()
    assert ((ours.double() - exact).abs() <= allowed).all(), ((ours.double() - exact).abs() / allowed).max()


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (7, 33, 17), (100, 64, 48), (2, 900, 40), (300, 30, 330)]
)
@pytest.mark.parametrize("extras", [False, True], ids=["", "bias and residual"])
def test_linear(lanes: int | None, threads: None, rows: int, inputs: int, outputs: int, extras: bool) -> None:
    x, w = normal("x", (1, rows, inputs)), normal("w", (outputs, inputs))
    bias, add = (normal("bias", (outputs,)), normal("add", (1, rows, outputs))) if extras else (None, None)
    given = [None if t is None else t.double() for t in (x, w, bias, add)]
    size = plain.linear(*(None if t is None else t.abs() for t in given))
    close(cpu.linear(x, w, bias, add), plain.linear(*given), inputs, size)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (7, 33, 17), (50, 500, 40)])
def test_geglu(lanes: int | None, threads: None, rows: int, inputs: int, outputs: int) -> None:
    x, w, bias = normal("x", (rows, inputs)), normal("w", (2 * outputs, inputs)), 20 * normal("bias", (2 * outputs,))
    projected = torch.nn.functional.linear(x.double().abs(), w.double().abs(), bias.double().abs())
    value, gate = projected.chunk(2, dim=-1)
    close(
        cpu.geglu(x, w, bias), plain.geglu(x.double(), w.double(), bias.double()), inputs, 4 * value * gate.clamp_min(1)
    )  # |gelu'| < 1.13


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((1, 1, 1, 16), 16), ((2, 5, 7, 32), 48), ((1, 8, 8, 20), 33), ((3, 2, 9, 130), 16), ((1, 40, 40, 64), 64)],
)
@pytest.mark.parametrize("kind", ["nothing", "embedding", "residual"])
def test_conv(lanes: int | None, threads: None, shape: tuple[int, ...], outputs: int, kind: str) -> None:
    b, h, w, c = shape
    x, conv = normal("x", shape), filled(nn.Conv2d(c, outputs, 3, padding=1))
    add = {"nothing": None, "embedding": normal("add", (b, outputs)), "residual": normal("add", (b, h, w, outputs))}[
        kind
    ]
    close(
        cpu.conv(x, conv, add),
        plain.conv(x.double(), double(conv), None if add is None else add.double()),
        9 * c,
        sizes(x, conv) + 4,
    )


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1, 1, 16), (2, 2)),
        ((2, 3, 4, 32), (6, 8)),
        ((1, 3, 4, 20), (5, 8)),
        ((1, 4, 3, 33), (7, 5)),
        ((1, 2, 2, 16), (3, 3)),
    ],
)
def test_conv_up(lanes: int | None, threads: None, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    x, conv = normal("x", shape), filled(nn.Conv2d(shape[-1], 24, 3, padding=1))
    close(cpu.conv_up(x, conv, size), plain.conv_up(x.double(), double(conv), size), 9 * shape[-1], 16.0)


def sizes(x: Tensor, conv: nn.Conv2d) -> float:
    """The largest sum of absolute values that Winograd's algorithm forms: its transforms add up to four inputs, nine
    weights, nine products."""
    kernel = conv.weight.double().abs().flatten(1).sum(1).max()
    return float(x.double().abs().max() * kernel) * 4


@pytest.mark.parametrize(
    ("n", "m", "heads", "d"), [(1, 1, 1, 1), (5, 77, 2, 40), (100, 300, 3, 20), (300, 600, 1, 64), (3, 17, 2, 160)]
)
def test_attend(lanes: int | None, threads: None, n: int, m: int, heads: int, d: int) -> None:
    q, k, v = 2 * normal("q", (2, n, heads * d)), normal("k", (2, m, heads * d)), normal("v", (2, m, heads * d))
    largest = float(
        (q.abs().max() * k.abs().max() * d) ** 0.5
    )  # of a score, which rounding moves by so many units in its last place
    close(
        cpu.attend(q, k, v, heads),
        plain.attend(q.double(), k.double(), v.double(), heads),
        m,
        float(v.abs().max()) * largest,
    )


def test_attention_to_very_different_keys_is_that_to_the_best_one() -> None:
    q, k, v = torch.full((1, 2, 16), 50.0), normal("k", (1, 700, 16)), normal("v", (1, 700, 16))
    k[0, 650] = 9.0  # found after 600 others: all that was summed until then is forgotten
    assert torch.equal(cpu.attend(q, k, v, 1), v[:, 650:651].expand(1, 2, 16))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "mean"), [((1, 2, 32), 0.0), ((2, 3, 5, 64), 1.0), ((1, 700, 96), 300.0), ((3, 65, 32), -1e4)]
)
def test_norm(lanes: int | None, threads: None, shape: tuple[int, ...], mean: float, silu: bool) -> None:
    x, norm = normal("x", shape) + mean, filled(nn.GroupNorm(32, shape[-1]))
    exact = plain.norm(x.double(), double(norm), silu)
    close(
        cpu.norm(x, norm, silu), exact, 1, 8 + 4 * abs(mean)
    )  # x times a factor, less the mean times it: the digits that both have are lost


def test_a_number_that_is_none_is_not_lost() -> None:
    x, nan = normal("x", (1, 4, 4, 32)), float("nan")
    x[0, 1, 2, 3] = nan
    assert cpu.conv(x, filled(nn.Conv2d(32, 32, 3, padding=1)))[0, 0:3, 1:4].isnan().all()
    assert cpu.norm(x, filled(nn.GroupNorm(32, 32)), silu=True)[..., 3].isnan().all()
    assert cpu.linear(x, normal("w", (16, 32)))[0, 1, 2].isnan().all()
    assert cpu.geglu(x, normal("w", (32, 32)), torch.zeros(32))[0, 1, 2].isnan().all()
    assert cpu.attend(x.flatten(1, 2), normal("k", (1, 9, 32)), normal("v", (1, 9, 32)), 2)[0, 6, :16].isnan().all()


def test_the_same_numbers_come_out_every_time() -> None:
    x, conv = normal("x", (2, 16, 16, 64)), filled(nn.Conv2d(64, 64, 3, padding=1))
    assert torch.equal(cpu.conv(x, conv), cpu.conv(x, conv))


def test_what_the_kernels_do_not_take_is_an_error_not_a_wrong_number() -> None:
    with pytest.raises(
        TypeError, match=r"^ldm_linear: torch.float64 on cpu; these operations are for float32 on the CPU$"
    ):
        cpu.linear(normal("x", (4, 8)).double(), normal("w", (8, 8)))
    x, w = normal("x", (8, 4)), normal("w", (4, 6))
    close(cpu.linear(x, w.t()), plain.linear(x.double(), w.t().double()), 4, 16.0)


def test_a_lack_of_memory_is_a_python_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __getattr__(self, name: str):
            return lambda *_: 1

    monkeypatch.setattr(cpu, "library", Full)
    with pytest.raises(MemoryError, match=r"^ldm_norm: no memory for its working space$"):
        cpu.norm(normal("x", (1, 4, 32)), nn.GroupNorm(32, 32))
