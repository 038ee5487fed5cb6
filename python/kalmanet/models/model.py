"""The hybrid language model. Parameter names are the published checkpoint's.

    x = x + mixer(input_layernorm(x))
    x = x + down(silu(gate(y)) * up(y)),  y = post_attention_layernorm(x)

Letters: B batch, T tokens, D hidden size, N packed sequences.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .._layer_options import FIRST_LEARNED_RIDGE
from ..layer import GatedKalmaNet
from ..state import State
from .attention import Attention, RMSNorm, rope_tables
from .cache import state_of
from .config import HybridQwen3Config

# Transformers renamed past_key_values to cache.
_CACHE_FIELD = (
    "cache"
    if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)}
    else "past_key_values"
)


class MLP(nn.Module):
    def __init__(self, D: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, intermediate, bias=False)
        self.up_proj = nn.Linear(D, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """A mixer (``gka`` or ``self_attn``) and an MLP (none where intermediate_size is 0)."""

    def __init__(self, config: HybridQwen3Config, kind: str, index: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.is_gka = kind == "GKA"
        if self.is_gka:
            self.gka = GatedKalmaNet(**config.layer_arguments(), layer_idx=index)
        else:
            self.self_attn = Attention(config, index)
        if config.intermediate_size:
            self.post_attention_layernorm = RMSNorm(D, eps)
            self.mlp = MLP(D, config.intermediate_size)
        self._note_first_weights()

    def _note_first_weights(self) -> None:
        """For _init_weights, which sees each linear layer by itself."""
        for name, module in self.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module._first = "residual"
            elif name.endswith("linearB"):
                module._first = "zero"
            elif name.endswith("ridge_proj"):
                module._first = "ridge"

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        state: State | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        y = self.input_layernorm(x)
        if self.is_gka:
            y = self.gka(
                y, attention_mask=mask, past_key_values=state, use_cache=state is not None,
                cu_seqlens=cu_seqlens,
            )[0]  # fmt: skip
        else:
            y = self.self_attn(y, rope, state, mask, cu_seqlens)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)) if hasattr(self, "mlp") else x


class HybridQwen3PreTrainedModel(PreTrainedModel):
    config_class = HybridQwen3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]
    _supports_sdpa = True
    # The state cannot go back to fewer tokens.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear and embedding weights normal(0, initializer_range); those that write into the
        residual stream (o_proj, down_proj) divided by sqrt(2 layers); biases 0, norms 1; the GKA
        layer's own parameters as that layer makes them."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # Initialised once, before the modules around it: those have left a note.
            how = getattr(module, "_first", None)
            if how == "residual":
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            if how in ("zero", "ridge"):
                init.zeros_(module.weight)
            else:
                init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                init.constant_(
                    module.bias, math.log(FIRST_LEARNED_RIDGE) if how == "ridge" else 0.0
                )
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, 0.0, std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, GatedKalmaNet):
            self._init_gka(module)

    @staticmethod
    def _init_gka(layer: GatedKalmaNet) -> None:
        o = layer.options
        bound = o.conv_size**-0.5
        for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
            if hasattr(layer, name):
                init.uniform_(getattr(layer, name).weight, -bound, bound)
        init.ones_(layer.o_norm.weight)
        if o.use_forgetting_gate:
            A = torch.empty_like(layer.A_log).uniform_(0, 16).clamp_(min=1e-6)
            init.copy_(layer.A_log, A.log_())
            dt = torch.empty_like(layer.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            dt.clamp_(min=1e-4)
            init.copy_(layer.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        if o.kv_learnable_residual:
            for rep in (layer.k_rep, layer.v_rep):
                eye = torch.eye(rep.shape[1], device=rep.device, dtype=rep.dtype)
                init.copy_(rep, eye.repeat_interleave(o.heads // rep.shape[1], 0))


class HybridQwen3Model(HybridQwen3PreTrainedModel):
    """Embeddings, blocks, final norm: input_ids ``[B,T]`` -> hidden states ``[B,T,D]``."""

    def __init__(self, config: HybridQwen3Config) -> None:
        super().__init__(config)
        self.kinds = config.layer_kinds()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind, i) for i, kind in enumerate(self.kinds))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: State | Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cache: State | Cache | None = None,
        output_hidden_states: bool | None = None,
        **_unused: Any,
    ) -> BaseModelOutputWithPast:
        """attention_mask ``[B,S]`` of 0 and 1, S tokens so far and of this call (or of this call
        alone): left and right padding. cu_seqlens: int64 ``[N+1]``, packed sequences, B == 1.
        cache (or past_key_values): a :class:`kalmanet.State`, or a Transformers cache, which then
        holds one; ``use_cache`` makes a State."""
        given = past_key_values if cache is None else cache
        state = None if given is None else state_of(given)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give either these or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if self.gradient_checkpointing and self.training:
            use_cache = False  # a block that runs twice would advance the state twice
        if use_cache and state is None:
            given = state = State()
        if state is not None and cu_seqlens is not None and "*" in self.kinds:
            raise ValueError(
                "cache: cannot be kept for packed sequences in a pattern with `*` layers"
            )
        past = 0 if state is None else state.get_seq_length()
        mask = _whole_mask(attention_mask, state, B, T, past)
        rope = None
        if "*" in self.kinds:
            if past + T > self.config.max_position_embeddings and cu_seqlens is None:
                raise ValueError(
                    f"max_position_embeddings: is {self.config.max_position_embeddings}, but the "
                    f"sequence would reach {past + T} tokens; a pattern of GKA layers has no limit"
                )
            if position_ids is None:
                position_ids = _positions(mask, cu_seqlens, past, T, x.device)
            theta = self.config.rope_parameters["rope_theta"]
            rope = rope_tables(position_ids, self.config.head_dim, theta)
        seen: list[Tensor] | None = [] if output_hidden_states else None
        for block in self.layers:
            if seen is not None:
                seen.append(x)
            x = block(x, rope, state, mask, cu_seqlens)
        x = self.norm(x)
        field: dict[str, Any] = {_CACHE_FIELD: given if use_cache else None}
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=None if seen is None else (*seen, x), **field
        )


def _whole_mask(
    given: Tensor | None, state: State | None, B: int, T: int, past: int
) -> Tensor | None:
    """bool [B, past+T]: which tokens count; None: all of them. Kept in the state."""
    before = None if state is None else state.mask
    if given is None and before is None:
        return None
    mask = given
    if mask is None:
        mask = before.new_ones(B, T)  # type: ignore[union-attr]
    mask = mask != 0
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] not in (T, past + T):
        raise ValueError(
            f"attention_mask: must be [B,T] = {[B, T]} or, with the tokens before, "
            f"{[B, past + T]}, of 0 and 1; got {list(mask.shape)}"
        )
    if mask.shape[1] != past + T:
        before = mask.new_ones(B, past) if before is None else before
        mask = torch.cat([before, mask], 1)
    if bool(mask.all()):
        return None
    if state is not None:
        state.mask = mask
    return mask


def _positions(
    mask: Tensor | None, cu_seqlens: Tensor | None, past: int, T: int, device: torch.device
) -> Tensor:
    """[B or 1,T]: each token's place among those of its sequence that count."""
    if mask is not None:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
    places = torch.arange(T, device=device)
    if cu_seqlens is not None:
        cu = cu_seqlens.to(device)
        return (places - cu[torch.searchsorted(cu, places, right=True) - 1]).unsqueeze(0)
    return (places + past).unsqueeze(0)


class HybridQwen3ForCausalLM(HybridQwen3PreTrainedModel, GenerationMixin):
    """The language model with its head; arguments as :class:`HybridQwen3Model`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridQwen3Config) -> None:
        super().__init__(config)
        self.model = HybridQwen3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward() makes a State

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: State | Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        cache: State | Cache | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """-> logits ``[B,T,vocab_size]``; with ``labels`` ``[B,T]`` (-100: ignored) also the mean
        cross entropy of each next token. logits_to_keep: only of the last so many tokens."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            cu_seqlens, cache, output_hidden_states,
        )  # fmt: skip
        hidden = outputs.last_hidden_state
        if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            hidden = hidden[:, keep]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{_CACHE_FIELD: outputs.get(_CACHE_FIELD)},
        )
