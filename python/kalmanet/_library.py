"""Loads the built library, which registers ``torch.ops.kalmanet.*``."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

#: The oldest PyTorch whose stable ABI the library is built against.
OLDEST_TORCH = (2, 11)
VARIABLE = "KALMANET_TORCH_LIBRARY"
FILE = "libkalmanet_torch.so"


def _find() -> Path:
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named)
        if not path.is_file():
            raise ImportError(
                f"kalmanet: the environment variable {VARIABLE} names {named}, which is no file; "
                f"unset it to use the library of the installed package"
            )
        return path.resolve()
    path = Path(__file__).resolve().parent / FILE
    if not path.is_file():
        raise ImportError(
            f"kalmanet: {path} is missing. Install the package with `pip install .`; to use a "
            f"build from a checkout (`make build`), set {VARIABLE} to its "
            f"build/release/src/torch/{FILE}"
        )
    return path


def _load() -> Path:
    """Loads the library once and returns its path; ImportError says what is wrong."""
    release = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if release < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"kalmanet needs PyTorch {oldest} or newer (its stable ABI); this is "
            f"{torch.__version__}: pip install 'torch>={oldest}'"
        )
    path = _find()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"kalmanet: {path} does not load into PyTorch {torch.__version__}: {error}"
        ) from error
    return path


#: The library that is loaded.
LIBRARY_PATH = _load()
