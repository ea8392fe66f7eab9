"""What this package reads of a recipe; `ldm.train.recipe` says what every key means."""

from __future__ import annotations

from typing import Protocol


class Data(Protocol):
    """The section [data]."""

    source: str
    path: str
    caption: str
    scenes: int
    size: int
    buckets: bool
    bucket_step: int
    crop: str
    flip: bool
    cache_latents: bool
    cache_text: bool
    held_out: float
    bad_limit: float
    prior: str
    prior_caption: str
    prior_pictures: int
    prior_weight: float


class Run(Protocol):
    """Of the section [run]."""

    micro: int
    seed: int
