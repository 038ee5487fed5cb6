"""Hybrid language models of Gated KalmaNet and attention layers, for Hugging Face Transformers.

Importing this registers ``hybrid_qwen3`` with ``AutoConfig`` and ``AutoModelForCausalLM``. Needs
the extra: ``pip install 'kalmanet[models]'``.
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "kalmanet.models needs Hugging Face Transformers: pip install 'kalmanet[models]'"
    ) from error

from .config import HybridQwen3Config
from .files import load, save
from .model import HybridQwen3ForCausalLM, HybridQwen3Model

_transformers.AutoConfig.register("hybrid_qwen3", HybridQwen3Config, exist_ok=True)
_transformers.AutoModel.register(HybridQwen3Config, HybridQwen3Model, exist_ok=True)
_transformers.AutoModelForCausalLM.register(
    HybridQwen3Config, HybridQwen3ForCausalLM, exist_ok=True
)

__all__ = ["HybridQwen3Config", "HybridQwen3ForCausalLM", "HybridQwen3Model", "load", "save"]
