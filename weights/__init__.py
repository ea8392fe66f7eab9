"""Files of weights: read safely, loaded strictly, written atomically."""

from weights.conversion_record import Conversion
from weights.convert import convert
from weights.diff import Difference, diff
from weights.embedding_save import save_embedding
from weights.embeddings import load_embedding
from weights.files import Weights, open_file
from weights.layout import LEFTOVERS
from weights.load import load
from weights.lora import load_lora
from weights.lora_extract import extract_lora
from weights.lora_merge import merge_lora
from weights.lora_save import save_lora
from weights.lora_sources import config_of
from weights.lora_tools import convert_lora, resize_lora
from weights.merge import Merged, merge
from weights.parts import load_safety, load_vae
from weights.repair import Repaired, repair
from weights.report import Report, inspect
from weights.save import original_state, save
from weights.vision_part import load_vision

__all__ = ["LEFTOVERS", "Conversion", "Difference", "Merged", "Repaired", "Report", "Weights", "config_of", "convert", "convert_lora", "diff", "extract_lora", "inspect", "load", "load_embedding", "load_lora", "load_safety", "load_vae", "load_vision", "merge", "merge_lora", "open_file", "original_state", "repair", "resize_lora", "save", "save_embedding", "save_lora"]  # fmt: skip
