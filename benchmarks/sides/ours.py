"""Our side: the plain networks, and the same model made faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides.cells import DTYPES, GRID, GUIDANCE, NEGATIVE, PROMPT, Cell, Job, Side, inputs, levels, seeds
from ldm.conditioning import Sizes
from ldm.conditioning.cond import vector
from ldm.model import LatentDiffusion


def ldm(job: Job) -> Side:
    """The plain, readable networks."""
    return _ours(_model(job))


def fast(job: Job) -> Side:
    """The same model made faster."""
    from ldm.fast import optimize

    return _ours(optimize(_model(job)))


def _model(job: Job) -> LatentDiffusion:
    import weights

    return weights.load(job.folder, device=job.device, dtype=DTYPES[job.dtype])


def _ours(model: LatentDiffusion) -> Side:
    from ldm.tasks import txt2img

    config = model.config

    def side(cell: Cell) -> Callable[[], Tensor]:
        given = inputs(config, cell, str(model.device), model.dtype)
        y, width = None, config.unet.vector_dim
        if given.pooled is not None and width is not None:
            y = vector(given.pooled, Sizes(), (cell.size, cell.size), width)

        def text() -> Tensor:
            towers = zip(model.text, config.text, given.ids, strict=True)
            return torch.cat([tower(ids, each.skip, each.norm)[0] for tower, each, ids in towers], dim=-1)

        def picture() -> Tensor:
            size: dict[str, Any] = {"height": cell.size, "width": cell.size, "steps": cell.steps}
            how: dict[str, Any] = {"sampler": cell.sampler, "grid": GRID[cell.sampler], "cfg": GUIDANCE}
            return levels(txt2img(model, PROMPT, negative=NEGATIVE, seeds=seeds(cell), **size, **how))

        stages: dict[str, Callable[[], Tensor]] = {
            "text": text,
            "step": lambda: model.unet(given.x, given.t, given.context, y),
            "decode": lambda: model.vae.decode(given.latent),
            "picture": picture,
        }
        return stages[cell.stage]

    return side
