"""What PyTorch must know of ``torch.ops.kalmanet.*`` beyond the kernels: shapes without data
(fake kernels), gradients and vmap.

Importing this module registers all of it, once. Letters: B batch, T tokens, H heads, K key head
dim, V value head dim, N sequences, D channels, W convolution width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  (the operators must exist)

_ops = torch.ops.kalmanet

# gka_forward's arguments in front of the `*`: the first ten have gradients, cu_seqlens has none.
GKA_TENSORS = ("q", "k", "v", "g", "gk", "alpha", "beta", "ridge", "h0", "u0", "cu_seqlens")
_SOLVER = ("scale", "ridge_ratio", "solver", "num_iter", "tolerance", "chunk_size", "arithmetic")


def _fine(dtype: torch.dtype) -> torch.dtype:
    """Of states, x and the residual: float32, or float64 where q is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _none(like: Tensor) -> Tensor:
    """What an operator returns where a result was not asked for."""
    return like.new_empty((0,), dtype=torch.float32)


# ---- shapes without data ----


def _sizes(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    H = max([q.shape[2], k.shape[2], v.shape[2]] + [t.shape[2] for t in gates if t is not None])
    return q.shape[0], q.shape[1], H, q.shape[3], v.shape[3]


def _padded(width: int) -> int:
    return (width + 15) // 16 * 16


def _keeps_segments(q: Tensor, chunk_size: int, backend: str) -> bool:
    """As src/torch/gka.cpp."""
    return (
        not q.is_cuda
        and backend in ("auto", "cpu")
        and (chunk_size == 0 or chunk_size & (chunk_size - 1) == 0)
    )


@torch.library.register_fake("kalmanet::gka_forward")
def _(
    q, k, v, g=None, gk=None, alpha=None, beta=None, ridge=None, h0=None, u0=None,
    cu_seqlens=None, *, save_x=False, want_residual=False, chunk_size=0, backend="auto",
    **_options,
):  # fmt: skip
    B, T, H, K, V = _sizes(q, k, v, (g, gk, alpha, beta, ridge))
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    fine = _fine(q.dtype)
    return (
        q.new_empty((B, T, H, V)),
        q.new_empty((N, H, K, K), dtype=fine),
        q.new_empty((N, H, K, V), dtype=fine),
        q.new_empty((B, T, H, K), dtype=fine) if save_x else _none(q),
        q.new_empty((B, T, H), dtype=fine) if want_residual else _none(q),
        q.new_empty((B, H, T, -(-_padded(K) * (_padded(K) + _padded(V)) // 512)), dtype=fine)
        if save_x and _keeps_segments(q, chunk_size, backend)
        else _none(q),
    )


@torch.library.register_fake("kalmanet::gka_backward")
def _(
    d_o, q, k, v, g=None, gk=None, alpha=None, beta=None, ridge=None, h0=None, u0=None,
    cu_seqlens=None, x=None, segment_states=None, dh=None, du=None, **_options,
):  # fmt: skip
    inputs = (q, k, v, g, gk, alpha, beta, ridge, h0, u0)
    fine = _fine(q.dtype)

    def grad(i: int, t: Tensor | None) -> Tensor:
        if t is None:
            return _none(q)
        dtype = fine if i >= 8 else t.dtype
        return q.new_empty(t.shape, dtype=dtype)

    return tuple(grad(i, t) for i, t in enumerate(inputs))


@torch.library.register_fake("kalmanet::gka_step")
def _(
    q, k, v, h, u, g=None, gk=None, alpha=None, beta=None, ridge=None, cu_seqlens=None,
    slots=None, draft_k=None, draft_v=None, draft_g=None, draft_gk=None, draft_beta=None,
    accepted=None, *, want_residual=False, **_options,
):  # fmt: skip
    B, T, H, _, V = _sizes(q, k, v, (g, gk, alpha, beta, ridge))
    residual = q.new_empty((B, T, H), dtype=_fine(q.dtype)) if want_residual else _none(q)
    return q.new_empty((B, T, H, V)), residual


@torch.library.register_fake("kalmanet::layer_step")
def _(q, k, v, h, u, *_tensors, want_residual=False, **_options):
    B, T, H, V = q.shape[0], q.shape[1], h.shape[1], v.shape[3]
    residual = q.new_empty((B, T, H)) if want_residual else _none(q)
    return q.new_empty((B, T, H, V)), residual


@torch.library.register_fake("kalmanet::causal_conv_forward")
def _(x, weight, state=None, cu_seqlens=None, *, silu=True, want_final_state=False):
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty((N, x.shape[2], weight.shape[1])) if want_final_state else _none(x)
    return x.new_empty(x.shape), final


@torch.library.register_fake("kalmanet::causal_conv_backward")
def _(dy, x, weight, state=None, cu_seqlens=None, d_final_state=None, *, silu=True):
    dstate = _none(x) if state is None else x.new_empty(state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dstate


@torch.library.register_fake("kalmanet::causal_conv_step")
def _(x, weight, state, *, silu=True):
    return x.new_empty(x.shape)


@torch.library.register_fake("kalmanet::gated_rms_norm_forward")
def _(o, gate, weight, *, eps=1e-6):
    return o.new_empty(o.shape)


@torch.library.register_fake("kalmanet::gated_rms_norm_backward")
def _(dy, o, gate, weight, *, eps=1e-6):
    d_gate = _none(o) if gate is None else o.new_empty(o.shape)
    return o.new_empty(o.shape), d_gate, weight.new_empty(weight.shape)


@torch.library.register_fake("kalmanet::unit_norm_forward")
def _(x, *, kind="official", eps=1e-6):
    return x.new_empty(x.shape)


@torch.library.register_fake("kalmanet::unit_norm_backward")
def _(dy, x, *, kind="official", eps=1e-6):
    return x.new_empty(x.shape)


# (load_state has none: the dtype and the sizes of what it gives are in its data.)
@torch.library.register_fake("kalmanet::save_state")
def _(h, u):
    # A header of 128 bytes, then both states (docs/state-format.md).
    return h.new_empty((128 + (h.numel() + u.numel()) * h.element_size(),), dtype=torch.uint8)


@torch.library.register_fake("kalmanet::saved_state_bytes")
def _(buffer):
    return buffer.new_empty((8,), dtype=torch.uint8)


# ---- gradients ----


def _gka_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    x = output[3] if keyword_only_inputs["save_x"] else None
    segments = output[5] if output[5].dim() == 4 else None
    ctx.save_for_backward(*inputs, x, segments)
    ctx.options = {name: keyword_only_inputs[name] for name in (*_SOLVER, "bp_lambda", "backend")}


def _gka_gradient(ctx, d_o, dh, du, _dx, _dresidual, _dsegments):
    *inputs, x, segments = ctx.saved_tensors
    if d_o is None and dh is None and du is None:
        return (None,) * len(inputs)
    q, v = inputs[0], inputs[2]
    if d_o is None:
        heads = (dh if dh is not None else du).shape[1]
        d_o = q.new_zeros((q.shape[0], q.shape[1], heads, v.shape[3]))
    grads = _ops.gka_backward(d_o, *inputs, x, segments, dh, du, **ctx.options)
    return (*(g if t is not None else None for g, t in zip(grads, inputs[:10])), None)


torch.library.register_autograd("kalmanet::gka_forward", _gka_gradient, setup_context=_gka_setup)


def _conv_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.silu = keyword_only_inputs["silu"]
    ctx.wanted = keyword_only_inputs["want_final_state"]


def _conv_gradient(ctx, dy, d_final):
    x, weight, state, cu_seqlens = ctx.saved_tensors
    if not ctx.wanted:
        d_final = None
    if dy is None and d_final is None:
        return None, None, None, None
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dstate = _ops.causal_conv_backward(
        dy, x, weight, state, cu_seqlens, d_final, silu=ctx.silu
    )
    return dx, dweight, None if state is None else dstate, None


torch.library.register_autograd(
    "kalmanet::causal_conv_forward", _conv_gradient, setup_context=_conv_setup
)


def _norm_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.eps = keyword_only_inputs["eps"]


def _norm_gradient(ctx, dy):
    o, gate, weight = ctx.saved_tensors
    d_o, d_gate, d_weight = _ops.gated_rms_norm_backward(dy, o, gate, weight, eps=ctx.eps)
    return d_o, None if gate is None else d_gate, d_weight


torch.library.register_autograd(
    "kalmanet::gated_rms_norm_forward", _norm_gradient, setup_context=_norm_setup
)


def _unit_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _unit_gradient(ctx, dy):
    (x,) = ctx.saved_tensors
    return _ops.unit_norm_backward(dy, x, **ctx.options)


torch.library.register_autograd(
    "kalmanet::unit_norm_forward", _unit_gradient, setup_context=_unit_setup
)


def _first_derivatives_only(name: str) -> None:
    def setup(ctx, inputs, keyword_only_inputs, output) -> None:
        pass

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"kalmanet::{name}: second derivatives do not exist: the backward pass cannot itself "
            f"be differentiated. Use kalmanet.ops.naive_recurrent_gka, which is plain PyTorch, or "
            f"drop create_graph"
        )

    torch.library.register_autograd(f"kalmanet::{name}", refuse, setup_context=setup)


for _name in (
    "gka_backward",
    "causal_conv_backward",
    "gated_rms_norm_backward",
    "unit_norm_backward",
):
    _first_derivatives_only(_name)


# ---- vmap ----
#
# A mapped dimension becomes part of the batch, which every operator has. Packed sequences have no
# batch: they are run one after the other.


def _folded(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """t with the mapped dimension (or a new one of `size`) in front, merged into the next."""
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _one(t: Any, dim: int | None, i: int) -> Any:
    return t.select(dim, i) if isinstance(t, Tensor) and dim is not None else t


def _one_by_one(op, info, in_dims, args, options):
    parts = [
        op(*(_one(t, d, i) for t, d in zip(args, in_dims)), **options)
        for i in range(info.batch_size)
    ]
    if isinstance(parts[0], Tensor):
        return torch.stack(parts), 0
    return tuple(torch.stack(results) for results in zip(*parts)), (0,) * len(parts[0])


def _filled(args: tuple, in_dims: tuple, count: int) -> tuple[tuple, tuple]:
    """The dispatcher leaves out trailing arguments that have their default, None."""
    missing = count - len(args)
    return (*args, *(None,) * missing), (*in_dims, *(None,) * missing)


def _register_batched(name: str, count: int, cu_index: int | None, whole: frozenset[int]):
    """vmap by folding for an operator of `count` tensors. `cu_index`: which of them is cu_seqlens.
    `whole`: which have no batch dimension (weights); mapped over, they are run one by one. So are
    results that add up over the batch (their gradients)."""
    op = getattr(_ops, name)

    def rule(info, in_dims, *args, **options):
        args, in_dims = _filled(args, in_dims, count)
        packed = cu_index is not None and args[cu_index] is not None
        if packed and in_dims[cu_index] is not None:
            raise ValueError(
                f"cu_seqlens: vmap cannot map over it (kalmanet::{name}): it says where sequences "
                f"end, and must be the same for every mapped call; use in_dims=None for it"
            )
        if packed or (whole and (name.endswith("backward") or any(
            in_dims[i] is not None for i in whole
        ))):  # fmt: skip
            return _one_by_one(op, info, in_dims, args, options)
        size = info.batch_size
        folded = (
            t if i in whole else _folded(t, d, size) for i, (t, d) in enumerate(zip(args, in_dims))
        )
        results = op(*folded, **options)
        single = isinstance(results, Tensor)
        unfolded = tuple(
            # Not asked for: zero elements, one dimension.
            t.expand(size, 0) if t.dim() == 1 and t.shape[0] == 0
            else t.unflatten(0, (size, t.shape[0] // size))
            for t in ((results,) if single else results)
        )  # fmt: skip
        return (unfolded[0], 0) if single else (unfolded, (0,) * len(unfolded))

    torch.library.register_vmap(f"kalmanet::{name}", rule)


_register_batched("gka_forward", 11, 10, frozenset())
_register_batched("gka_backward", 16, 11, frozenset())
_register_batched("causal_conv_forward", 4, 3, frozenset({1}))
_register_batched("causal_conv_backward", 6, 4, frozenset({2}))
_register_batched("gated_rms_norm_forward", 3, None, frozenset({2}))
_register_batched("gated_rms_norm_backward", 4, None, frozenset({3}))
_register_batched("unit_norm_forward", 1, None, frozenset())
_register_batched("unit_norm_backward", 2, None, frozenset())
