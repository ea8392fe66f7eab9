"""Latent diffusion: the Stable Diffusion family in PyTorch. The table of contents."""

from ldm.conditioning.cond import Cond
from ldm.config import FAMILIES, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from ldm.denoiser import guided, predict_x0
from ldm.model import LatentDiffusion

__all__ = [
    "FAMILIES", "Cond", "LatentDiffusion", "ModelConfig", "ScheduleConfig", "TextConfig", "UNetConfig", "VAEConfig", "VisionConfig", "guided",
    "predict_x0",
]  # fmt: skip
