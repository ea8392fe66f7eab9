"""The GPU's choice of attention: on the CPU with made-up timings, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from benchmarks.models.golden import relative
from benchmarks.models.seeded import normal
from ldm.fast import gpu, plain


def test_laying_out_leaves_parameters_and_numbers_as_they_are() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(2, 2))
    weight, before = network[0].weight, network[0].weight.detach().clone()
    gpu.lay_out(network)
    assert network[0].weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, before)


def test_where_there_is_no_gpu_the_operations_are_not_available() -> None:
    assert not gpu.available(torch.device("cpu"))


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[SDPBackend]:
    """Backends that can all do everything and of which the flash one is the quickest; the list of measurements."""
    measured: list[SDPBackend] = []

    def milliseconds(backend: SDPBackend, *_: Tensor) -> float:
        measured.append(backend)
        return 1.0 if backend == SDPBackend.FLASH_ATTENTION else 2.0

    monkeypatch.setattr(gpu, "BACKENDS", {backend: lambda _: True for backend in gpu.BACKENDS})
    monkeypatch.setattr(gpu, "_milliseconds", milliseconds)
    monkeypatch.setattr(gpu, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return measured


def test_the_quickest_attention_is_found_once_for_every_shape(three: list[SDPBackend]) -> None:
    q, k = normal("q", (1, 2, 8, 16)), normal("k", (1, 2, 5, 16))
    for _ in range(3):
        assert gpu._backend(q, k, k) == SDPBackend.FLASH_ATTENTION
    assert three == list(gpu.BACKENDS)
    gpu._backend(q[:, :, :4], k, k)
    assert len(three) == 6


def test_nothing_is_measured_while_a_graph_is_captured(
    three: list[SDPBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = normal("q", (1, 2, 8, 16))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu._backend(q, q, q) == next(iter(gpu.BACKENDS))
    assert not three
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu._backend(q, q, q) == SDPBackend.FLASH_ATTENTION


def test_a_backend_that_refuses_after_all_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU neither flash nor any other fused attention of a GPU exists."""
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)
    q = normal("q", (1, 2, 8, 16))
    assert gpu._milliseconds(SDPBackend.CUDNN_ATTENTION, q, q, q) == float("inf")


def test_where_no_fused_attention_can_do_it_the_plain_one_does(
    three: list[SDPBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "BACKENDS", {backend: lambda _: False for backend in gpu.BACKENDS})
    q = normal("q", (1, 2, 8, 16))
    assert gpu._backend(q, q, q) == SDPBackend.MATH
    assert not three


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "m", "heads", "d"), [(64, 64, 8, 40), (4096, 77, 8, 40), (1024, 1024, 10, 64), (256, 256, 1, 512)]
)
def test_on_a_gpu_every_attention_gives_what_the_plain_one_gives(n: int, m: int, heads: int, d: int) -> None:
    q, k, v = (normal(name, (2, size, heads * d)).to("cuda") for name, size in (("q", n), ("k", m), ("v", m)))
    exact = plain.attend(q.double(), k.double(), v.double(), heads)
    assert (
        relative(gpu.attend(q.half(), k.half(), v.half(), heads).double(), exact) < 2**-8
    )  # 2^-11 of q, k, v, the weights and the result
