"""Graphs of the UNet: played back on the CPU, when they are captured and what they see; and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.golden import TINY_UNETS, relative, tiny_unet
from benchmarks.models.seeded import normal
from ldm.fast import gpu, graphs, plain
from ldm.fast.choice import shared
from ldm.fast.graphs import GraphedUNet, Graphs
from ldm.networks.unet import UNet

# the same UNet in float64 but for the order of sums: some hundred layers, each with rounding errors of 1e-16 times its
# number of terms
SAME = 1e-11


def unet_inputs(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    config = TINY_UNETS[name]
    x, context = normal("x", (2, config.in_channels, 7, 8)), normal("context", (2, 5, 64))
    y = (
        torch.tensor([20, 350])
        if config.noise_levels
        else None
        if config.vector_dim is None
        else normal("y", (2, config.vector_dim)).to(dtype)
    )
    return (
        x.to(device, dtype),
        torch.tensor([500.0, 37.0], device=device),
        context.to(device, dtype),
        None if y is None else y.to(device),
    )


class Playback:
    """Stands for a CUDA graph on the CPU: it computes again, from where the inputs were to where the output was."""

    def __init__(self, run: Callable[[], Tensor], record: list[str]):
        self.run, self.record = run, record
        self.out = run()

    def replay(self) -> None:
        self.record.append("replay")
        with torch.inference_mode():  # which alone may write what was made in it
            self.out.copy_(self.run())

    def pool(self) -> tuple[int, int]:
        return 0, 1


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What graphs were asked to do, in order."""
    record: list[str] = []

    def capture(
        run: Callable[[], Tensor], device: torch.device, pool: tuple[int, int] | None
    ) -> tuple[Playback, Tensor]:
        record.append("capture" if pool is None else "capture beside another")
        playback = Playback(run, record)
        return playback, playback.out

    monkeypatch.setattr(graphs, "capture", capture)
    return record


class GraphedOnTheCPU(GraphedUNet):
    """In operations that the CPU has."""

    ops = plain


def graphed(plainly: UNet) -> GraphedUNet:
    return shared(
        plainly, {UNet: GraphedOnTheCPU if plainly.time_embed[0].weight.device.type == "cpu" else GraphedUNet}
    )


@pytest.mark.parametrize("name", ["sd1-tiny", "sdxl-tiny", "x4-upscaler-tiny"])
@torch.no_grad()
def test_a_shape_is_captured_at_its_second_call_and_replayed_after(name: str, record: list[str]) -> None:
    plainly = tiny_unet(name).double()
    unet, (x, t, context, y) = graphed(plainly), unet_inputs(name, torch.float64, "cpu")
    for i, done in enumerate(([], ["capture", "replay"], ["replay"], ["replay"])):
        record.clear()
        x, t = x + i, t + 1
        out = unet(x, t, context, y)
        assert record == done
        assert relative(out, plainly(x, t, context, y)) < SAME
    kept = out.clone()
    unet(x + 1, t, context, y)
    assert torch.equal(out, kept)  # what was given away is not written again


@torch.no_grad()
def test_a_replay_sees_another_context_and_weights_that_change_in_place(record: list[str]) -> None:
    plainly = tiny_unet("sd1-tiny").double()
    unet, (x, t, context, _) = graphed(plainly), unet_inputs("sd1-tiny", torch.float64, "cpu")
    for _ in range(3):
        unet(x, t, context)
    record.clear()
    other = normal("other", context.shape).double()
    assert relative(unet(x, t, other), plainly(x, t, other)) < SAME
    assert relative(unet(x, t, context), plainly(x, t, context)) < SAME
    for p in plainly.parameters():
        p.mul_(0.9)
    assert relative(unet(x, t, context), plainly(x, t, context)) < SAME
    assert "capture" not in record


@torch.no_grad()
@pytest.mark.parametrize("how", ["moved", "exchanged"])
def test_parameters_that_moved_or_were_exchanged_are_captured_anew(how: str, record: list[str]) -> None:
    plainly = tiny_unet("sd1-tiny").double()
    unet, (x, t, context, _) = graphed(plainly), unet_inputs("sd1-tiny", torch.float64, "cpu")
    for _ in range(3):
        unet(x, t, context)
    for project in (plainly.time_embed[0], plainly.time_embed[2]):
        weight = project.weight.detach() * 0.5
        if how == "moved":
            project.weight.data = weight
        else:
            project.weight = nn.Parameter(weight, requires_grad=False)
    for done in (
        [] if how == "moved" else ["replay"],
        ["capture", "replay"],
        ["replay"],
    ):  # nothing is read where a parameter no longer is
        record.clear()
        assert relative(unet(x, t, context), plainly(x, t, context)) < SAME
        assert record == done


