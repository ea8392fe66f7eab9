"""Triton's kernels against float64: on a GPU with `-m gpu`, elsewhere in Triton's interpreter, in a process of its
own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.golden import fill, relative
from benchmarks.models.seeded import normal
from ldm.config import UNetConfig
from ldm.fast import gpu, plain
from ldm.fast.choice import shared
from ldm.fast.networks import FastUNet
from ldm.networks.unet import UNet
from tests.made.kernels import DEVICE, INTERPRETED, few_groups, on_the_device

pytest.importorskip("triton", reason="PyTorch comes with Triton where it comes with CUDA")

ROOT = Path(__file__).parents[3]
DTYPES = [torch.float64, torch.float16, torch.bfloat16]


if not INTERPRETED:

    def test_the_kernels_and_the_operations_on_them_are_right_in_the_interpreter() -> None:
        files = [Path(__file__), Path(__file__).with_name("test_vae_scale.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert "skipped" not in done.stdout.splitlines()[-1]

    @pytest.mark.parametrize("capability", [80, 90])
    def test_the_kernels_compile_and_every_thread_moves_16_bytes_at_once(
        capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without a GPU: Triton translates for any. What is read once per group or channel may be narrower."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        kernels, tile = gpu.kernels(), {"ROWS": 32, "COLS": 64}
        pointers = {"x": "*fp16", "y": "*fp16", "weight": "*fp16", "bias": "*fp16", "add": "*fp16"}
        pointers |= dict.fromkeys(("mean", "squares", "factor", "summand"), "*fp32")
        for kernel, constants in (
            (kernels._moments, tile),
            (kernels._fold, {"eps": 1e-5, "CHUNK": 1024}),
            (kernels._affine, {"SILU": True, **tile}),
            (kernels._layer_norm, {"eps": 1e-5, "ROWS": 2, "COLS": 1024}),
            (kernels._gated, tile),
            (kernels._plus, {"SAME": True, **tile}),
            (kernels._plus, {"SAME": False, **tile}),
        ):
            names = kernel.arg_names
            types = {name: pointers.get(name, "fp32" if name == "unit" else "i32") for name in names} | dict.fromkeys(
                constants, "constexpr"
            )
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if name in pointers or (name in ("c", "h") and kernel is not kernels._fold)
            }
            source = ASTSource(
                kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned
            )
            lines = [
                line
                for line in compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"].splitlines()
                if "ld.global" in line
            ]
            assert lines
            assert kernel is kernels._fold or all(".v4.b32" in line for line in lines), lines


def given(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return normal(name, shape).to(DEVICE, dtype)


def require_close(ours: Tensor, exact: Tensor, terms: Tensor | float) -> None:
    """Each number is computed in float32 (float64) and rounded once.

    terms  what was added up to it, each taken positive: no sum here has more than 64 roundings one after the other, of
           2^-24 (2^-53) each.
    Rounding costs 2^-11 of the result in float16 (or 2^-25, below its normal numbers), 2^-8 in bfloat16; the
    interpreter cuts bfloat16 off instead of rounding it, which costs twice as much."""
    cut = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}.get(ours.dtype, 0.0)
    inner = 64 * (2.0**-53 if ours.dtype == torch.float64 else 2.0**-24)
    least = 2.0**-25 if ours.dtype == torch.float16 else 0.0
    wrong = (ours.double() - exact).abs() - (cut * exact.abs() + inner * terms + least)
    assert wrong.max() <= 0, f"{wrong.max():.3g} more than rounding allows"


def require_group_norm(x: Tensor, groups: int, eps: float, silu: bool = False, unit: float = 1.0) -> None:
    c = x.shape[-1]
    weight, bias = given("weight", (c,), x.dtype), given("bias", (c,), x.dtype)
    ours = gpu.kernels().group_norm(x, weight, bias, groups, eps, silu=silu, unit=unit)
    assert ours.shape == x.shape
    assert ours.dtype == x.dtype
    value = (x.double() / unit).flatten(1, -2)
    grouped = value.unflatten(-1, (groups, -1))
    mean, var = grouped.mean((1, 3), keepdim=True), grouped.var((1, 3), keepdim=True, correction=0)
    a = (weight.double().view(groups, -1) / (var + eps).sqrt()).flatten(2)
    summand = bias.double() - (mean.expand(-1, -1, -1, c // groups).flatten(2)) * a
    exact = value * a + summand
    terms = (value * a).abs() + (
        bias.double().abs() + (mean.abs().expand(-1, -1, -1, c // groups).flatten(2)) * a.abs()
    )
    exact = F.silu(exact) if silu else exact
    require_close(ours.flatten(1, -2), unit * exact, unit * terms)


@on_the_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 7, 160), (1, 16, 96), (1, 1, 32)], ids=str)
def test_group_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    require_group_norm(3 * given("x", shape, dtype) + 1, 32, 1e-5, silu=True)
    require_group_norm(given("x", shape, dtype), 32, 1e-6)


@on_the_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm_over_many_tiles_and_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large pictures: parts of several tiles, the last one shorter, and more parts than are joined at once."""
    monkeypatch.setattr(gpu.kernels(), "PROGRAMS", 8)
    monkeypatch.setattr(gpu.kernels(), "CHUNK", 16)
    monkeypatch.setattr(gpu.kernels(), "ROWS", 8)
    x = given("x", (2, 150, 72), dtype)
    require_group_norm(x + torch.linspace(-4, 4, 150, device=DEVICE, dtype=dtype)[:, None], 2, 1e-6, silu=True)


