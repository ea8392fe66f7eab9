"""Latent diffusion: the Stable Diffusion family in PyTorch. `__init__.pyi` is the table of contents."""

from ldm.lazy import names_of

__getattr__, __dir__, __all__ = names_of(__name__, __file__)
