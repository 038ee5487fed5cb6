"""The definition, token by token, in plain PyTorch: to read, to test against, to differentiate as
often as one likes. Slow. 16-bit inputs are computed with in float32; float64 stays float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _check

# f_t at or below this counts as zero.
VANISHED = 2.0**-60

Solve = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _exact(h: Tensor, shift: Tensor, f: Tensor, q: Tensor) -> Tensor:
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return torch.linalg.solve(h + shift[..., None, None] * eye, q)


def _chebyshev(num_iter: int) -> Solve:
    def solve(h: Tensor, shift: Tensor, f: Tensor, q: Tensor) -> Tensor:
        step = (2 / (2 * shift + f)).unsqueeze(-1)
        rho2 = (f / (2 * shift + f) / 2).square().unsqueeze(-1)
        shift = shift.unsqueeze(-1)
        previous, x, w = torch.zeros_like(q), step * q, torch.full_like(rho2, 2.0)
        for _ in range(num_iter):
            w = 1 / (1 - rho2 * w)
            r = (h @ x.unsqueeze(-1)).squeeze(-1) + shift * x - q
            x, previous = w * x - step * w * r - (w - 1) * previous, x
        return x

    return solve


def _recurrence(
    q, k, v, g, gk, alpha, scale, ridge_ratio, initial_state, output_final_state, solve: Solve
):
    B, T, H, K, V = _check.published(q, k, v, g, gk, alpha)
    ratio, ridge = _check.ridge(ridge_ratio, q, H)
    h0, u0 = _check.states(initial_state, B, H, K, V)
    out_dtype = v.dtype
    dtype = _check.fine(torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype))
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scale = K**-0.5 if scale is None else scale
        h = q.new_zeros(B, H, K, K) if h0 is None else h0.to(dtype)
        u = q.new_zeros(B, H, K, V) if u0 is None else u0.to(dtype)
        eye = torch.eye(K, dtype=dtype, device=q.device)
        outputs = []
        for t in range(T):
            if gk is not None:
                h = h * gk[:, t].to(dtype).exp()[..., None, None]
            if g is not None:
                u = u * g[:, t].to(dtype).exp()[..., None, None]
            h = h + k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
            u = u + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            # A matrix that vanished is replaced before anything divides by it.
            gone = (h.detach().square().sum((-2, -1)).sqrt() <= VANISHED).unsqueeze(-1)
            safe = torch.where(gone.unsqueeze(-1), eye, h)
            f = safe.square().sum((-2, -1)).sqrt()
            shift = f * (ratio if ridge is None else ridge[:, t].to(dtype))
            x = torch.where(gone, torch.zeros_like(q[:, t]), solve(safe, shift, f, q[:, t]))
            m = q[:, t]
            m = x if alpha is None else m + alpha[:, t].to(dtype).unsqueeze(-1) * (x - m)
            outputs.append(scale * (u.transpose(-1, -2) @ m.unsqueeze(-1)).squeeze(-1))
        o = torch.stack(outputs, 1) if outputs else v
    return o.to(out_dtype), (h, u) if output_final_state else None


def naive_recurrent_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float | Tensor = 0.02,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """:func:`kalmanet.ops.chunk_gka` with an exact solve a token, in plain PyTorch.

    Shapes as there; ``(o, final_state)`` is returned. A second derivative exists.
    """
    return _recurrence(
        q, k, v, g, gk, alpha, scale, ridge_ratio, initial_state, output_final_state, _exact
    )


def naive_recurrent_gka_chebyshev(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float | Tensor = 0.02,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    num_iter: int = 30,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The same with ``num_iter`` steps of the Chebyshev iteration a token.

    Differentiating it differentiates the iteration, whereas :func:`kalmanet.ops.chunk_gka` gives
    the gradient of the exact solution: the two meet as ``num_iter`` grows.
    """
    steps = _check.steps(num_iter)
    if steps == 0:
        raise ValueError('num_iter: is "auto", which the naive functions do not know')
    return _recurrence(
        q, k, v, g, gk, alpha, scale, ridge_ratio, initial_state, output_final_state,
        _chebyshev(steps),
    )  # fmt: skip
