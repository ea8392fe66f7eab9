"""Latents of pictures and embeddings of captions, encoded once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ldm.conditioning.prompts import encode_text
from ldm.errors import ArgumentError
from ldm.networks.clip import CLIPText
from ldm.networks.modules import Modules
from ldm.networks.vae import VAE
from ldm.train.data.cache import Cache, weights_digest
from ldm.train.data.frame import Frame
from ldm.train.data.source import Item, digest

PIECE = 256  # pictures or captions in one file: what a pass that is killed loses at most

Progress = Callable[[str, int, int], None]  # what is encoded, how many are done, how many there are
T = TypeVar("T")


class Latents:
    """The autoencoder's moments of pictures, [2 z, h, w] float32: 131 kB for 512x512 pixels at 4 channels.

    Named by the encoder's weights, the picture and its frame: another of any of these is another latent. Each picture
    is encoded alone.
    """

    def __init__(self, vae: VAE, directory: Path):
        self.vae, self.cache = vae, Cache(directory, "latents")
        self._weights = weights_digest(vae.encoder, vae.quant_conv)

    def name(self, item: Item, how: Frame) -> str:
        """The name of a picture's latent."""
        return digest(self._weights, item.fingerprint, repr(tuple(how)))

    @torch.no_grad()
    def add(self, named: Iterator[tuple[str, Tensor]], total: int, on_progress: Progress) -> None:
        """Encode pictures [3, H, W] and keep their moments."""
        weight = self.vae.quant_conv.weight
        for done, some in _pieces(named):
            self.cache.put({name: self.vae.moments(image[None].to(weight)).float().cpu()[0] for name, image in some})
            on_progress("pictures", done, total)

    def get(self, item: Item, how: Frame) -> Tensor:
        """Moments [2 z, h, w]. Raises KeyError for a picture that was not encoded."""
        return self.cache.get(self.name(item, how))


class Texts:
    """The towers' embeddings of captions: tokens [n, d] and pooled [d], float32, of the first 75 tokens of each.

    Named by the towers' weights and the caption.
    """

    def __init__(self, towers: Modules[CLIPText], directory: Path):
        self.towers, self.cache = towers, Cache(directory, "text")
        self._weights = digest(weights_digest(towers), *(repr(tower.config) for tower in towers))

    def names(self, caption: str) -> tuple[str, str]:
        """The names of a caption's tokens and of its pooled embedding."""
        name = digest(self._weights, caption)
        return f"{name}.context", f"{name}.pooled"

    @torch.no_grad()
    def add(self, captions: Sequence[str], on_progress: Progress) -> None:
        """Encode captions and keep their embeddings."""
        for done, some in _pieces(iter(captions)):
            made: dict[str, Tensor] = {}
            for caption in some:
                tensors = encode_text(self.towers, [caption], chunks=1)
                made |= {name: t.float().cpu()[0] for name, t in zip(self.names(caption), tensors, strict=True)}
            self.cache.put(made)
            on_progress("captions", done, len(captions))

    def get(self, caption: str) -> tuple[Tensor, Tensor]:
        """Tokens [n, d] and pooled embedding [d]. Raises ArgumentError for a caption that was not encoded."""
        context, pooled = self.names(caption)
        try:
            return self.cache.get(context), self.cache.get(pooled)
        except KeyError:
            what = f"caption {caption[:40]!r} is not in the cache; call encode before the first micro-batch"
            raise ArgumentError(what) from None


def _pieces(things: Iterator[T]) -> Iterator[tuple[int, list[T]]]:
    """Lists of PIECE things, each with the number of things up to its end."""
    done = 0
    while some := list(islice(things, PIECE)):
        done += len(some)
        yield done, some
