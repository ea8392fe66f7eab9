"""Files of weights: read safely, loaded strictly, written atomically."""

from weights.diff import Difference, diff
from weights.embeddings import load_embedding
from weights.files import Weights, open_file
from weights.load import load
from weights.lora import load_lora
from weights.merge import Merged, merge
from weights.parts import load_safety, load_vae
from weights.save import original_state, save

__all__ = ["Difference", "Merged", "Weights", "diff", "load", "load_embedding", "load_lora", "load_safety", "load_vae", "merge", "open_file", "original_state", "save"]
