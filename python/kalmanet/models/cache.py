"""Transformers' caches: a :class:`kalmanet.State` inside one.

A model's layers keep more kinds of things than a Transformers cache has places for, so the whole
State is its first and only layer, which answers for all of them: length, beams, reset.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..state import State


class StateLayer(CacheLayerMixin):
    """All layers of a model in a Transformers cache."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state = State()

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        raise NotImplementedError("this cache belongs to a kalmanet model")

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "this cache belongs to a kalmanet model, whose layers keep a kalmanet.State in it; "
            "another model needs one of its own"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.state.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = State()

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a recurrent state cannot go back to fewer tokens")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.state.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.state.batch_select_indices(indices)

    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass


def state_of(cache: Any) -> State:
    """The State that a call reads and writes, from what came as past_key_values: a State, or a
    Transformers cache that is empty or was filled by a model of this package."""
    if isinstance(cache, State):
        return cache
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values: must be a kalmanet.State or a cache of Transformers, got "
            f"{type(cache).__name__}"
        )
    if len(cache.layers) == 1 and isinstance(cache.layers[0], StateLayer):
        return cache.layers[0].state
    # (Of attention layers, and of recurrent ones.)
    if any(
        getattr(layer, "is_initialized", False)
        or any(getattr(layer, "has_previous_state", {}).values())
        for layer in cache.layers
    ):
        raise ValueError(
            "past_key_values: this cache was filled by another model; give a new one, or a "
            "kalmanet.State"
        )
    layer = StateLayer()
    cache.layers = [layer]
    cache.layer_class_to_replicate = None
    return layer.state
