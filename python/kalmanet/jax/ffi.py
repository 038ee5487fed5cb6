"""The library's kernels as XLA foreign functions on the CPU, with their gradients."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jax

Array = jax.Array
State = tuple[Array, Array]

VARIABLE = "KALMANET_JAX_LIBRARY"
FILE = "libkalmanet_jax.so"
_NAMES = ("q", "k", "v", "g", "gk", "alpha", "ridge", "h0", "u0", "cu_seqlens")


@functools.cache
def _register() -> None:
    """Loads the library and tells XLA of its functions, once."""
    path = Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[1] / FILE)
    if not path.is_file():
        raise ImportError(
            f"kalmanet.jax: {path} is missing. Install the package with `pip install .`; to use a "
            f"build from a checkout, set {VARIABLE} to its build/release/src/jax/{FILE}"
        )
    library = ctypes.CDLL(str(path))
    for name in ("kalmanet_gka_forward", "kalmanet_gka_backward"):
        capsule = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def _fine(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _mask(operands: tuple[Array | None, ...]) -> np.int64:
    return np.int64(sum(1 << i for i, t in enumerate(operands) if t is not None))


def _filled(operands: tuple[Array | None, ...]) -> list[Array]:
    """An absent operand is a buffer of nothing."""
    return [jnp.zeros((0,), jnp.float32) if t is None else t for t in operands]


def _vmap_method(cu_seqlens: Array | None) -> str:
    # A mapped dimension becomes part of the batch; packed sequences have none.
    return "broadcast_all" if cu_seqlens is None else "sequential"


def _forward(options: tuple, *operands: Array | None) -> tuple[Array, Array, Array, Array]:
    q, _k, v = operands[:3]
    assert q is not None and v is not None  # what has defaults comes after them
    cu = operands[9]
    B, T, H, K = q.shape
    V = v.shape[3]
    N = B if cu is None else cu.shape[0] - 1
    fine = _fine(q.dtype)
    results = (
        jax.ShapeDtypeStruct((B, T, H, V), q.dtype),
        jax.ShapeDtypeStruct((N, H, K, K), fine),
        jax.ShapeDtypeStruct((N, H, K, V), fine),
        jax.ShapeDtypeStruct((B, T, H, K), fine),
    )
    attributes = {name: value for name, value in options if name != "bp_lambda"}
    call = jax.ffi.ffi_call("kalmanet_gka_forward", results, vmap_method=_vmap_method(cu))
    o, h, u, x = call(*_filled(operands), given=_mask(operands), **attributes)
    return o, h, u, x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gka(options: tuple, *operands: Array | None) -> tuple[Array, Array, Array]:
    return _forward(options, *operands)[:3]


def _gka_fwd(options: tuple, *operands: Array | None):
    o, h, u, x = _forward(options, *operands)
    return (o, h, u), (operands, x)


def _gka_bwd(options: tuple, saved, cotangents):
    operands, x = saved
    d_o, dh, du = cotangents
    everything = (*operands, x, d_o, dh, du)
    nothing = jax.ShapeDtypeStruct((0,), jnp.float32)
    results = tuple(
        nothing if t is None else jax.ShapeDtypeStruct(t.shape, t.dtype) for t in operands[:9]
    )
    call = jax.ffi.ffi_call("kalmanet_gka_backward", results, vmap_method=_vmap_method(operands[9]))
    grads = call(*_filled(everything), given=_mask(everything), **dict(options))
    none_of_offsets = (
        None if operands[9] is None else np.zeros(operands[9].shape, jax.dtypes.float0)
    )
    return (
        *(None if t is None else grad for t, grad in zip(operands, grads)),
        none_of_offsets,
    )


_gka.defvjp(_gka_fwd, _gka_bwd)


def check_shapes(q, k, v, gates: dict[str, Any], initial_state, cu_seqlens) -> None:
    """The published ValueErrors."""

    def shape(t) -> list[int]:
        return list(t.shape)

    for name, t, letters in (("q", q, "[B,T,H,K]"), ("k", k, "[B,T,H,K]"), ("v", v, "[B,T,H,V]")):
        if t.ndim != 4:
            raise ValueError(f"{name}: must have the 4 dimensions {letters}, got {shape(t)}")
    if k.shape != q.shape:
        raise ValueError(f"k: must have q's shape {shape(q)} ([B,T,H,K]), got {shape(k)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: must be [B,T,H,V] with q's B, T and H {shape(q)[:3]}, got {shape(v)}")
    for name, t in gates.items():
        if t is not None and t.shape != q.shape[:3]:
            raise ValueError(f"{name}: must be [B,T,H] = {shape(q)[:3]}, got {shape(t)}")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: needs B == 1, got B = {q.shape[0]}")
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _, _, H, K = q.shape
        for name, t, last in (
            ("h_kk", initial_state[0], K),
            ("h_kv", initial_state[1], v.shape[3]),
        ):
            if t.shape != (N, H, K, last):
                raise ValueError(
                    f"initial_state ({name}): must be {[N, H, K, last]}, got {shape(t)}"
                )


def chunk_gka(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    gk: Array | None = None,
    alpha: Array | None = None,
    scale: float | None = None,
    ridge_ratio: float | Array = 0.02,
    num_iter: int | str = 30,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Array | None = None,
    *,
    solver: str = "chebyshev",
    tolerance: float = 1e-5,
    bp_lambda: bool = True,
    chunk_size: int = 0,
) -> tuple[Array, State | None]:
    """:func:`kalmanet.ops.chunk_gka` for JAX arrays, by the library's kernels on the CPU.

    Shapes and meaning as there: q, k ``[B,T,H,K]``, v ``[B,T,H,V]``, g, gk, alpha and an array
    ridge_ratio ``[B,T,H]``, cu_seqlens int32 ``[N+1]``; numbers and strings are static under
    ``jit``. ``vmap`` folds a mapped dimension into the batch (packed sequences run one by one).
    Returns ``(o, final_state)``. ValueError: shapes that do not fit; what only the library can see
    is a run-time error of XLA with the library's message.
    """
    array_ridge = isinstance(ridge_ratio, (jax.Array, np.ndarray)) and ridge_ratio.ndim > 0
    ridge: Any = ridge_ratio if array_ridge else None
    check_shapes(
        q, k, v, {"g": g, "gk": gk, "alpha": alpha, "ridge_ratio": ridge}, initial_state, cu_seqlens
    )
    if num_iter != "auto" and not (isinstance(num_iter, int) and num_iter >= 1):
        raise ValueError(f'num_iter: is {num_iter!r}; it must be >= 1, or "auto"')
    if not array_ridge and not float(ridge_ratio) > 0:
        raise ValueError(f"ridge_ratio: is {ridge_ratio!r}; it must be a positive number")
    _register()
    dtype = jnp.promote_types(jnp.promote_types(q.dtype, k.dtype), v.dtype)
    fine = _fine(dtype)
    out_dtype = v.dtype
    h0, u0 = (None, None) if initial_state is None else (t.astype(fine) for t in initial_state)
    operands = (
        *(t.astype(dtype) for t in (q, k, v)),
        *(None if t is None else t.astype(fine) for t in (g, gk, alpha, ridge)),
        h0,
        u0,
        None if cu_seqlens is None else jnp.asarray(cu_seqlens).astype(jnp.int32),
    )
    options = (
        ("scale", np.float64(q.shape[3] ** -0.5 if scale is None else scale)),
        ("ridge_ratio", np.float64(0.02 if array_ridge else ridge_ratio)),
        ("solver", solver),
        ("num_iter", np.int64(0 if num_iter == "auto" else num_iter)),
        ("tolerance", np.float64(tolerance)),
        ("chunk_size", np.int64(chunk_size)),
        ("bp_lambda", bool(bp_lambda)),
    )
    o, h, u = _gka(options, *operands)
    return o.astype(out_dtype), (h, u) if output_final_state else None


def fused_recurrent_gka(*args: Any, **kwargs: Any) -> tuple[Array, State | None]:
    """The same function under its other published name: the answer does not depend on it."""
    return chunk_gka(*args, **kwargs)
