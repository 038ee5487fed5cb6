"""Decoding from a pool of states, with drafts of speculative decoding (docs/decode.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _registration  # noqa: F401  (shapes)
from . import _check


class Draft(NamedTuple):
    """The tokens of a ``step_gka`` with ``is_draft``, for the next call: ``[B,T',H,K]``,
    ``[B,T',H,V]``, and ``[B,T',H]`` where that call had the same one."""

    k: Tensor
    v: Tensor
    g: Tensor | None = None
    gk: Tensor | None = None
    beta: Tensor | None = None


def step_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    h: Tensor,
    u: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    ridge: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    last_draft: Draft | None = None,
    accepted: Tensor | None = None,
    is_draft: bool = False,
    scale: float | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int | str = 30,
    solver: str = "chebyshev",
    tolerance: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """A few new tokens a sequence; the states h and u are updated in place. No gradients.

    Args:
        q, k, v: ``[B,T,H,K]`` and ``[B,T,H,V]`` (k, v, q may have fewer heads), of one dtype.
        h, u: ``[B,H,K,K]`` and ``[B,H,K,V]``, float32 (float64 beside float64); with ``slots``
            pools ``[num_slots,...]``.
        g, gk, alpha, beta, ridge: ``[B,T,H]``, as in :func:`kalmanet.ops.gka`.
        slots: int32 ``[B]`` on q's device: the row of the pool of each sequence; negative: a
            sequence without states, whose outputs are zeros.
        last_draft, accepted: the tokens of the last call with ``is_draft``, and int32 ``[B]`` on
            q's device: how many of each sequence's belong to the states. They come first.
        is_draft: the states stay those before this call's own tokens.

    Returns:
        o ``[B,T,H,V]``, of v's dtype.
    """
    draft = last_draft or Draft(None, None)  # type: ignore[arg-type]
    with torch.no_grad():
        o, _residual = torch.ops.kalmanet.gka_step(
            q, k, v, h, u, g, gk, alpha, beta, ridge, None, slots, *draft, accepted,
            scale=scale, ridge_ratio=ridge_ratio, solver=solver,
            num_iter=_check.steps(num_iter), tolerance=tolerance, backend=backend,
            is_draft=is_draft,
        )  # fmt: skip
    return o
