"""Files of weights: read safely, loaded strictly, written atomically.

A name is imported when it is first asked for: to load a model takes nothing of what converts, compares or merges files.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weights.adapters.embedding import load_embedding as load_embedding
    from weights.adapters.embedding import save_embedding as save_embedding
    from weights.adapters.extract import extract_lora as extract_lora
    from weights.adapters.merge import merge_lora as merge_lora
    from weights.adapters.read import load_lora as load_lora
    from weights.adapters.resize import convert_lora as convert_lora
    from weights.adapters.resize import resize_lora as resize_lora
    from weights.adapters.write import save_lora as save_lora
    from weights.alone import load_safety as load_safety
    from weights.alone import load_vae as load_vae
    from weights.alone import load_vision as load_vision
    from weights.checkpoint import config_of as config_of
    from weights.files.opened import Weights as Weights
    from weights.files.opened import open_file as open_file
    from weights.models import load as load
    from weights.names.layout import LEFTOVERS as LEFTOVERS
    from weights.tools.convert import convert as convert
    from weights.tools.diff import Difference as Difference
    from weights.tools.diff import diff as diff
    from weights.tools.inspect import Report as Report
    from weights.tools.inspect import inspect as inspect
    from weights.tools.merge import Merged as Merged
    from weights.tools.merge import merge as merge
    from weights.tools.record import Conversion as Conversion
    from weights.tools.repair import Repaired as Repaired
    from weights.tools.repair import repair as repair
    from weights.tools.save import original_state as original_state
    from weights.tools.save import save as save

_HOME = {  # name -> the module that it is in; the same as above
    name: f"weights.{module}"
    for module, names in {
        "adapters.embedding": "load_embedding save_embedding",
        "adapters.extract": "extract_lora",
        "adapters.merge": "merge_lora",
        "adapters.read": "load_lora",
        "adapters.resize": "convert_lora resize_lora",
        "adapters.write": "save_lora",
        "checkpoint": "config_of",
        "files.opened": "Weights open_file",
        "alone": "load_safety load_vae load_vision",
        "models": "load",
        "names.layout": "LEFTOVERS",
        "tools.convert": "convert",
        "tools.diff": "Difference diff",
        "tools.inspect": "Report inspect",
        "tools.merge": "Merged merge",
        "tools.record": "Conversion",
        "tools.repair": "Repaired repair",
        "tools.save": "original_state save",
    }.items()
    for name in names.split()
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weights' has no attribute {name!r}")
    found = getattr(import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