@on_the_device
def test_group_norm_far_from_zero() -> None:
    """A mean of 4096 deviations: the mean of squares less the square of the mean would leave nothing of float32."""
    require_group_norm(given("x", (1, 100, 64), torch.float32) + 4096, 8, 1e-6)


@on_the_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm_in_units(dtype: torch.dtype) -> None:
    require_group_norm((3 * given("x", (2, 40, 64), dtype) + 1) / 128, 32, 1e-2, silu=True, unit=1 / 128)


@on_the_device
def test_the_group_norm_of_a_picture_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its last bit: here in two parts, whatever the batch."""
    monkeypatch.setattr(gpu.kernels(), "PROGRAMS", 2)
    x, weight, bias = (
        given("x", (2, 70, 64), torch.float16),
        given("weight", (64,), torch.float16),
        given("bias", (64,), torch.float16),
    )
    together = gpu.kernels().group_norm(x, weight, bias, 4, 1e-5, silu=True)
    for i in range(2):
        assert torch.equal(
            together[i : i + 1], gpu.kernels().group_norm(x[i : i + 1], weight, bias, 4, 1e-5, silu=True)
        )


@on_the_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 11, 320), (5, 64), (1, 3, 2500)], ids=str)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (
        3 * given("x", shape, dtype) + 1,
        given("weight", shape[-1:], dtype),
        given("bias", shape[-1:], dtype),
    )
    d = x.double() - x.double().mean(-1, keepdim=True)
    a = weight.double() / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    terms = a.abs() * (x.double().abs() + x.double().mean(-1, keepdim=True).abs()) + bias.double().abs()
    require_close(gpu.kernels().layer_norm(x, weight, bias, 1e-5), d * a + bias.double(), terms)


@on_the_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_times_gelu_of_its_gate(dtype: torch.dtype) -> None:
    """1 + erf(g) loses all of itself to cancellation where g is very negative: the terms of it are 1 and 1."""
    x = 3 * given("x", (2, 35, 2 * 80), dtype)
    value, gate = x.double().chunk(2, dim=-1)
    require_close(gpu.kernels().gated(x), value * F.gelu(gate), (value * gate).abs())


@on_the_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("same", [True, False], ids=["for every position", "a residual"])
def test_bias_and_summand_are_added_in_place(same: bool, dtype: torch.dtype) -> None:
    x, bias = given("x", (2, 5, 7, 70), dtype), given("bias", (70,), dtype)
    add = given("add", (2, 70) if same else x.shape, dtype)
    parts = x.double(), bias.double(), (add[:, None, None] if same else add).double()
    exact, terms = sum(parts), sum(part.abs() for part in parts)
    ours = gpu.kernels().plus(x, bias, add)
    assert ours is x
    require_close(ours, exact, terms)


@on_the_device
@pytest.mark.parametrize("add", ["nothing", "an embedding", "a residual"])
def test_a_convolution_with_a_stride_and_with_what_is_added(add: str) -> None:
    conv = nn.Conv2d(32, 64, 3, stride=2, padding=1, device=DEVICE).double().requires_grad_(False)
    x = normal("x", (2, 9, 8, 32)).to(DEVICE).double()
    on_top = {"nothing": None, "an embedding": normal("emb", (2, 64)), "a residual": normal("residual", (2, 5, 4, 64))}[
        add
    ]
    on_top = None if on_top is None else on_top.to(DEVICE).double()
    assert torch.allclose(gpu.conv(x, conv, on_top), plain.conv(x, conv, on_top), rtol=0, atol=1e-13)


@on_the_device
@pytest.mark.usefixtures("plain_attention", "large_tiles")
@torch.no_grad()
def test_a_unet_in_the_operations_of_the_gpu_is_the_plain_one() -> None:
    """In float64, where only the order of sums differs: some dozen layers, each with rounding errors of 1e-16 times its
    number of terms."""
    config = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, context_dim=64, down_depth=((1,),),
        up_depth=((0, 0),), cross_only=(False,), mid_depth=None)  # fmt: skip
    plainly = few_groups(fill(UNet(config), lambda key: key)).to(DEVICE, torch.float64)
    x, t, context = (
        normal("x", (2, 4, 5, 6)).to(DEVICE).double(),
        torch.tensor([500.0, 37.0], device=DEVICE),
        normal("context", (2, 3, 64)).to(DEVICE).double(),
    )
    fast = shared(plainly, {UNet: FastUNet})
    fast.ops, fast.shares = gpu, False
    exact = plainly(x, t, context)
    gpu.lay_out(fast)
    assert relative(fast(x, t, context), exact) < 1e-12


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers() -> None:
    """A decoder's widest layer at 4096 x 4096 pixels has 2^32 of them."""
    x = torch.zeros(1, 2**23 + 1, 256, device="cuda", dtype=torch.float16)
    gpu.kernels().plus(x, torch.arange(256, device="cuda").half(), torch.ones(1, 256, device="cuda").half())
    assert torch.equal(x[0, -1].cpu(), torch.arange(1, 257).half())
    assert torch.equal(x[0, 0], x[0, -1])
    ones = torch.ones(256, device="cuda").half()
    y = gpu.kernels().group_norm(
        x, ones, ones, 32, 1e-5, silu=False
    )  # of channels that are the same everywhere: as of one position
    assert torch.equal(y[0, 0], y[0, -1])
    exact = F.group_norm(torch.arange(1, 257).double()[None], 32, eps=1e-5)[0] + 1
    assert (y[0, 0].cpu() - exact).abs().max() < 2**-11 * 3  # of numbers up to 3
