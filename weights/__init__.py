"""Files of weights: read safely, loaded strictly, written atomically. `__init__.pyi` says where each name is."""

from ldm.lazy import names_of

__getattr__, __dir__, __all__ = names_of(__name__, __file__)
