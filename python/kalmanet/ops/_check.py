"""Arguments of the operators: what is checked, and how they reach the library.

Every mistake is a ValueError that names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
MAX_NUM_ITER = 1_000_000
# "meta": shapes without data. A build without CUDA kernels says so itself when it is called.
DEVICES = ("cpu", "cuda", "meta")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SOLVERS = ("chebyshev", "direct", "cg", "auto")
ARITHMETICS = ("standard", "bfloat16")


def shape(t: Tensor) -> list[int]:
    return list(t.shape)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        listed = ", ".join(f'"{a}"' for a in allowed)
        raise ValueError(f"{name}: is {value!r}; allowed are {listed}")


def tensor(name: str, value: object, sizes: str, rank: int) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: must be a tensor {sizes}, got {type(value).__name__}")
    if value.dim() != rank:
        raise ValueError(f"{name}: must have the {rank} dimensions {sizes}, got {shape(value)}")
    if value.dtype not in FLOATS:
        raise ValueError(
            f"{name}: has dtype {value.dtype}; allowed are float32, float64, bfloat16 and float16"
        )


def devices(named: dict[str, Tensor | None]) -> None:
    """All on one device, of a kind for which there are kernels."""
    device = named["q"].device  # type: ignore[union-attr]
    for name, t in named.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name}: is on {t.device}, but q is on {device}")
    if device.type not in DEVICES:
        raise ValueError(
            f"q: is on {device}, for which kalmanet has no kernels; move the tensors to the CPU or "
            f"to a CUDA device (`python -m kalmanet.doctor` lists what is there)"
        )


def head_dims(q: Tensor, v: Tensor) -> None:
    for name, size in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: has a head dim (last size) of {size}; allowed are 1 to {MAX_HEAD_DIM}"
            )


def published(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gk: Tensor | None, alpha: Tensor | None
) -> tuple[int, int, int, int, int]:
    """The shapes that the published operators ask for. Returns B, T, H, K, V."""
    tensor("q", q, "[B,T,H,K]", 4)
    tensor("k", k, "[B,T,H,K]", 4)
    tensor("v", v, "[B,T,H,V]", 4)
    if k.shape != q.shape:
        raise ValueError(f"k: must have q's shape {shape(q)} ([B,T,H,K]), got {shape(k)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: must be [B,T,H,V] with q's B, T and H {shape(q)[:3]}, got {shape(v)}")
    head_dims(q, v)
    for name, gate in (("g", g), ("gk", gk), ("alpha", alpha)):
        per_token(name, gate, q)
    B, T, H, K = q.shape
    return B, T, H, K, v.shape[3]


def per_token(name: str, gate: Tensor | None, q: Tensor) -> None:
    if gate is None:
        return
    tensor(name, gate, "[B,T,H]", 3)
    if gate.shape != q.shape[:3]:
        raise ValueError(f"{name}: must be [B,T,H] = {shape(q)[:3]}, got {shape(gate)}")


def ridge(ridge_ratio: float | Tensor, q: Tensor, H: int) -> tuple[float, Tensor | None]:
    """As the operator takes it: a number, and a tensor [B,T,H] if it is one."""
    if not isinstance(ridge_ratio, Tensor):
        if not (isinstance(ridge_ratio, (int, float)) and 0 < ridge_ratio < math.inf):
            raise ValueError(f"ridge_ratio: is {ridge_ratio!r}; it must be a positive number")
        return float(ridge_ratio), None
    B, T = q.shape[:2]
    if ridge_ratio.dim() == 0:
        ridge_ratio = ridge_ratio.expand(B, T, H)
    tensor("ridge_ratio", ridge_ratio, "[B,T,H]", 3)
    if ridge_ratio.shape != (B, T, H):
        raise ValueError(
            f"ridge_ratio: must be a number or a tensor [B,T,H] = {[B, T, H]}, "
            f"got {shape(ridge_ratio)}"
        )
    return 0.02, ridge_ratio


def steps(num_iter: int | str) -> int:
    """As the operator takes it: 0 is "auto"."""
    if num_iter == "auto":
        return 0
    if isinstance(num_iter, bool) or not isinstance(num_iter, (int, torch.SymInt)):
        raise ValueError(f'num_iter: is {num_iter!r}; it must be a whole number >= 1, or "auto"')
    if not 1 <= num_iter <= MAX_NUM_ITER:
        raise ValueError(
            f'num_iter: is {num_iter}; it must be >= 1 (at most {MAX_NUM_ITER}), or "auto"'
        )
    return num_iter


def solver_options(solver: str, tolerance: float, arithmetic: str, chunk_size: int) -> None:
    one_of("solver", solver, SOLVERS)
    one_of("arithmetic", arithmetic, ARITHMETICS)
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance: is {tolerance}; it must be >= 0 and < 1 (0: what the dtype can carry)"
        )
    if not 0 <= chunk_size <= 256:
        raise ValueError(f"chunk_size: is {chunk_size}; allowed are 1 to 256, or 0: chosen for you")


def offsets(cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, batch: int) -> Tensor | None:
    """Of packed sequences, int64 on the CPU as the operator takes them."""
    cu = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    if cu is None:
        return None
    if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.dtype not in (torch.int64, torch.int32):
        came = f"{shape(cu)} of {cu.dtype}" if isinstance(cu, Tensor) else type(cu).__name__
        raise ValueError(f"cu_seqlens: must be int64 [N+1], from 0 to T, got {came}")
    if cu.shape[0] < 2:
        raise ValueError(f"cu_seqlens: needs at least 2 offsets (one sequence), got {cu.shape[0]}")
    if batch != 1:
        raise ValueError(
            f"cu_seqlens: needs B == 1 (all sequences packed into one row), got B = {batch}"
        )
    return cu.to(device="cpu", dtype=torch.int64)


def states(
    initial_state: tuple[Tensor, Tensor] | None, N: int, H: int, K: int, V: int
) -> tuple[Tensor | None, Tensor | None]:
    if initial_state is None:
        return None, None
    if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
        raise ValueError(
            f"initial_state: must be a tuple (h_kk [N,H,K,K], h_kv [N,H,K,V]), got "
            f"{type(initial_state).__name__}"
        )
    for name, t, last in (("h_kk", initial_state[0], K), ("h_kv", initial_state[1], V)):
        label = f"initial_state ({name})"
        letters = "[N,H,K,K]" if name == "h_kk" else "[N,H,K,V]"
        tensor(label, t, letters, 4)
        if t.shape != (N, H, K, last):
            raise ValueError(f"{label}: must be {letters} = {[N, H, K, last]}, got {shape(t)}")
    return initial_state[0], initial_state[1]


def common_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The one that holds all three."""
    if q.dtype == k.dtype == v.dtype:
        return q.dtype
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def fine(dtype: torch.dtype) -> torch.dtype:
    """What states and sums have beside `dtype`: float64 beside float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_gate(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A per-token tensor beside q of `dtype`: of that dtype, or float32 beside 16 bits."""
    if t is None or t.dtype == dtype or t.dtype == fine(dtype):
        return t
    return t.to(fine(dtype))


def as_state(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(fine(dtype))
