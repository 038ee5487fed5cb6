"""The layer's recurrent step for a few tokens: what lies between its projections, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._layer_options import MAX_LEARNED_RIDGE, MIN_LEARNED_RIDGE, LayerOptions
from .state import LayerState

_ops = torch.ops.kalmanet


def can_fuse(o: LayerOptions, x: Tensor) -> bool:
    """Otherwise the step goes operator by operator, to the same answer."""
    device = x.device.type
    return not o.expands and device in ("cpu", "cuda") and o.backend in ("auto", device)


def fused_step(layer: Any, x: Tensor, state: LayerState) -> Tensor:
    """x [B,T,D] of a GatedKalmaNet up to the output projection, [B,T,H*V]; `state` is updated in
    place."""
    o = layer.options
    K, V, H = o.head_dim, o.value_dim, o.heads
    q = layer.q_proj(x).unflatten(-1, (o.num_heads, K))

    def heads(name: str, *sizes: int) -> Tensor | None:
        projection = getattr(layer, name, None)
        if projection is None:
            return None
        return projection(x).to(q.dtype).unflatten(-1, sizes)

    def weight(name: str) -> Tensor | None:
        convolution = getattr(layer, name, None)
        return None if convolution is None else convolution.weight.squeeze(1)

    solver, num_iter = o.solver, 0 if o.num_iter == "auto" or o.learned_ridge else o.num_iter
    if o.fixed_alpha == 0:
        solver, num_iter = "chebyshev", 1  # nothing is solved
    conv_q, conv_k, conv_v = state.conv
    out, _ = _ops.layer_step(
        q, heads("k_proj", o.num_k_heads, K), heads("v_proj", o.num_v_heads, V), state.h, state.u,
        conv_q, conv_k, conv_v, weight("q_conv1d"), weight("k_conv1d"), weight("v_conv1d"),
        layer.o_norm.weight, heads("g_proj", H, V), heads("b_proj", H), heads("alpha_proj", H),
        heads("a_proj", H), heads("ridge_proj", H), getattr(layer, "A_log", None),
        getattr(layer, "dt_bias", None), scale=None if o.gla_rescale else 1.0,
        ridge_ratio=o.ridge_ratio, solver=solver, num_iter=num_iter, tolerance=o.tolerance,
        decay_h=o.use_forgetting_gate_kk,
        fixed_alpha=1.0 if o.fixed_alpha is None else o.fixed_alpha, qk_norm=o.qk_norm,
        min_ridge=MIN_LEARNED_RIDGE, max_ridge=MAX_LEARNED_RIDGE, norm_eps=o.norm_eps,
    )  # fmt: skip
    return out.flatten(2)
