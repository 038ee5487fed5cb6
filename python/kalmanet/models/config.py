"""A model's config.json, model_type "hybrid_qwen3" (docs/model-files.md lists the keys)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# gka_config's keys and the layer's names for them.
_GKA_KEYS = {
    name: name
    for name in (
        "use_beta_gate", "use_alpha_connection", "use_v_conv", "use_forgetting_gate",
        "use_forgetting_gate_kk", "gla_rescale", "use_gate", "bp_lambda", "solver_type", "num_iter",
        "ridge_strength", "conv_size", "norm_eps", "chunk_size", "num_q_heads", "num_k_heads",
        "num_v_heads", "head_dim", "expand_v", "learned_ridge", "tolerance", "arithmetic",
        "qk_norm", "fixed_alpha", "kv_proj_rank", "kv_learnable_residual",
    )
}  # fmt: skip
# Another implementation's names for keys above: taken silently they would change nothing.
_ELSEWHERE = {
    "ridge_ratio": "ridge_strength",
    "num_heads": "num_q_heads",
    "num_kv_heads": "num_k_heads and num_v_heads",
    "solver": "solver_type",
}
_PUBLISHED_KINDS = ("GDN", "M2", "SWA", "BMF")


class HybridQwen3Config(PretrainedConfig):
    """Qwen3's keys, ``hybrid_override_pattern`` ("GKA-GKA-*": GKA and attention layers) and
    ``gka_config``. ValueError names the key that does not fit."""

    model_type = "hybrid_qwen3"
    default_theta = 10_000.0
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 257
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    hybrid_override_pattern: str | None = None
    gka_config: dict | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.key_value_heads()
        if self.hybrid_override_pattern is None:
            self.hybrid_override_pattern = "-".join(["GKA"] * self.num_hidden_layers)
        self.gka_config = dict(self.gka_config or {})
        plain = kwargs.get("rope_theta")
        super().__post_init__(**kwargs)
        self._check(plain)

    def _check(self, plain_theta: float | None) -> None:
        kinds = self.layer_kinds()
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"hybrid_override_pattern names {len(kinds)} layers, but num_hidden_layers is "
                f"{self.num_hidden_layers}; they must agree"
            )
        for theirs, ours in _ELSEWHERE.items():
            if theirs in (self.gka_config or {}):
                raise ValueError(f"gka_config.{theirs}: it is spelled {ours} here")
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f'rope_parameters.rope_type: is {rope["rope_type"]!r}; only "default" is built'
            )
        if plain_theta is not None and rope.get("rope_theta", plain_theta) != plain_theta:
            raise ValueError(
                f"rope_theta: is {plain_theta}, but rope_parameters says {rope['rope_theta']}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f'hidden_act: is {self.hidden_act!r}; only "silu" is built')
        if self.attention_dropout != 0:
            raise ValueError("attention_dropout: is not built; it must be 0")
        if "*" in kinds:
            if self.num_attention_heads % self.key_value_heads():
                raise ValueError(
                    f"num_key_value_heads: is {self.num_key_value_heads}; it must divide "
                    f"num_attention_heads = {self.num_attention_heads}"
                )
            if self.head_dim % 2:
                raise ValueError(f"head_dim: is {self.head_dim}; rotary positions need an even one")

    def to_dict(self) -> dict[str, Any]:
        """Without the linear_* keys that are not set: to other readers an absent key says more."""
        keys = super().to_dict()
        return {k: v for k, v in keys.items() if not (k.startswith("linear_") and v is None)}

    def key_value_heads(self) -> int:
        """num_key_value_heads, or as many as there are queries' heads."""
        return self.num_key_value_heads or self.num_attention_heads

    def layer_kinds(self) -> list[str]:
        """ "GKA" or "*" for each layer."""
        kinds = (self.hybrid_override_pattern or "").split("-")
        for i, kind in enumerate(kinds):
            if kind in _PUBLISHED_KINDS:
                raise ValueError(
                    f"hybrid_override_pattern: layer {i} is {kind!r}, which is not built yet; GKA "
                    f"and * are"
                )
            if kind not in ("GKA", "*"):
                raise ValueError(
                    f"hybrid_override_pattern: layer {i} is {kind!r}, which is no layer kind; join "
                    f'GKA and * by "-", as in "GKA-GKA-*"'
                )
        return kinds

    def layer_arguments(self) -> dict[str, Any]:
        """Arguments of :class:`kalmanet.GatedKalmaNet` for the GKA layers."""
        given = {k: v for k, v in (self.gka_config or {}).items() if k in _GKA_KEYS}
        q = given.pop("num_q_heads", None) or self.linear_num_key_heads or self.num_attention_heads
        k = given.pop("num_k_heads", None) or self.linear_num_key_heads or self.num_key_value_heads
        v = (
            given.pop("num_v_heads", None)
            or self.linear_num_value_heads
            or self.num_key_value_heads
        )
        K = given.pop("head_dim", None) or self.linear_key_head_dim or self.head_dim
        if self.linear_value_head_dim is not None:
            given["expand_v"] = self.linear_value_head_dim / K
        if self.linear_conv_kernel_dim is not None:
            given["conv_size"] = self.linear_conv_kernel_dim
        return {
            "hidden_size": self.hidden_size,
            "num_q_heads": q,
            "num_k_heads": k,
            "num_v_heads": v,
            "head_dim": K,
            **given,
        }
