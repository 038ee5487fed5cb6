"""The layer's settings: both published constructors' names, put into one form and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .ops import _check

MAX_CONV = 16
MIN_LEARNED_RIDGE, MAX_LEARNED_RIDGE, FIRST_LEARNED_RIDGE = 1.2e-4, 0.135, 0.01


@dataclass
class LayerOptions:
    """What a layer is, by one name each; :class:`kalmanet.GatedKalmaNet` explains them."""

    hidden_size: int
    head_dim: int
    num_heads: int
    num_k_heads: int
    num_v_heads: int
    expand_v: float
    use_beta_gate: bool
    use_alpha_connection: bool
    use_v_conv: bool
    use_forgetting_gate: bool
    use_forgetting_gate_kk: bool
    gla_rescale: bool
    use_gate: bool
    bp_lambda: bool
    ridge_ratio: float
    num_iter: int | str
    solver: str
    tolerance: float
    arithmetic: str
    conv_size: int
    norm_eps: float
    qk_norm: str
    learned_ridge: bool
    fixed_alpha: float | None
    chunk_size: int
    backend: str
    kv_proj_rank: int | None
    kv_learnable_residual: bool

    @property
    def heads(self) -> int:
        """H, the largest of the three head counts."""
        return max(self.num_heads, self.num_k_heads, self.num_v_heads)

    @property
    def value_dim(self) -> int:
        """V"""
        return round(self.expand_v * self.head_dim)

    @property
    def expands(self) -> bool:
        """Whether keys and values go through the low-rank expansion."""
        return self.kv_proj_rank is not None and (
            self.num_k_heads < self.heads or self.num_v_heads < self.heads
        )


def between(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: is {value!r}; it must be an integer from {low} to {high}")


def one_name(first: str, a: Any, second: str, b: Any, default: Any) -> Any:
    """Two published names of one setting."""
    if a is not None and b is not None and a != b:
        raise ValueError(f"{first} is {a} and {second} is {b}: they are two names of one setting")
    given = a if a is not None else b
    return default if given is None else given


def check(o: LayerOptions) -> LayerOptions:
    """ValueError naming the setting that does not fit; returns `o`."""
    many = 1 << 24
    between("hidden_size", o.hidden_size, 1, many)
    between("head_dim", o.head_dim, 1, _check.MAX_HEAD_DIM)
    for name in ("num_heads", "num_k_heads", "num_v_heads"):
        between(name, getattr(o, name), 1, many)
        if o.heads % getattr(o, name):
            raise ValueError(
                f"{name}: is {getattr(o, name)}, which does not divide the largest head count, "
                f"{o.heads}: every head of the layer reads one head of each"
            )
    between("conv_size", o.conv_size, 1, MAX_CONV)
    exact = o.expand_v * o.head_dim
    if not exact >= 0.5 or abs(exact - round(exact)) > 1e-5 * exact:
        raise ValueError(
            f"expand_v: is {o.expand_v}, which gives a value head dim of {exact} at head_dim "
            f"{o.head_dim}; it must be an integer >= 1"
        )
    if o.value_dim > _check.MAX_HEAD_DIM:
        raise ValueError(
            f"expand_v: gives a value head dim of {o.value_dim}; allowed are 1 to "
            f"{_check.MAX_HEAD_DIM}"
        )
    _check.ridge(o.ridge_ratio, None, 0)  # type: ignore[arg-type]
    steps = _check.steps(o.num_iter)
    _check.solver_options(o.solver, o.tolerance, o.arithmetic, o.chunk_size)
    if o.arithmetic == "bfloat16" and (
        o.solver != "chebyshev" or steps == 0 or o.learned_ridge
    ):  # fmt: skip
        raise ValueError(
            'arithmetic: is "bfloat16", which is for solver "chebyshev" with a num_iter >= 1; it '
            'cannot meet the tolerance that the other solvers, num_iter "auto" and learned_ridge '
            "aim at"
        )
    if not (0 <= o.norm_eps < math.inf):
        raise ValueError(f"norm_eps: is {o.norm_eps}; it must not be negative")
    _check.one_of("qk_norm", o.qk_norm, ("official", "fla"))
    if o.fixed_alpha is not None:
        if not 0 <= o.fixed_alpha <= 1:
            raise ValueError(f"fixed_alpha: is {o.fixed_alpha}; it must be between 0 and 1")
        if not o.use_alpha_connection and o.fixed_alpha != 1:
            raise ValueError(
                f"fixed_alpha: is {o.fixed_alpha} but use_alpha_connection is False, which means "
                f"alpha 1; set one of the two only"
            )
        if o.learned_ridge and o.fixed_alpha == 0:
            raise ValueError(
                "learned_ridge: has no effect with fixed_alpha 0, where nothing is solved; set one "
                "of the two only"
            )
    if o.kv_proj_rank is not None:
        between("kv_proj_rank", o.kv_proj_rank, 1, many)
    elif o.kv_learnable_residual:
        raise ValueError("kv_learnable_residual: needs a kv_proj_rank, which is None")
    return o
