"""Files of weights: read safely, loaded strictly, written atomically."""

from weights.adapters.embedding import load_embedding, save_embedding
from weights.adapters.extract import extract_lora
from weights.adapters.merge import merge_lora
from weights.adapters.read import config_of, load_lora
from weights.adapters.resize import convert_lora, resize_lora
from weights.adapters.write import save_lora
from weights.files.opened import Weights, open_file
from weights.models import load, load_safety, load_vae, load_vision, original_state, save
from weights.names.layout import LEFTOVERS
from weights.tools.convert import convert
from weights.tools.diff import Difference, diff
from weights.tools.inspect import Report, inspect
from weights.tools.merge import Merged, merge
from weights.tools.record import Conversion
from weights.tools.repair import Repaired, repair

__all__ = ["LEFTOVERS", "Conversion", "Difference", "Merged", "Repaired", "Report", "Weights", "config_of", "convert", "convert_lora", "diff", "extract_lora", "inspect", "load", "load_embedding", "load_lora", "load_safety", "load_vae", "load_vision", "merge", "merge_lora", "open_file", "original_state", "repair", "resize_lora", "save", "save_embedding", "save_lora"]  # fmt: skip
