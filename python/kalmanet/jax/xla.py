"""The chunked algorithm in plain jax.numpy, for any device that XLA compiles for.

Inside a chunk that starts from H_0, with G_t the running sum of gk from the chunk's start and
M_tj = e^{G_t - G_j} for j <= t (else 0)::

    H_t y = e^{G_t} H_0 y + sum_j M_tj k_j (k_j . y)
    f_t^2 = e^{2 G_t} |H_0|^2 + 2 e^{G_t} sum_j M_tj k_j^T H_0 k_j + sum_j (M (Gram o Gram))_tj M_tj

so all tokens of a chunk are solved together and no H_t is formed. Gradients are implicit:
``jax.lax.custom_linear_solve`` differentiates the solution, not the iteration.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

import jax

from .ffi import Array, State, check_shapes

_VANISHED = 2.0**-60  # f_t at or below this counts as zero
_mm = "highest"  # XLA's default precision is lower on some devices


def _chunk(carry: State, tokens: dict[str, Array], num_iter: int, scale: float):
    """One chunk of one head: tokens [C,..], carry (H_0 [K,K], U_0 [K,V])."""
    H0, U0 = carry
    q, k, v, alpha, a = (tokens[n] for n in ("q", "k", "v", "alpha", "a"))
    G, Gu = jnp.cumsum(tokens["gk"]), jnp.cumsum(tokens["g"])
    causal = jnp.tril(jnp.ones((q.shape[0],) * 2, bool))

    def decays(total: Array) -> Array:
        # Masked before exp: above the diagonal the difference is positive and might overflow.
        return jnp.where(causal, jnp.exp(jnp.where(causal, total[:, None] - total, 0.0)), 0.0)

    M, Mu = decays(G), decays(Gu)
    dot = lambda x, y: jnp.matmul(x, y, precision=_mm)  # noqa: E731
    kH = dot(k, H0)
    squares = dot(k, k.T) ** 2
    f2 = (
        jnp.exp(2 * G) * jnp.sum(H0 * H0)
        + 2 * jnp.exp(G) * dot(M, jnp.sum(kH * k, -1))
        + jnp.sum(dot(M, squares) * M, -1)
    )
    gone = f2 <= _VANISHED**2
    f = jnp.sqrt(jnp.where(gone, 1.0, f2))
    shift = (a * f)[:, None]

    def apply(y: Array) -> Array:
        Hy = jnp.exp(G)[:, None] * dot(y, H0.T) + dot(M * dot(y, k.T), k)
        # A matrix that vanished is replaced by the identity's multiple, for a solution of no use.
        return jnp.where(gone[:, None], 0.0, Hy) + shift * y

    def chebyshev(matvec: Any, b: Array) -> Array:
        fb = jax.lax.stop_gradient(f)[:, None]
        sb = jax.lax.stop_gradient(shift)
        step = 2 / (2 * sb + fb)
        rho2 = (fb / (2 * sb + fb) / 2) ** 2

        def iterate(_, state):
            before, x, w = state
            w = 1 / (1 - rho2 * w)
            return x, w * x - step * w * (matvec(x) - b) - (w - 1) * before, w

        first = (jnp.zeros_like(b), step * b, jnp.full_like(rho2, 2.0))
        return jax.lax.fori_loop(0, num_iter, iterate, first)[1]

    x = jax.lax.custom_linear_solve(apply, q, chebyshev, symmetric=True)
    x = jnp.where(gone[:, None], 0.0, x)
    m = q + alpha[:, None] * (x - q)
    o = scale * (jnp.exp(Gu)[:, None] * dot(m, U0) + dot(Mu * dot(m, k.T), v))
    to_end, to_end_u = jnp.exp(G[-1] - G)[:, None], jnp.exp(Gu[-1] - Gu)[:, None]
    H = jnp.exp(G[-1]) * H0 + dot((to_end * k).T, k)
    U = jnp.exp(Gu[-1]) * U0 + dot((to_end_u * k).T, v)
    return (H, U), o


def chunk_gka_xla(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    gk: Array | None = None,
    alpha: Array | None = None,
    scale: float | None = None,
    ridge_ratio: float | Array = 0.02,
    num_iter: int = 30,
    initial_state: State | None = None,
    output_final_state: bool = False,
    *,
    chunk_size: int = 64,
) -> tuple[Array, State | None]:
    """:func:`kalmanet.jax.chunk_gka` in plain jax.numpy, by the Chebyshev iteration.

    Arguments as there, without packed sequences and other solvers. Computed in float32, or float64
    beside float64.
    """
    ridge = ridge_ratio if getattr(ridge_ratio, "ndim", 0) > 0 else None
    check_shapes(
        q, k, v, {"g": g, "gk": gk, "alpha": alpha, "ridge_ratio": ridge}, initial_state, None
    )
    B, T, H, K = q.shape
    V = v.shape[3]
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    scale = K**-0.5 if scale is None else scale
    C = min(chunk_size, T)
    pad = -T % C

    def gate(t: Any, value: float) -> Array:
        return jnp.full((B, T, H), value, dtype) if t is None else t.astype(dtype)

    tokens = {
        "q": q.astype(dtype),
        "k": k.astype(dtype),
        "v": v.astype(dtype),
        "g": gate(g, 0.0),
        "gk": gate(gk, 0.0),
        "alpha": gate(alpha, 1.0),
        "a": gate(ridge, 0.0) if ridge is not None else jnp.full((B, T, H), ridge_ratio, dtype),
    }

    def chunks(name: str, t: Array) -> Array:  # [B,T,H,..] -> [B,H,T/C,C,..]
        # Tokens behind the end have keys of zero and do not decay: they change no state.
        widths = [(0, 0), (0, pad)] + [(0, 0)] * (t.ndim - 2)
        t = jnp.pad(t, widths, constant_values=1.0 if name == "a" else 0.0)
        t = jnp.moveaxis(t, 2, 1)
        return t.reshape(B, H, (T + pad) // C, C, *t.shape[3:])

    tokens = {name: chunks(name, t) for name, t in tokens.items()}
    if initial_state is None:
        start = jnp.zeros((B, H, K, K), dtype), jnp.zeros((B, H, K, V), dtype)
    else:
        start = initial_state[0].astype(dtype), initial_state[1].astype(dtype)

    def head(carry: State, of_head: dict[str, Array]):
        return jax.lax.scan(lambda c, t: _chunk(c, t, num_iter, scale), carry, of_head)

    (h, u), o = jax.vmap(jax.vmap(head))(start, tokens)
    o = jnp.moveaxis(o.reshape(B, H, T + pad, V), 1, 2)[:, :T].astype(v.dtype)
    return o, (h, u) if output_final_state else None
