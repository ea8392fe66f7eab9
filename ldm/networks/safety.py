"""The safety checker published with Stable Diffusion 1, which flags pictures that are near to one of 17 concepts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import VisionConfig
from ldm.errors import ArgumentError
from ldm.images import to_pil
from ldm.networks.vision import VisionModel, normalised

CONCEPTS, SPECIAL_CARE = 17, 3  # what the concepts are was not published, only their embeddings
CARE = 0.01  # taken off every concept's threshold where a special-care concept is near


class SafetyChecker(nn.Module):
    """CLIP's vision tower, and embeddings of concepts with thresholds of similarity, by the published file's names."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = nn.ModuleDict({"vision_model": VisionModel(config)})
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(CONCEPTS, config.projection))
        self.special_care_embeds = nn.Parameter(torch.ones(SPECIAL_CARE, config.projection))
        self.concept_embeds_weights = nn.Parameter(torch.ones(CONCEPTS))  # thresholds, in spite of their name
        self.special_care_embeds_weights = nn.Parameter(torch.ones(SPECIAL_CARE))

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, 3, s, s] as `safety_pixels` gives it -> flags [b], true where a picture is too near to a concept.

        Nearness is the cosine between embeddings; its excess over the concept's threshold is rounded to three decimals,
        so that less than 0.0005 does not count. Original: CompVis/stable-diffusion-safety-checker, `safety_checker.py`.
        """
        near = F.normalize(self.visual_projection(self.vision_model["vision_model"](pixels)))
        special = self._beyond(near, self.special_care_embeds, self.special_care_embeds_weights).round(decimals=3)
        care = CARE * (special > 0).any(dim=1, keepdim=True)
        concepts = (self._beyond(near, self.concept_embeds, self.concept_embeds_weights) + care).round(decimals=3)
        return (concepts > 0).any(dim=1)

    @staticmethod
    def _beyond(near: Tensor, embeds: Tensor, thresholds: Tensor) -> Tensor:
        """[b, concepts] float32: how much nearer than allowed."""
        return (near @ F.normalize(embeds).T).float() - thresholds.float()


def safety_pixels(pictures: Sequence[Image.Image] | Tensor, size: int = 224) -> Tensor:
    """Pictures -> the checker's input: [b, 3, size, size] float32, normalised.

    pictures  of any mode and sizes; or [b, 3, H, W] in [-1, 1], which is rounded to 256 levels as when saved
    The shorter side becomes `size` (bicubic, antialiased, rounded to 256 levels), and the middle of the longer one is
    kept, as by transformers' CLIPImageProcessor, with which the checker was published.
    Raises ArgumentError for no pictures, or another shape, and NonFinite.
    """
    if isinstance(pictures, Tensor):
        pictures = to_pil(pictures)
    if not pictures:
        raise ArgumentError("no pictures to check: give at least one")
    squares = np.stack([np.asarray(_middle(picture.convert("RGB"), size)) for picture in pictures])
    return normalised(torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 127.5 - 1)


def _middle(picture: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle, at size x size; cut after the picture was scaled, as the original does."""
    shorter = min(picture.size)
    width, height = (size * side // shorter for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


@torch.no_grad()
def flagged(checker: SafetyChecker, pictures: Sequence[Image.Image] | Tensor) -> list[bool]:
    """Which pictures the checker flags. `pictures` as for `safety_pixels`."""
    weight = checker.visual_projection.weight
    return checker(safety_pixels(pictures, checker.config.image).to(weight.device, weight.dtype)).tolist()
