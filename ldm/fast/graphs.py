"""The fast UNet as CUDA graphs: one launch per call instead of one per kernel, and no Python between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ldm.fast import gpu
from ldm.fast.networks import FastUNet, KeysValues, runs

KEPT = 4  # graphs of one network; guided sampling with an interval uses two

Key = tuple[object, ...]


class GraphedUNet(FastUNet):
    """`FastUNet` on a GPU. A shape that comes for the second time is captured, and replayed from then on.

    Graphs read the parameters where they are: numbers that change in place are seen, and when a parameter has moved all graphs are dropped.
    PyTorch's settings, and what modules hold besides parameters, stay those of the capture. For one thread and one stream at a time.
    """

    ops: ModuleType = gpu
    shares: bool = False
    _graphs: Graphs | None = None

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """As `UNet.forward`. A replay is queued first: while the GPU computes, Python sees to it that it was the right one."""
        none = (
            torch.is_grad_enabled() or context.is_inference() or self._graphs is None
        )  # keys and values of inference mode are never those of before
        graph = None if none else self._graphs.find(_key(x, t, context, y))
        if graph is not None:
            out = graph.replayed(x, t, y)
            if (
                runs(self, x, t, context, y)
                and self._graphs.read(self.parameters())
                and self.keys_values(context) is graph.told
            ):
                return out
        return super().forward(x, t, context, y)

    def predict(self, x: Tensor, t: Tensor, keys_values: KeysValues, y: Tensor | None = None) -> Tensor:
        """As `FastUNet.predict`."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # part of somebody's own graph
            return super().predict(x, t, keys_values, y)
        if self._graphs is None:
            self._graphs = Graphs()
        return self._graphs.run(super().predict, self.parameters(), x, t, keys_values, y)


class Graphs:
    """The graphs of one network, by the shapes of their inputs. A copy of the network begins without any."""

    def __init__(self) -> None:
        self.kept: dict[Key, Graph | None] = {}  # the longest unused first; None: the shape was seen once
        self.parameters: list[Tensor] = []
        self.places: list[int] = []  # where the graphs read them

    def __deepcopy__(self, memo: dict[int, object]) -> Graphs:
        return Graphs()

    def find(self, key: Key) -> Graph | None:
        """The graph for these shapes, if there is one and all that it reads is where it was."""
        if self.kept.get(key) is None or not self.read(self.parameters):
            return None
        self.kept[key] = graph = self.kept.pop(key)
        return graph

    def read(self, parameters: Iterable[Tensor]) -> bool:
        """Whether the graphs read these parameters where they are."""
        return list(map(Tensor.data_ptr, parameters)) == self.places

    def run(
        self,
        predict: Callable[..., Tensor],
        parameters: Iterable[Tensor],
        x: Tensor,
        t: Tensor,
        keys_values: KeysValues,
        y: Tensor | None,
    ) -> Tensor:
        """`predict(x, t, keys_values, y)`: called for the first time with these shapes, captured at the second, replayed after."""
        parameters = list(parameters)
        if not self.read(parameters):
            self.kept.clear()
            self.parameters, self.places = parameters, list(map(Tensor.data_ptr, parameters))
        key = _key(x, t, keys_values[0][0], y)
        first, graph = key not in self.kept, self.kept.pop(key, None)
        if graph is None and not first:
            try:
                graph = _captured(
                    predict, x, t, keys_values, y, [other.graph for other in self.kept.values() if other is not None]
                )
            except torch.OutOfMemoryError:
                self.kept.clear()  # their memory is for whoever does with less
                raise
        self.kept[key] = graph
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        if graph is None:
            return predict(x, t, keys_values, y)
        graph.tell(keys_values)
        return graph.replayed(x, t, y)


@dataclass
class Graph:
    """A captured call: the tensors that it reads and writes, and the keys and values it was told last."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor, Tensor | None]  # x, t, y
    held: KeysValues
    told: KeysValues
    out: Tensor

    def tell(self, keys_values: KeysValues) -> None:
        """Give it other keys and values than before."""
        if self.told is not keys_values:
            for held, given in zip(self.held, keys_values, strict=True):
                _copy(held, given)
            self.told = keys_values

    def replayed(self, *inputs: Tensor | None) -> Tensor:
        """The output for x, t and y; a copy, since the next replay writes to the same place."""
        _copy(self.inputs, inputs)
        self.graph.replay()
        return self.out.clone()


def _key(x: Tensor, t: Tensor, told: Tensor, y: Tensor | None) -> Key:
    """What one graph serves; of the context, or its keys, only how many rows and tokens there are counts."""
    return x.device, x.dtype, x.shape, t.dtype, t.shape, told.shape[:2], None if y is None else (y.dtype, y.shape)


def _copy(held: Iterable[Tensor | None], given: Iterable[Tensor | None]) -> None:
    for to, new in zip(held, given, strict=True):
        if to is not None:
            to.copy_(new)


def _captured(
    predict: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    keys_values: KeysValues,
    y: Tensor | None,
    others: Sequence[torch.cuda.CUDAGraph],
) -> Graph:
    """The call as a graph. It shares its memory with the others, of which none runs at the same time and nothing but its output is kept."""
    with torch.inference_mode(False):  # else they could be written in that mode only
        inputs = x.detach().clone(), t.detach().clone(), None if y is None else y.detach().clone()
        held = [(keys.clone(), values.clone()) for keys, values in keys_values]

    def run() -> Tensor:
        return predict(inputs[0], inputs[1], held, inputs[2])

    graph, out = capture(run, x.device, others[0].pool() if others else None)
    return Graph(graph, inputs, held, keys_values, out)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """That of all captures on a device: memory belongs to the stream that it was taken on, and graphs are to share it."""
    return torch.cuda.Stream(device)


def capture(
    run: Callable[[], Tensor], device: torch.device, pool: tuple[int, int] | None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """What `run` queues on the GPU, as a graph, and the tensor that every replay of it writes.

    It runs once before, on the stream of the capture: libraries set themselves up at their first call, which cannot be captured.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out = run()
    return graph, out
