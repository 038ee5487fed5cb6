"""The Gated KalmaNet layer as a PyTorch module: projections, short convolutions, gates, the ridge
memory, output norm. Parameter names are the published checkpoints'."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._layer_options import (
    FIRST_LEARNED_RIDGE,
    MAX_LEARNED_RIDGE,
    MIN_LEARNED_RIDGE,
    LayerOptions,
    check,
    one_name,
)
from ._layer_step import can_fuse, fused_step
from ._padding import Unpadded, unpad
from .ops.gka import MAX_STEP_TOKENS, gka
from .state import LayerState, State, read_layer, write_layer

_ops = torch.ops.kalmanet


class _Weight(nn.Module):
    """One parameter, so that it is named "<module>.weight"."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sizes))


class _LowRank(nn.Module):
    """x -> linearB(silu(linearA(x)))"""

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.linearA = nn.Linear(inputs, rank, bias=False)
        self.linearB = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linearB(F.silu(self.linearA(x)))


def _unit_heads(t: Tensor, kind: str) -> Tensor:
    """t / (|t| + 1e-6) over the last dimension, or with "fla" t / sqrt(|t|^2 + 1e-6)."""
    if t.device.type in ("cpu", "cuda", "meta"):
        return _ops.unit_norm_forward(t.flatten(0, -2), kind=kind).view(t.shape)
    if kind == "fla":
        return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6)
    return t / (torch.linalg.vector_norm(t, dim=-1, keepdim=True) + 1e-6)


