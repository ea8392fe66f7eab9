"""The CLIP vision tower, on whose image embedding image variations are conditioned and the safety checker decides."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import VisionConfig
from ldm.errors import ArgumentError
from ldm.networks.clip import CLIPEncoder

# of the pictures that CLIP was trained on, levels in [0, 1]
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

PREPROCESSORS = ("original", "card")  # ways from a picture of any size to the input of the tower of image variations


class PatchEmbeddings(nn.Module):
    """Patches and their places, after one token that stands for the whole picture."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding((config.image // config.patch) ** 2 + 1, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixels), "b c h w -> b (h w) c")
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return tokens + self.position_embedding.weight


class VisionModel(nn.Module):
    """Called `vision_model` in checkpoints: [b, 3, s, s], normalised -> [b, width], the token of the whole picture."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # the published names spell it so
        self.encoder = CLIPEncoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPVision(nn.Module):
    """The vision tower of CLIP (Radford et al. 2021, section 2.4), with Hugging Face's parameter names."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[b, 3, s, s] from `preprocess`, s the config's `image` -> image embedding [b, projection], not normalised."""
        return self.visual_projection(self.vision_model(pixels))


def normalised(image: Tensor) -> Tensor:
    """[b, 3, H, W] in [-1, 1] -> the same with CLIP's mean and deviation taken out."""
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (MEAN, STD))
    return ((image + 1) / 2 - mean) / std


def preprocess(image: Tensor, how: str = "original", size: int = 224) -> Tensor:
    """[b, 3, H, W] in [-1, 1] -> the input of the tower of image variations: [b, 3, size, size] float32, normalised.

    how  "original": as it was trained, by kornia's bicubic `resize` with align_corners=True and antialias=False, which
         is torch's `interpolate`; "card": as the model card asks, by torchvision's bicubic `Resize` without antialias,
         which is `interpolate` with align_corners=False
    Nothing is cropped: a picture that is not square is squeezed. Raises ArgumentError for another `how` or shape.
    Original: FrozenCLIPImageEmbedder of justinpinkney/stable-diffusion.
    """
    if how not in PREPROCESSORS:
        known = ", ".join(PREPROCESSORS)
        raise ArgumentError(f"how: {str(how)[:40]!r} is no preprocessing; there are {known}", key="how")
    if image.ndim != 4 or image.shape[1] != 3:
        raise ArgumentError(f"pictures are tensors [b, 3, H, W]; this one is {list(image.shape)}")
    return normalised(F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=how == "original"))