@torch.no_grad()
def test_who_looks_inside_gets_the_readable_network(record: list[str]) -> None:
    """Also after a graph was captured: its replay would not call them."""
    unet, (x, t, context, _) = graphed(tiny_unet("sd1-tiny").double()), unet_inputs("sd1-tiny", torch.float64, "cpu")
    for _ in range(3):
        out = unet(x, t, context)
    seen: list[Tensor] = []
    hook = (
        unet.middle_block[1]
        .transformer_blocks[0]
        .attn1.attend.register_forward_hook(lambda module, args, out: seen.append(out))
    )
    assert relative(unet(x, t, context), out) < SAME
    assert len(seen) == 1
    hook.remove()
    with torch.enable_grad():
        x.requires_grad_()
        assert unet(x, t, context).requires_grad


@torch.no_grad()
def test_few_graphs_are_kept_and_the_longest_unused_goes_first(
    record: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "KEPT", 2)
    unet, (x, t, context, _) = graphed(tiny_unet("sd1-tiny").double()), unet_inputs("sd1-tiny", torch.float64, "cpu")

    def call(width: int) -> list[str]:
        record.clear()
        unet(x[..., :width], t, context)
        return list(record)

    assert [call(width) for width in (8, 8, 4, 4)] == [
        [],
        ["capture", "replay"],
        [],
        ["capture beside another", "replay"],
    ]
    assert call(8) == ["replay"]
    assert call(6) == []  # in the place of width 4
    assert call(8) == ["replay"]
    assert call(4) == []


@torch.no_grad()
def test_where_memory_does_not_suffice_for_a_graph_the_others_give_up_theirs(
    record: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, (x, t, context, _) = graphed(tiny_unet("sd1-tiny").double()), unet_inputs("sd1-tiny", torch.float64, "cpu")
    unet(x, t, context)
    unet(x, t, context)
    unet(x[..., :4], t, context)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(graphs, "capture", full)
    with pytest.raises(torch.OutOfMemoryError):
        unet(x[..., :4], t, context)
    assert not unet._graphs.kept


@torch.no_grad()
def test_a_copy_of_a_network_begins_without_graphs(record: list[str]) -> None:
    unet, inputs = graphed(tiny_unet("sd1-tiny").double()), unet_inputs("sd1-tiny", torch.float64, "cpu")
    for _ in range(3):
        unet(*inputs)
    twin = copy.deepcopy(unet)
    assert isinstance(twin._graphs, Graphs)
    assert not twin._graphs.kept
    record.clear()
    for p in twin.parameters():
        p.mul_(0.5)
    assert not torch.equal(twin(*inputs), unet(*inputs))
    assert record == ["replay"]


@torch.no_grad()
def test_graphs_that_were_captured_in_inference_mode_serve_outside_of_it(record: list[str]) -> None:
    unet, (x, t, context, _) = graphed(tiny_unet("sd1-tiny").double()), unet_inputs("sd1-tiny", torch.float64, "cpu")
    with torch.inference_mode():
        context = context.clone()
        for _ in range(3):
            record.clear()
            out = unet(x, t, context)
        assert record == ["replay"]  # none in vain, though its keys and values are computed every time
    assert relative(unet(x, t, context.clone()), out.clone()) < SAME
    assert record[-1] == "replay"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["sd1-tiny", "sdxl-tiny", "x4-upscaler-tiny"])
@torch.no_grad()
def test_on_a_gpu_a_graph_gives_what_the_plain_network_gives(name: str, dtype: torch.dtype) -> None:
    """No further from float64 than the plain network in the same type, but for the order of sums."""
    plainly = tiny_unet(name).to("cuda")
    exact = copy.deepcopy(plainly).double()(*unet_inputs(name, torch.float64, "cuda"))
    half, inputs = plainly.to(dtype), unet_inputs(name, dtype, "cuda")
    bound = 2 * relative(half(*inputs).double(), exact)
    unet = graphed(half)
    gpu.lay_out(unet)
    for _ in range(4):
        assert relative(unet(*inputs).double(), exact) < bound
    assert len([graph for graph in unet._graphs.kept.values() if graph is not None]) == 1
