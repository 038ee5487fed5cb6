"""Gated KalmaNet: a memory layer that solves a ridge regression over the whole past at each token.

    from kalmanet.ops import chunk_gka        # the operators
    from kalmanet import GatedKalmaNet        # the layer
    kalmanet.load("folder").generate(...)     # language models, with Hugging Face Transformers

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> the module of this package that has it.
_LAZY = {
    "GatedKalmaNet": "layer",
    "State": "state",
    "backends": "_backends",
    "load": "models",
    "save": "models",
}
_MODULES = ("models", "ops")

__all__ = ["__version__", *_LAZY, *_MODULES]

if TYPE_CHECKING:
    from . import models as models
    from . import ops as ops
    from ._backends import backends as backends
    from .layer import GatedKalmaNet as GatedKalmaNet
    from .models import load as load
    from .models import save as save
    from .state import State as State


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'kalmanet' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
