"""What the loaded library can run on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _library  # noqa: F401  (the operators must exist)


class Backend(NamedTuple):
    """Whether a backend can be used here, and what it is, or why it cannot."""

    available: bool
    detail: str


def backends() -> dict[str, Backend]:
    """What the library can compute with on this machine, by name: ``"cpu"``, ``"reference"`` (the
    slow float64 oracle) and ``"cuda"``. Which one runs is decided by the tensors' device; only
    ``"reference"`` is asked for by ``backend=``.

    >>> kalmanet.backends()["cuda"]
    Backend(available=False, detail='no NVIDIA GPU, or no driver that is new enough')
    """
    found = {}
    for line in torch.ops.kalmanet.backend_info().splitlines():
        name, detail = line.split(": ", 1)
        absent = detail.startswith("not available; ")
        detail = detail.removeprefix("not available; ").removeprefix("backend: ")
        found[name] = Backend(not absent, detail)
    if found["cuda"].available and not torch.cuda.is_available():
        found["cuda"] = Backend(
            False,
            f"PyTorch {torch.__version__} "
            + ("finds no GPU" if torch.version.cuda else "is a build for the CPU alone"),
        )
    return found