def _projected(layer: GatedKalmaNet, x: Tensor) -> torch.dtype:
    """The dtype that a projection of x has: autocast's, or that of the weights."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return layer.q_proj.weight.dtype


class GatedKalmaNet(nn.Module):
    """Gated KalmaNet, with the argument names of both published constructors.

    Args:
        hidden_size: D, of input and output.
        head_dim: K; V is ``expand_v * head_dim``, an integer.
        num_heads, num_q_heads: query heads (two names of one setting).
        num_kv_heads, num_k_heads, num_v_heads: key and value heads, default the query heads.
            ``num_kv_heads`` sets both and excludes the other two. Each count divides H, the largest
            of the three; head h reads head ``h // (H / count)``. Gates are per head of H.
        use_beta_gate: k and v times ``sigmoid(b_proj(x)) + 1e-6``.
        use_alpha_connection: mix q and x by ``sigmoid(alpha_proj(x))``; else alpha 1.
        use_v_conv: convolution and SiLU also on v.
        use_forgetting_gate: U decays; ``use_forgetting_gate_kk``: H decays too (only with it).
        gla_rescale: scale K^-1/2; else 1.
        use_gate: output gate ``silu(g_proj(x))``.
        ridge_ratio, ridge_strength: a in lambda_t = a |H_t|_F.
        num_iter, solver, solver_type, tolerance, arithmetic, bp_lambda, chunk_size, backend: see
            :func:`kalmanet.ops.chunk_gka`.
        conv_size: taps of the causal convolutions, 1..16.
        layer_idx: this layer's place in a cache (default 0 there).
        qk_norm: "official": x / (|x| + 1e-6), as the official layer; "fla": x / sqrt(|x|^2 + 1e-6),
            as flash-linear-attention. They agree to 1e-6 at |x| near 1, not for small x.
        learned_ridge: a_t = exp(clamp(ridge_proj(x), ln 1.2e-4, ln 0.135)) instead of ridge_ratio;
            the number of steps is then "auto".
        fixed_alpha: a constant in 0..1 in place of the alpha gate.
        kv_proj_rank: r: keys and values with fewer heads than H are expanded to all heads by
            ``proj_k``, ``proj_v`` (rank r, SiLU between; the second matrix starts at zero) added to
            the plain repeat, or with ``kv_learnable_residual`` to the mixes ``k_rep``, ``v_rep``.
        mode: "chunk" or "fused_recurrent", accepted for flash-linear-attention's callers: which of
            the two runs is decided by the number of tokens, and the answer is the same.

    Raises:
        ValueError: a setting does not fit; TypeError: an unknown one.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int | None = None,
        num_v_heads: int | None = None,
        num_kv_heads: int | None = None,
        mode: str = "chunk",
        use_beta_gate: bool = True,
        use_alpha_connection: bool = True,
        use_v_conv: bool = True,
        use_forgetting_gate: bool = True,
        use_forgetting_gate_kk: bool = True,
        gla_rescale: bool = True,
        ridge_ratio: float | None = None,
        num_iter: int | str = 30,
        use_gate: bool = True,
        conv_size: int = 4,
        layer_idx: int | None = None,
        norm_eps: float = 1e-6,
        *,
        num_q_heads: int | None = None,
        num_k_heads: int | None = None,
        ridge_strength: float | None = None,
        solver_type: str | None = None,
        solver: str | None = None,
        bp_lambda: bool = True,
        chunk_size: int = 0,
        kv_proj_rank: int | None = None,
        kv_learnable_residual: bool = False,
        tolerance: float = 1e-5,
        arithmetic: str = "standard",
        qk_norm: str = "official",
        learned_ridge: bool = False,
        fixed_alpha: float | None = None,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("chunk", "fused_recurrent"):
            raise ValueError(f'mode: is {mode!r}; allowed are "chunk", "fused_recurrent"')
        if num_kv_heads is not None and (num_v_heads is not None or num_k_heads is not None):
            raise ValueError(
                "num_kv_heads: sets the key and the value heads; it excludes num_k_heads and "
                "num_v_heads"
            )
        heads = one_name("num_heads", num_heads, "num_q_heads", num_q_heads, 16)
        ratio = one_name("ridge_ratio", ridge_ratio, "ridge_strength", ridge_strength, 0.02)
        which = one_name("solver", solver, "solver_type", solver_type, "chebyshev")
        self.options = o = check(LayerOptions(
            hidden_size=hidden_size, head_dim=head_dim, num_heads=heads,
            num_k_heads=one_name("", num_k_heads, "", num_kv_heads, heads),
            num_v_heads=one_name("", num_v_heads, "", num_kv_heads, heads),
            expand_v=expand_v, use_beta_gate=use_beta_gate,
            use_alpha_connection=use_alpha_connection, use_v_conv=use_v_conv,
            use_forgetting_gate=use_forgetting_gate, use_forgetting_gate_kk=use_forgetting_gate_kk,
            gla_rescale=gla_rescale, use_gate=use_gate, bp_lambda=bp_lambda, ridge_ratio=ratio,
            num_iter=num_iter, solver=which, tolerance=tolerance, arithmetic=arithmetic,
            conv_size=conv_size, norm_eps=norm_eps, qk_norm=qk_norm, learned_ridge=learned_ridge,
            fixed_alpha=fixed_alpha, chunk_size=chunk_size, backend=backend,
            kv_proj_rank=kv_proj_rank, kv_learnable_residual=kv_learnable_residual,
        ))  # fmt: skip
        self.layer_idx = layer_idx
        D, K, V, H = o.hidden_size, o.head_dim, o.value_dim, o.heads
        self.q_proj = nn.Linear(D, o.num_heads * K, bias=False)
        self.k_proj = nn.Linear(D, o.num_k_heads * K, bias=False)
        self.v_proj = nn.Linear(D, o.num_v_heads * V, bias=False)
        self.q_conv1d = _Weight(o.num_heads * K, 1, o.conv_size)
        self.k_conv1d = _Weight(o.num_k_heads * K, 1, o.conv_size)
        if o.use_v_conv:
            self.v_conv1d = _Weight(o.num_v_heads * V, 1, o.conv_size)
        if o.use_beta_gate:
            self.b_proj = nn.Linear(D, H)
        if o.use_alpha_connection and o.fixed_alpha is None:
            self.alpha_proj = nn.Linear(D, H)
        if o.learned_ridge:
            self.ridge_proj = nn.Linear(D, H)
        if o.use_forgetting_gate:
            self.a_proj = nn.Linear(D, H, bias=False)
            self.A_log = nn.Parameter(torch.empty(H))
            self.dt_bias = nn.Parameter(torch.empty(H))
            for decay in (self.A_log, self.dt_bias):
                decay._no_weight_decay = True  # type: ignore[attr-defined]
        if o.use_gate:
            self.g_proj = nn.Linear(D, H * V, bias=False)
        self.o_norm = _Weight(V)
        self.o_proj = nn.Linear(H * V, D, bias=False)
        if o.kv_proj_rank is not None:
            self.proj_k = _LowRank(o.num_k_heads * K, o.kv_proj_rank, H * K)
            self.proj_v = _LowRank(o.num_v_heads * V, o.kv_proj_rank, H * V)
            if o.kv_learnable_residual:
                self.k_rep = nn.Parameter(torch.empty(H, o.num_k_heads))
                self.v_rep = nn.Parameter(torch.empty(H, o.num_v_heads))
        self.reset_parameters()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew: linear layers uniform in +-1/sqrt(fan in); A ~ U(0,16); dt
        log-uniform in [0.001, 0.1]; ridge_proj ln 0.01; the expansion starts as a repeat."""
        o = self.options
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        # A depthwise filter of W taps has fan in W.
        bound = o.conv_size**-0.5
        for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
            if hasattr(self, name):
                getattr(self, name).weight.uniform_(-bound, bound)
        self.o_norm.weight.fill_(1)
        if o.learned_ridge:  # a constant to begin with
            self.ridge_proj.weight.zero_()
            self.ridge_proj.bias.fill_(math.log(FIRST_LEARNED_RIDGE))
        if o.use_forgetting_gate:
            # A of exactly 0 would be a logarithm of minus infinity.
            self.A_log.uniform_(0, 16).clamp_(min=1e-6).log_()
            # dt_bias is the inverse softplus of dt: dt + log(1 - e^-dt).
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            dt = dt.clamp(min=1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        if o.kv_proj_rank is not None:
            self.proj_k.linearB.weight.zero_()
            self.proj_v.linearB.weight.zero_()
            if o.kv_learnable_residual:
                for rep in (self.k_rep, self.v_rep):
                    rep.copy_(torch.eye(rep.shape[1]).repeat_interleave(o.heads // rep.shape[1], 0))

    def extra_repr(self) -> str:
        o = self.options
        return (
            f"hidden_size={o.hidden_size}, heads={o.num_heads}/{o.num_k_heads}/{o.num_v_heads}, "
            f"head_dim={o.head_dim}, value_dim={o.value_dim}, solver={o.solver}"
        )

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters that take no weight decay: A_log, dt_bias, o_norm.weight and
        every bias."""
        alone = ("A_log", "dt_bias", "o_norm.weight")
        return [n for n, _ in self.named_parameters() if n.endswith(".bias") or n in alone]

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # The official layer has these also where its forgetting gate is off and reads none of them.
        if not self.options.use_forgetting_gate:
            for name in ("a_proj.weight", "A_log", "dt_bias"):
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """hidden_states ``[B,T,D]`` -> ``(o [B,T,D], None, past_key_values)``.

        attention_mask ``[B,S]`` of 0 and 1, S >= T (the last T columns are this call's): tokens
        with 0 are left out, wherever they are, and give zeros. cu_seqlens: int64 ``[N+1]``, packed
        sequences, B == 1. past_key_values: a :class:`kalmanet.State`, or any cache with
        flash-linear-attention's protocol; read if it has this layer, and updated if ``use_cache``.
        Without one, ``use_cache`` makes a new State. A State's tensors may be updated in place:
        clone() forks a sequence.
        """
        o = self.options
        if hidden_states.dim() != 3 or hidden_states.shape[2] != o.hidden_size:
            raise ValueError(
                f"hidden_states: must be [B,T,hidden_size] with hidden_size {o.hidden_size}, got "
                f"{list(hidden_states.shape)}"
            )
        weight_dtype = self.q_proj.weight.dtype
        if hidden_states.dtype != weight_dtype and not torch.is_autocast_enabled(
            hidden_states.device.type
        ):
            raise ValueError(
                f"hidden_states: have dtype {hidden_states.dtype} but the parameters are "
                f"{weight_dtype}; convert one of them, or enable autocast"
            )
        if kwargs:
            raise TypeError(f"forward got unknown arguments: {', '.join(sorted(kwargs))}")
        B, T, _ = hidden_states.shape
        padding: Unpadded | None = None
        x = hidden_states
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("attention_mask: excludes cu_seqlens, which says the same")
            padding = unpad(hidden_states, attention_mask)
            if padding is not None:
                x, cu_seqlens = padding.x, padding.cu_seqlens
        if cu_seqlens is not None:
            if x.shape[0] != 1:
                raise ValueError(f"cu_seqlens: needs B == 1 (packed sequences), got B = {B}")
            cu_seqlens = cu_seqlens.to(device="cpu", dtype=torch.int64)
        index = self.layer_idx or 0
        if use_cache and past_key_values is None:
            past_key_values = State()
        last = read_layer(past_key_values, index)
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if last is not None:
            last.require(N, o)
        out, new = self._mix(
            x, last, cu_seqlens, N, bool(use_cache), isinstance(past_key_values, State)
        )
        if use_cache:
            write_layer(past_key_values, index, cast(LayerState, new), T)
        return out if padding is None else padding.pad(out), None, past_key_values

    def _mix(
        self,
        x: Tensor,
        last: LayerState | None,
        cu_seqlens: Tensor | None,
        N: int,
        keep: bool,
        in_place: bool,
    ) -> tuple[Tensor, LayerState | None]:
        """[B,T,D] to [B,T,D] and the state after the last token."""
        o = self.options
        B, T, _ = x.shape
        K, V, H = o.head_dim, o.value_dim, o.heads
        # 16-bit activations are widened once, behind the projections; all in between is float32.
        fine = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Token by token where that is quicker and needs no gradient.
        step = (
            keep
            and cu_seqlens is None
            and T <= MAX_STEP_TOKENS
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )
        if step and last is None:
            last = LayerState.zeros(N, o, x.device, fine)
        elif step and not in_place:
            last = cast(LayerState, last).map(torch.Tensor.clone)
        if step and can_fuse(o, x):
            last = cast(LayerState, last)
            out = fused_step(self, x, last)
            return self.o_proj(out.to(self.o_proj.weight.dtype)), last

        def project(layer: nn.Linear) -> Tensor:
            return layer(x).to(fine)

        def convolve(t: Tensor, weight: Tensor, before: Tensor | None) -> tuple[Tensor, Any]:
            weight = weight.squeeze(1).to(fine)
            if step and T == 1:
                y = _ops.causal_conv_step(t[:, 0], weight, before)
                return y.unsqueeze(1), before
            return _ops.causal_conv_forward(t, weight, before, cu_seqlens, want_final_state=keep)

        def normalise(t: Tensor, heads: int) -> Tensor:
            return _unit_heads(t.unflatten(-1, (heads, K)), o.qk_norm)

        conv_q, conv_k, conv_v = (None, None, None) if last is None else last.conv
        # One after the other, each to its end: what it leaves is reused, and is in the caches.
        q, conv_q = convolve(project(self.q_proj), self.q_conv1d.weight, conv_q)
        q = normalise(q, o.num_heads)
        k, conv_k = convolve(project(self.k_proj), self.k_conv1d.weight, conv_k)
        v = project(self.v_proj)
        if o.use_v_conv:
            v, conv_v = convolve(v, self.v_conv1d.weight, conv_v)
        if o.expands:
            k = normalise(self._expand(k, self.proj_k, o.num_k_heads, "k_rep"), H)
            v = self._expand(v, self.proj_v, o.num_v_heads, "v_rep").unflatten(-1, (H, V))
        else:
            k = normalise(k, o.num_k_heads)
            v = v.unflatten(-1, (o.num_v_heads, V))

        if x.is_cuda and (given := _projected(self, x)) != fine:
            # The GPU's matrix units take 16 bits as the projections gave them.
            q, k, v = q.to(given), k.to(given), v.to(given)

        g = gk = alpha = beta = None
        ridge: float | Tensor = o.ridge_ratio
        num_iter, solver, arithmetic = o.num_iter, o.solver, o.arithmetic
        if o.use_beta_gate:
            beta = torch.sigmoid(project(self.b_proj)) + 1e-6
        if o.fixed_alpha is not None:
            if o.fixed_alpha != 1:
                alpha = q.new_full((), o.fixed_alpha).expand(B, T, H)
        elif o.use_alpha_connection:
            alpha = torch.sigmoid(project(self.alpha_proj))
        if o.use_forgetting_gate:
            rate = F.softplus(project(self.a_proj) + self.dt_bias.to(fine))
            g = rate * -self.A_log.to(fine).exp()
            gk = g if o.use_forgetting_gate_kk else None
        if o.learned_ridge:
            ridge = torch.exp(
                project(self.ridge_proj).clamp(
                    math.log(MIN_LEARNED_RIDGE), math.log(MAX_LEARNED_RIDGE)
                )
            )
            num_iter = "auto"
        if o.fixed_alpha == 0:
            # o_t = scale U_t^T q_t whatever x_t is: the shortest solve there is.
            solver, num_iter, arithmetic = "chebyshev", 1, "standard"
        scale = None if o.gla_rescale else 1.0
        state = None
        if step:
            last = cast(LayerState, last)
            out, _ = _ops.gka_step(
                q, k, v, last.h, last.u, g, gk, alpha, beta,
                ridge if isinstance(ridge, Tensor) else None, None, scale=scale,
                ridge_ratio=o.ridge_ratio, solver=solver,
                num_iter=0 if num_iter == "auto" else num_iter, tolerance=o.tolerance,
                backend=o.backend,
            )  # fmt: skip
            state = LayerState(last.h, last.u, (conv_q, conv_k, conv_v))
        else:
            before = None if last is None else (last.h, last.u)
            out, (h, u), _ = gka(
                q, k, v, g, gk, alpha, beta, ridge, before, cu_seqlens, scale=scale, solver=solver,
                num_iter=num_iter, tolerance=o.tolerance, bp_lambda=o.bp_lambda,
                arithmetic=arithmetic, chunk_size=o.chunk_size, backend=o.backend,
            )  # fmt: skip
            if keep:
                state = LayerState(h, u, (conv_q, conv_k, conv_v))
        # Without gradients nobody holds them any longer: what comes next is written where they lay,
        # which is in the caches, instead of into memory that the system must clear first.
        del q, k, v, g, gk, alpha, beta, ridge
        gate = self.g_proj(x).to(out.dtype).reshape(-1, V) if o.use_gate else None
        out = _ops.gated_rms_norm_forward(
            out.reshape(-1, V), gate, self.o_norm.weight.to(fine), eps=o.norm_eps
        )
        return self.o_proj(out.view(B, T, H * V).to(self.o_proj.weight.dtype)), state

    def _expand(self, t: Tensor, low_rank: _LowRank, heads: int, mix: str) -> Tensor:
        """Keys or values of `heads` heads [B,T,heads*d] to all heads [B,T,H*d]."""
        o = self.options
        by_head = t.unflatten(-1, (heads, t.shape[-1] // heads))
        if o.kv_learnable_residual:
            rep = getattr(self, mix).to(t.dtype)
            residual = torch.einsum("eh,bthd->bted", rep, by_head)
        else:
            residual = by_head.repeat_interleave(o.heads // heads, 2)
        narrow = t.to(low_rank.linearA.weight.dtype)
        return residual.flatten(2) + low_rank(narrow).to(t.dtype)
