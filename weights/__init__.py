"""Files of weights: read safely, loaded strictly, written atomically."""

from weights.files import Weights, open_file
from weights.load import load
from weights.parts import load_safety, load_vae
from weights.save import original_state, save

__all__ = ["Weights", "load", "load_safety", "load_vae", "open_file", "original_state", "save"]
