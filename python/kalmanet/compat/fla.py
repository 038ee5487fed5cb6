"""``import kalmanet.compat.fla``: the module paths of flash-linear-attention's Gated KalmaNet.

Afterwards ``from fla.ops.gka import chunk_gka`` and ``from fla.layers.gka import GatedKalmaNet``
work, on this package, where flash-linear-attention is absent or has no Gated KalmaNet (or one that
does not import here). Where it has one that works, nothing is changed. Which of these happened is
logged (logger "kalmanet", level WARNING) and kept in ``MESSAGE``.

The layer of these paths normalises q and k as flash-linear-attention does (``qk_norm="fla"``).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types
from typing import Any

from .. import ops
from ..layer import GatedKalmaNet as _GatedKalmaNet


class GatedKalmaNet(_GatedKalmaNet):
    """:class:`kalmanet.GatedKalmaNet` with flash-linear-attention's normalisation by default."""

    def __init__(self, *args: Any, qk_norm: str = "fla", **kwargs: Any) -> None:
        super().__init__(*args, qk_norm=qk_norm, **kwargs)


_OPS = {name: getattr(ops, name) for name in ops.__all__ if name != "gka"}


def _module(name: str, package: bool, contents: dict[str, Any]) -> types.ModuleType:
    """The module `name`: the one that is there, or a new one; with `contents` put in."""
    module = sys.modules.get(name)
    if module is None:
        module = types.ModuleType(name, f"{name}, provided by kalmanet.compat.fla")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=package)
        if package:
            module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for key, value in contents.items():
        setattr(module, key, value)
    return module


def _install() -> str:
    present = importlib.util.find_spec("fla") is not None
    why = "flash-linear-attention is not installed"
    if present:
        try:
            theirs = importlib.import_module("fla.ops.gka")
            if hasattr(theirs, "chunk_gka") and hasattr(
                importlib.import_module("fla.layers.gka"), "GatedKalmaNet"
            ):
                return "flash-linear-attention has its own fla.ops.gka: nothing was changed"
            why = "the installed flash-linear-attention has an incomplete fla.ops.gka"
        except ModuleNotFoundError as error:
            old = error.name in ("fla.ops.gka", "fla.layers.gka")
            why = (
                "the installed flash-linear-attention has no Gated KalmaNet"
                if old
                else f"the installed flash-linear-attention does not import ({error})"
            )
        except Exception as error:  # whatever its import runs into on this machine
            why = f"the installed flash-linear-attention does not import ({error})"
    _module("fla", True, {})
    _module("fla.ops", True, _OPS)
    _module("fla.ops.gka", True, _OPS | {"__all__": [*_OPS]})
    _module("fla.layers", True, {"GatedKalmaNet": GatedKalmaNet})
    _module("fla.layers.gka", False, {"GatedKalmaNet": GatedKalmaNet})
    return (
        f"{why}: fla.ops.gka, fla.layers.gka and fla.layers.GatedKalmaNet now are kalmanet's, with "
        f'qk_norm="fla"'
    )


#: What importing this module did.
MESSAGE = _install()
logging.getLogger("kalmanet").warning("kalmanet.compat.fla: %s", MESSAGE)
