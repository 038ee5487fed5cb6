"""Qwen3's attention: grouped heads, RMS norm of each head of q and k, rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..state import KeyValues, State
from .config import HybridQwen3Config

_ops = torch.ops.kalmanet
_FIRST_CAPACITY = 64  # positions; small enough to waste nothing, then doubled


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32, of x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if weight.dtype not in (x.dtype, torch.float32):
            weight = weight.to(torch.promote_types(x.dtype, torch.float32))
        elif x.dtype == torch.float64:
            weight = weight.to(x.dtype)
        rows = _ops.gated_rms_norm_forward(x.reshape(-1, x.shape[-1]), None, weight, eps=self.eps)
        return rows.view(x.shape)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B,T,1,head_dim/2] float32 of positions [B,T]. Angles in float64: products of
    float32 lose whole digits at large positions."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double().unsqueeze(-1) * torch.pow(theta, -exponent)
    return angles.cos().float().unsqueeze(2), angles.sin().float().unsqueeze(2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x [B,T,H,D] turned by halves."""
    cos, sin = rope
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


class Attention(nn.Module):
    """x [B,T,D] -> [B,T,D]."""

    def __init__(self, config: HybridQwen3Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.key_value_heads()
        self.head_dim = D = config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * D, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * D, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * D, bias=bias)
        self.o_proj = nn.Linear(self.heads * D, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        state: State | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """mask: bool [B, tokens so far and of this call], which keys count; None: all."""
        by_head = lambda t: t.unflatten(-1, (-1, self.head_dim))  # noqa: E731
        v = by_head(self.v_proj(x)).transpose(1, 2)
        q = rotate(self.q_norm(by_head(self.q_proj(x))), rope).to(v.dtype).transpose(1, 2)
        k = rotate(self.k_norm(by_head(self.k_proj(x))), rope).to(v.dtype).transpose(1, 2)
        if cu_seqlens is not None:
            cuts = cu_seqlens.tolist()
            out = torch.cat(
                [
                    self._attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], None)
                    for a, b in zip(cuts, cuts[1:])
                    if b > a
                ],
                2,
            )
        else:
            if state is not None:
                k, v = self._append(state, k, v)
            out = self._attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        T, L = q.shape[2], k.shape[2]
        grouped = self.heads != self.kv_heads
        if mask is None and T == 1:  # one query that sees all
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        if mask is None and T == L:  # from the start
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        # Query i stands at place L - T + i.
        seen = torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)
        if mask is not None:
            seen = seen & mask[:, None, None, :]
            # A query that is padding itself sees nothing: let it see one key, its output is unused.
            seen = seen | (~seen.any(-1, keepdim=True))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)

    def _append(self, state: State, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past = state.layer(self.layer_idx)
        T = k.shape[2]
        if past is not None and not isinstance(past, KeyValues):
            raise ValueError(f"past_key_values: layer {self.layer_idx} has no keys and values")
        length = 0 if past is None else past.length
        if torch.is_grad_enabled():  # no writing into what the graph has saved
            if past is not None:
                k = torch.cat([past.k[:, :, :length], k], 2)
                v = torch.cat([past.v[:, :, :length], v], 2)
            new = KeyValues(k, v, length + T)
        else:
            new = KeyValues(
                _placed(None if past is None else past.k, k, length),
                _placed(None if past is None else past.v, v, length),
                length + T,
            )
        state.set_layer(self.layer_idx, new, T)
        return new.k[:, :, : new.length], new.v[:, :, : new.length]


def _placed(cache: Tensor | None, now: Tensor, length: int) -> Tensor:
    """`now` written behind the first `length` positions of `cache`, which grows by doubling."""
    end = length + now.shape[2]
    capacity = 0 if cache is None else cache.shape[2]
    if cache is None or end > capacity:
        B, H, _, D = now.shape
        grown = now.new_empty((B, H, max(end, 2 * capacity, _FIRST_CAPACITY), D))
        if cache is not None:
            grown[:, :, :length] = cache[:, :, :length]
        cache = grown
    cache[:, :, length:end] = now
    return cache
