"""The fast UNet as CUDA graphs: one launch per call instead of one per kernel, and no Python between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ldm.fast import gpu
from ldm.fast.networks import FastUNet, KeysValues, runs

KEPT = 4  # graphs of one network; guided sampling with an interval uses two

Key = tuple[object, ...]


class GraphedUNet(FastUNet):
    """`FastUNet` on a GPU. A shape that comes for the second time is captured, and replayed from then on.

    Graphs read the parameters where they are: changes in place are seen, and when a parameter has moved all graphs are
    dropped. PyTorch's settings, and attributes of modules, stay those of the capture. For one thread and stream.
    """

    ops: ModuleType = gpu
    shares: bool = False
    _graphs: Graphs | None = None

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """As `UNet.forward`. A replay is queued first: while the GPU computes, Python checks it."""
        graphs = self._graphs
        if graphs is None or torch.is_grad_enabled() or context.is_inference():  # whose keys and values are always new
            return super().forward(x, t, context, y)
        graph = graphs.find(_key(x, t, context, y))
        if graph is not None:
            out = graph.replayed(x, t, y)
            right = runs(self, x, t, context, y) and graphs.read(self.parameters())
            if right and self.keys_values(context) is graph.keys_values:
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
        """`predict(x, t, keys_values, y)`: of given shapes, one call is made, the second captured, others replayed."""
        parameters = list(parameters)
        if not self.read(parameters):
            self.kept.clear()
            self.parameters, self.places = parameters, list(map(Tensor.data_ptr, parameters))
        key = _key(x, t, keys_values[0][0], y)
        first, graph = key not in self.kept, self.kept.pop(key, None)
        if graph is None and not first:
            others = [other.graph for other in self.kept.values() if other is not None]
            try:
                graph = _captured(predict, x, t, keys_values, y, others)
            except torch.OutOfMemoryError:
                self.kept.clear()  # the caller may go on in smaller parts, and needs their memory
                raise
        self.kept[key] = graph
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        if graph is None:
            return predict(x, t, keys_values, y)
        graph.take(keys_values)
        return graph.replayed(x, t, y)


@dataclass
class Graph:
    """A captured call: the tensors that it reads and writes, and the keys and values that were copied to it last."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor, Tensor | None]  # x, t, y
    held: KeysValues
    keys_values: KeysValues
    out: Tensor

    def take(self, keys_values: KeysValues) -> None:
        """Copy keys and values to where the graph reads them, unless it was done before."""
        if self.keys_values is not keys_values:
            for held, given in zip(self.held, keys_values, strict=True):
                _copy(held, given)
            self.keys_values = keys_values

    def replayed(self, *inputs: Tensor | None) -> Tensor:
        """The output for x, t and y; a copy, since the next replay writes to the same place."""
        _copy(self.inputs, inputs)
        self.graph.replay()
        return self.out.clone()


def _key(x: Tensor, t: Tensor, context: Tensor, y: Tensor | None) -> Key:
    """The shapes that one graph serves; of the context, or of its keys, only the rows and tokens count."""
    return x.device, x.dtype, x.shape, t.dtype, t.shape, context.shape[:2], None if y is None else (y.dtype, y.shape)


def _copy(held: Iterable[Tensor | None], given: Iterable[Tensor | None]) -> None:
    for to, new in zip(held, given, strict=True):
        if to is not None and new is not None:
            to.copy_(new)


def _captured(
    predict: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    keys_values: KeysValues,
    y: Tensor | None,
    others: Sequence[torch.cuda.CUDAGraph],
) -> Graph:
    """The call as a graph, which shares memory with the others: one runs at a time, and only its output is kept."""
    with torch.inference_mode(False):  # else they could be written in that mode only
        inputs = x.detach().clone(), t.detach().clone(), None if y is None else y.detach().clone()
        held = [(keys.clone(), values.clone()) for keys, values in keys_values]

    def run() -> Tensor:
        return predict(inputs[0], inputs[1], held, inputs[2])

    graph, out = capture(run, x.device, others[0].pool() if others else None)
    return Graph(graph, inputs, held, keys_values, out)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device: memory belongs to the stream it was taken on, and graphs share memory."""
    return torch.cuda.Stream(device)


def capture(
    run: Callable[[], Tensor],
    device: torch.device,
    pool: Any,  # of another graph
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """What `run` queues on the GPU, as a graph, and the tensor that every replay of it writes.

    It runs once before, on the stream of the capture: a library's first call, which sets it up, cannot be captured.
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
