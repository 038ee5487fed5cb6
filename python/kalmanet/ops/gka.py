"""Gated KalmaNet over whole or packed sequences: the library's operators, differentiable.

Per batch element and head (letters: B batch, T tokens, H heads, K key head dim, V value head dim, N
sequences: B, or the number of packed ones)::

    H_t = e^{gk_t} H_{t-1} + k_t k_t^T        f_t = |H_t|_F        lambda_t = ridge_ratio f_t
    U_t = e^{g_t}  U_{t-1} + k_t v_t^T        x_t = (H_t + lambda_t I)^{-1} q_t
    o_t = scale * U_t^T (q_t + alpha_t (x_t - q_t))

Where f_t <= 2^-60 (nothing seen yet, or all of it faded) x_t = 0.

dtypes: float32, float64, bfloat16, float16. 16-bit inputs are computed with in float32 and rounded
once where they are written, also under autocast, which changes nothing here. States are float32,
or float64 beside float64. Gradients are those of the exact ridge solution, by implicit
differentiation, for every tensor and through both states; a second derivative is a RuntimeError.
An initial ``h_kk`` is taken for symmetric, as every H_t is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _registration  # noqa: F401  (shapes, gradients, vmap)
from . import _check

_ops = torch.ops.kalmanet

State = tuple[Tensor, Tensor]

# Sequences of at most this many tokens take the recurrent step where nothing needs gradients: the
# chunked operator pays for its products of a whole chunk only beyond it.
MAX_STEP_TOKENS = 8


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _transformed() -> bool:
    """Inside torch.vmap or a compiler, where an operator that writes in place is no gain.

    torch.func's own derivatives are refused: PyTorch does not pass them to operators of libraries.
    """
    if torch.compiler.is_compiling():
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    for level in stack or ():
        if level.key() != torch._C._functorch.TransformType.Vmap:
            raise RuntimeError(
                f"kalmanet: torch.func transforms other than vmap (here: {level.key().name}) do "
                f"not reach its operators; use torch.autograd.grad or backward(), inside vmap if "
                f"you like, or kalmanet.ops.naive_recurrent_gka, which is plain PyTorch"
            )
    return bool(stack)


def gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    ridge_ratio: float | Tensor = 0.02,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    solver: str = "chebyshev",
    num_iter: int | str = 30,
    tolerance: float = 1e-5,
    bp_lambda: bool = True,
    arithmetic: str = "standard",
    chunk_size: int = 0,
    backend: str = "auto",
    residual: bool = False,
) -> tuple[Tensor, State, Tensor | None]:
    """The operator with everything that it can do; the published names below call it.

    Beyond :func:`chunk_gka`: q ``[B,T,Hq,K]``, k ``[B,T,Hk,K]`` and v ``[B,T,Hv,V]`` may have fewer
    heads than H, the largest of these and of the gates' last size, which each must divide; head h
    reads head ``h // (H / count)`` and nothing is expanded in memory. ``beta`` ``[B,T,H]``
    multiplies k and v.

    Returns o ``[B,T,H,V]`` of v's dtype, the states ``(h_kk [N,H,K,K], h_kv [N,H,K,V])`` after the
    last token, and the residual ``[B,T,H]`` or None.
    """
    _transformed()
    gates = {"g": g, "gk": gk, "alpha": alpha, "beta": beta}
    for name, t, letters in (
        ("q", q, "[B,T,Hq,K]"),
        ("k", k, "[B,T,Hk,K]"),
        ("v", v, "[B,T,Hv,V]"),
    ):
        _check.tensor(name, t, letters, 4)
    for name, gate in gates.items():
        if gate is not None:
            _check.tensor(name, gate, "[B,T,H]", 3)
    H = max(
        [q.shape[2], k.shape[2], v.shape[2]] + [t.shape[2] for t in gates.values() if t is not None]
    )
    ratio, ridge = _check.ridge(ridge_ratio, q, H)
    steps = _check.steps(num_iter)
    _check.solver_options(solver, tolerance, arithmetic, chunk_size)
    cu = _check.offsets(cu_seqlens, None, q.shape[0])
    h0: Tensor | None
    u0: Tensor | None
    h0, u0 = initial_state if initial_state is not None else (None, None)
    _check.devices({"q": q, "k": k, "v": v, **gates, "h_kk": h0, "h_kv": u0})

    out_dtype = v.dtype
    dtype = _check.common_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    same = gk is g
    g = _check.as_gate(g, dtype)
    gk = g if same else _check.as_gate(gk, dtype)
    alpha, beta = _check.as_gate(alpha, dtype), _check.as_gate(beta, dtype)
    ridge = _check.as_gate(ridge, dtype)
    h0, u0 = _check.as_state(h0, dtype), _check.as_state(u0, dtype)
    o, h, u, _x, r, _segments = _ops.gka_forward(
        q, k, v, g, gk, alpha, beta, ridge, h0, u0, cu,
        scale=scale, ridge_ratio=ratio, solver=solver, num_iter=steps, tolerance=tolerance,
        chunk_size=chunk_size, arithmetic=arithmetic,
        # x spares the CPU's backward one solve. The GPU's solves again in any case, and its forward
        # is on matrix units only where it need not write x.
        save_x=not q.is_cuda and _records(q, k, v, g, gk, alpha, beta, ridge, h0, u0),
        want_residual=residual, backend=backend, bp_lambda=bp_lambda,
    )  # fmt: skip
    return o.to(out_dtype), (h, u), r.detach() if residual else None


def _call(
    q, k, v, g, gk, alpha, scale, ridge_ratio, num_iter, initial_state, output_final_state,
    cu_seqlens, cu_seqlens_cpu, step, return_residual, options,
):  # fmt: skip
    """Both published functions; `step`: token by token if that is quicker."""
    B, T, H, K, V = _check.published(q, k, v, g, gk, alpha)
    cu = _check.offsets(cu_seqlens, cu_seqlens_cpu, B)
    N = B if cu is None else cu.shape[0] - 1
    h0, u0 = _check.states(initial_state, N, H, K, V)
    ratio, ridge = _check.ridge(ridge_ratio, q, H)
    steps = _check.steps(num_iter)
    if step and T <= MAX_STEP_TOKENS and not _transformed():
        tensors = (q, k, v, g, gk, alpha, ridge, h0, u0)
        if not _records(*tensors):
            _check.solver_options(options["solver"], options["tolerance"], "standard", 0)
            return _stepped(
                q, k, v, g, gk, alpha, ridge, h0, u0, cu, (N, H, K, V), output_final_state,
                return_residual, scale=scale, ridge_ratio=ratio, num_iter=steps,
                solver=options["solver"], tolerance=options["tolerance"],
                backend=options["backend"],
            )  # fmt: skip
    o, final, residual = gka(
        q, k, v, g, gk, alpha, None, ratio if ridge is None else ridge, initial_state, cu,
        scale=scale, num_iter=num_iter, residual=return_residual, **options,
    )  # fmt: skip
    state = final if output_final_state else None
    return (o, state, residual) if return_residual else (o, state)


def _stepped(
    q, k, v, g, gk, alpha, ridge, h0, u0, cu, sizes, output_final_state, return_residual, **options
):
    _check.devices(
        {"q": q, "k": k, "v": v, "g": g, "gk": gk, "alpha": alpha, "h_kk": h0, "h_kv": u0}
    )
    dtype = _check.common_dtype(q, k, v)
    N, H, K, V = sizes
    fine = _check.fine(dtype)
    with torch.no_grad():
        # New memory either way: the caller's initial state stays as it is.
        h = q.new_zeros((N, H, K, K), dtype=fine) if h0 is None else h0.to(fine, copy=True)
        u = q.new_zeros((N, H, K, V), dtype=fine) if u0 is None else u0.to(fine, copy=True)
        o, residual = _ops.gka_step(
            q.to(dtype), k.to(dtype), v.to(dtype), h, u, _check.as_gate(g, dtype),
            _check.as_gate(gk, dtype), _check.as_gate(alpha, dtype), None,
            _check.as_gate(ridge, dtype), cu, want_residual=return_residual, **options,
        )  # fmt: skip
    result = (o.to(v.dtype), (h, u) if output_final_state else None)
    return (*result, residual) if return_residual else result


def chunk_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float | Tensor = 0.02,
    num_iter: int | str = 30,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    solver: str = "chebyshev",
    tolerance: float = 1e-5,
    return_residual: bool = False,
    bp_lambda: bool = True,
    arithmetic: str = "standard",
    chunk_size: int = 0,
    backend: str = "auto",
) -> tuple:
    """Gated KalmaNet, chunk by chunk: linear in T, differentiable.

    Args:
        q, k: ``[B,T,H,K]``, K in 1..256; the layer normalises them, this function does not.
        v: ``[B,T,H,V]``, V in 1..256.
        g, gk: ``[B,T,H]`` log decays (<= 0, base e) of U and H a token; None: no decay. The very
            same tensor may be passed for both; its gradient is then the sum.
        alpha: ``[B,T,H]`` in 0..1; 0 is gated linear attention, 1 (None) the pure ridge.
        scale: of o; None: K^-1/2.
        ridge_ratio: > 0, a number, or a tensor ``[B,T,H]`` (or of 0 dimensions) with a gradient.
        num_iter: steps of the iteration, >= 1; or "auto": as many as ``ridge_ratio`` and
            ``tolerance`` ask for, chunk by chunk and head by head.
        initial_state: ``(h_kk [N,H,K,K], h_kv [N,H,K,V])``; None: zeros.
        output_final_state: whether the states after the last token are returned.
        cu_seqlens: int64 ``[N+1]``, offsets from 0 to T of N packed sequences; needs B == 1.
            ``cu_seqlens_cpu``: the same on the CPU, if you have it.
        solver: "chebyshev" (the published one), "direct" (exact to ``tolerance``), "cg", or "auto"
            (the cheapest of the first two that meets ``tolerance``).
        tolerance: relative error that "direct", "auto" and num_iter="auto" aim at; 0: what the
            dtype can carry.
        return_residual: also return float32 ``[B,T,H]``: |(H_t + lambda_t I) x_t - q_t| / |q_t|,
            without gradient.
        bp_lambda: False: f_t is a constant to the gradient.
        arithmetic: "bfloat16": products of the Chebyshev iteration in bfloat16 (error about 1e-2).
        chunk_size: 1..256; 0: chosen for you. It never changes the meaning.
        backend: "auto", "cpu", or "reference" (the float64 oracle, slow).

    Returns:
        ``(o, final_state)``: o ``[B,T,H,V]`` of v's dtype; final_state is None unless asked for.
        With ``return_residual``, ``(o, final_state, residual)``.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected, what came.
    """
    return _call(
        q, k, v, g, gk, alpha, scale, ridge_ratio, num_iter, initial_state, output_final_state,
        cu_seqlens, cu_seqlens_cpu, False, return_residual,
        {"solver": solver, "tolerance": tolerance, "bp_lambda": bp_lambda,
         "arithmetic": arithmetic, "chunk_size": chunk_size, "backend": backend},
    )  # fmt: skip


def fused_recurrent_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float | Tensor = 0.02,
    num_iter: int | str = 30,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    solver: str = "chebyshev",
    tolerance: float = 1e-5,
    return_residual: bool = False,
    bp_lambda: bool = True,
    backend: str = "auto",
) -> tuple:
    """The same answer for one or a few new tokens; arguments as for :func:`chunk_gka`.

    At most 8 tokens that need no gradient go token by token through the states, which is what
    decoding wants; anything else is computed as by :func:`chunk_gka`, so a gradient exists always.
    ``initial_state`` is never written to.
    """
    return _call(
        q, k, v, g, gk, alpha, scale, ridge_ratio, num_iter, initial_state, output_final_state,
        cu_seqlens, None, True, return_residual,
        {"solver": solver, "tolerance": tolerance, "bp_lambda": bp_lambda, "backend": backend},
    )  # fmt: skip
