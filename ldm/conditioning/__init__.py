"""Prompts and sizes -> what the UNet is conditioned on."""

from ldm.conditioning.cond import Cond, Sizes

__all__ = ["Cond", "Sizes"]
