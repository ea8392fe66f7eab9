"""Textual-inversion files in every published form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.seeded import normal
from tests.made.checkpoints import pretended, save_safetensors, save_stream, save_zip

TWO, ONE = normal("two vectors", (2, 64)), normal("one vector", (64,))
WIDE = normal("wide", (2, 128))


def a1111(vectors: Tensor) -> dict[str, Any]:
    """What A1111's web UI writes."""
    return {
        "string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "other", "step": 1000,
        "sd_checkpoint": "cc6cb27103", "sd_checkpoint_name": "v1-5",
    }  # fmt: skip


def original(path: Path) -> Path:
    """What the original trainer wrote: a ParameterDict, and a tensor for the token."""
    with pretended("torch.nn.modules.container.ParameterDict") as (kind,):
        parameters = kind()
        parameters.__dict__["_parameters"] = {"*": nn.Parameter(TWO)}
        return save_zip({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, path)


FORMS: dict[str, tuple[Callable[[Path], Path], dict[int, Tensor]]] = {
    "A1111": (lambda p: save_zip(a1111(TWO), p / "seal.pt"), {64: TWO}),
    "A1111, a parameter, before torch 1.6": (lambda p: save_stream(a1111(nn.Parameter(TWO)), p / "seal.pt"), {64: TWO}),
    "original": (lambda p: original(p / "seal.pt"), {64: TWO}),
    "today's ParameterDict": (
        lambda p: save_zip({"string_to_param": nn.ParameterDict({"*": nn.Parameter(TWO)})}, p / "seal.pt"),
        {64: TWO},
    ),
    "diffusers .bin, one vector": (lambda p: save_zip({"<cat-toy>": ONE}, p / "seal.bin"), {64: ONE[None]}),
    "diffusers .safetensors": (lambda p: save_safetensors({"<cat.toy>": TWO}, p / "seal.safetensors"), {64: TWO}),
    "kohya": (
        lambda p: save_safetensors({"emb_params": TWO.half()}, p / "seal.safetensors", {"ss_v": "1"}),
        {64: TWO.half().float()},
    ),
    "SDXL": (lambda p: save_safetensors({"clip_l": TWO, "clip_g": WIDE}, p / "seal.safetensors"), {64: TWO, 128: WIDE}),
    "SDXL's refiner": (lambda p: save_safetensors({"clip_g": WIDE}, p / "seal.safetensors"), {128: WIDE}),
    "a bare tensor": (lambda p: save_zip(TWO, p / "seal.pt"), {64: TWO}),
    "a bare vector": (lambda p: save_stream(ONE, p / "seal.pt"), {64: ONE[None]}),
}
