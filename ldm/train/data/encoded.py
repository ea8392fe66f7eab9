"""Pictures as the autoencoder gives them and captions as the text towers do, worked out once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.conditioning.prompts import encode_text
from ldm.errors import ArgumentError
from ldm.networks.vae import VAE
from ldm.train.data.cache import Cache, weights_digest
from ldm.train.data.frame import Frame
from ldm.train.data.source import Item, digest

PIECE = 256  # pictures or captions in one file: what a pass that is killed loses at most

Progress = Callable[[str, int, int], None]  # what is encoded; how many are done, and how many there are to do
T = TypeVar("T")


class Latents:
    """The moments of pictures, [2 z, h, w] float32 as the autoencoder gives them: 131 kB for 512x512 pixels at 4 channels.

    Named by the encoder's weights, the picture and its frame: another of any of these is another latent. Each picture is encoded alone.
    """

    def __init__(self, vae: VAE, directory: Path):
        self.vae, self.cache = vae, Cache(directory, "latents")
        self._weights = weights_digest(vae.encoder, vae.quant_conv)

    def name(self, item: Item, how: Frame) -> str:
        """What the latent of a picture is kept under."""
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
    """What the towers make of captions: tokens [n, d] and the pooled embedding [d], float32, of the first 75 tokens of each.

    Named by the towers' weights and the caption.
    """

    def __init__(self, towers: nn.ModuleList, directory: Path):
        self.towers, self.cache = towers, Cache(directory, "text")
        self._weights = digest(weights_digest(towers), *(repr(tower.config) for tower in towers))

    def names(self, caption: str) -> tuple[str, str]:
        """What its tokens and its pooled embedding are kept under."""
        name = digest(self._weights, caption)
        return f"{name}.context", f"{name}.pooled"

    @torch.no_grad()
    def add(self, captions: Sequence[str], on_progress: Progress) -> None:
        """Encode captions and keep what comes out."""
        for done, some in _pieces(iter(captions)):
            made: dict[str, Tensor] = {}
            for caption in some:
                for name, tensor in zip(
                    self.names(caption), encode_text(self.towers, [caption], chunks=1), strict=True
                ):
                    made[name] = tensor.float().cpu()[0]
            self.cache.put(made)
            on_progress("captions", done, len(captions))

    def get(self, caption: str) -> tuple[Tensor, Tensor]:
        """Tokens [n, d] and pooled embedding [d]. Raises ArgumentError for a caption that was not encoded."""
        context, pooled = self.names(caption)
        try:
            return self.cache.get(context), self.cache.get(pooled)
        except KeyError:
            raise ArgumentError(
                f"caption {caption[:40]!r} is not in the cache; call encode before the first micro-batch"
            ) from None


def _pieces(things: Iterator[T]) -> Iterator[tuple[int, list[T]]]:
    """Lists of PIECE things, and how many there are with those before."""
    done = 0
    while some := list(islice(things, PIECE)):
        done += len(some)
        yield done, some
