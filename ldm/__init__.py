"""Latent diffusion: the Stable Diffusion family in PyTorch. The table of contents."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.conditioning.cond import Cond
    from ldm.config import FAMILIES, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
    from ldm.denoiser import guided, predict_x0
    from ldm.model import LatentDiffusion

__all__ = [
    "FAMILIES", "Cond", "LatentDiffusion", "ModelConfig", "ScheduleConfig", "TextConfig", "UNetConfig", "VAEConfig",
    "VisionConfig", "guided", "predict_x0",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A name of the table, from its file when it is first asked for: a command then imports only what it needs."""
    if name not in __all__:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    files = {"Cond": "conditioning.cond", "LatentDiffusion": "model", "guided": "denoiser", "predict_x0": "denoiser"}
    globals()[name] = getattr(import_module(f"ldm.{files.get(name, 'config')}"), name)
    return globals()[name]
