"""What sequences carry from one call to the next: constant in their length for GKA layers.

:class:`State` is the cache of a layer or of a whole model. It has flash-linear-attention's cache
protocol (``state[i]``, ``len``, ``update``), and is saved and loaded as one file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  (the operators must exist)

if TYPE_CHECKING:
    from ._layer_options import LayerOptions

_ops = torch.ops.kalmanet
_FORMAT = "kalmanet-state-1"

Convolutions = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass
class LayerState:
    """Of one GKA layer. h ``[N,H,K,K]``, u ``[N,H,K,V]`` float32 (float64 in a float64 one); conv:
    the last conv_size inputs of the convolutions of q, k, v, each ``[N,D,conv_size]`` or None."""

    h: Tensor
    u: Tensor
    conv: Convolutions = (None, None, None)

    @staticmethod
    def zeros(N: int, o: LayerOptions, device: torch.device, dtype: torch.dtype) -> LayerState:
        def new(*sizes: int) -> Tensor:
            return torch.zeros(sizes, device=device, dtype=dtype)

        K, V, W = o.head_dim, o.value_dim, o.conv_size
        return LayerState(
            new(N, o.heads, K, K),
            new(N, o.heads, K, V),
            (
                new(N, o.num_heads * K, W),
                new(N, o.num_k_heads * K, W),
                new(N, o.num_v_heads * V, W) if o.use_v_conv else None,
            ),
        )

    def require(self, N: int, o: LayerOptions) -> None:
        """ValueError unless this is the state of N sequences of such a layer."""
        K, V, W = o.head_dim, o.value_dim, o.conv_size
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "h_kk": (self.h, (N, o.heads, K, K)),
            "h_kv": (self.u, (N, o.heads, K, V)),
            "conv_state of q": (self.conv[0], (N, o.num_heads * K, W)),
            "conv_state of k": (self.conv[1], (N, o.num_k_heads * K, W)),
        }
        if o.use_v_conv:
            wanted["conv_state of v"] = (self.conv[2], (N, o.num_v_heads * V, W))
        for name, (t, sizes) in wanted.items():
            if t is None or tuple(t.shape) != sizes:
                came = "None" if t is None else str(list(t.shape))
                raise ValueError(
                    f"past_key_values: the layer's {name} must be {list(sizes)}, got {came}"
                )

    def map(self, f: Callable[[Tensor], Tensor]) -> LayerState:
        q, k, v = (None if t is None else f(t) for t in self.conv)
        return LayerState(f(self.h), f(self.u), (q, k, v))


@dataclass
class KeyValues:
    """Of an attention layer: the first `length` of k and v ``[N,heads,capacity,head_dim]``."""

    k: Tensor
    v: Tensor
    length: int

    def map(self, f: Callable[[Tensor], Tensor]) -> KeyValues:
        return KeyValues(
            f(self.k[:, :, : self.length]), f(self.v[:, :, : self.length]), self.length
        )


class State:
    """Everything that a layer or a model keeps of the tokens it has read.

    A new one is the start of a sequence, or of N of them. Calls without gradients may update its
    tensors in place: :meth:`clone` forks a sequence.
    """

    def __init__(self) -> None:
        self._layers: list[LayerState | KeyValues | None] = []
        self._seen: list[int] = []
        #: Which tokens of padded batches count, ``[N, tokens]``; None: all.
        self.mask: Tensor | None = None

    # ---- layers ----

    def layer(self, index: int) -> LayerState | KeyValues | None:
        return self._layers[index] if index < len(self._layers) else None

    def set_layer(self, index: int, state: LayerState | KeyValues, tokens: int) -> None:
        """Puts a layer's state after `tokens` more tokens."""
        while len(self._layers) <= index:
            self._layers.append(None)
            self._seen.append(0)
        self._layers[index] = state
        self._seen[index] += tokens

    # ---- flash-linear-attention's protocol, and Transformers' ----

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        layer = self._layers[index]
        if isinstance(layer, LayerState):
            return {"recurrent_state": (layer.h, layer.u), "conv_state": layer.conv}
        if isinstance(layer, KeyValues):
            return {"attn_state": (layer.k[:, :, : layer.length], layer.v[:, :, : layer.length])}
        raise KeyError(f"layer {index} has no state yet")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def update(
        self,
        recurrent_state: tuple[Tensor, Tensor] | None = None,
        conv_state: Convolutions | None = None,
        layer_idx: int = 0,
        offset: int = 1,
    ) -> dict[str, Any]:
        """Sets a GKA layer's state, `offset` tokens later; returns it."""
        if recurrent_state is None:
            raise ValueError("recurrent_state: is None; it must be (h_kk, h_kv)")
        h, u = recurrent_state
        self.set_layer(layer_idx, LayerState(h, u, conv_state or (None, None, None)), offset)
        return self[layer_idx]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Tokens read so far."""
        return max(self._seen, default=0)

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the sequences `beam_idx`, for beam search."""
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    # ---- the whole ----

    def _change(self, f: Callable[[Tensor], Tensor]) -> State:
        self._layers = [None if layer is None else layer.map(f) for layer in self._layers]
        self.mask = None if self.mask is None else f(self.mask)
        return self

    def _copy(self, f: Callable[[Tensor], Tensor]) -> State:
        new = type(self)()
        new._layers, new._seen, new.mask = list(self._layers), list(self._seen), self.mask
        return new._change(f)

    def clone(self) -> State:
        """An independent copy."""
        return self._copy(torch.Tensor.clone)

    def detach(self) -> State:
        """The same numbers without their history."""
        return self._copy(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> State:
        """The state on another device (this one, unchanged, if it is there)."""
        return self._copy(lambda t: t.to(device))

    def bytes(self) -> int:
        """Memory of all tensors."""
        total = 0

        def count(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        self._copy(count)
        return total

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file: the saved states of the GKA layers (docs/state-format.md) in a row,
        then what else there is, as safetensors. Written aside and renamed."""
        import safetensors.torch

        parts: list[bytes] = []
        rest: dict[str, Tensor] = {}
        kinds = []
        for i, layer in enumerate(self._layers):
            if isinstance(layer, LayerState):
                parts.append(save_gka_state(layer.h, layer.u))
                kinds.append("GKA")
                for name, t in zip("qkv", layer.conv):
                    if t is not None:
                        rest[f"layers.{i}.conv_{name}"] = t.detach().cpu().contiguous()
            elif isinstance(layer, KeyValues):
                kinds.append("*")
                for name, t in (("k", layer.k), ("v", layer.v)):
                    rest[f"layers.{i}.{name}"] = t[:, :, : layer.length].detach().cpu().contiguous()
            else:
                kinds.append("none")
        if self.mask is not None:
            rest["mask"] = self.mask.cpu()
        seen = ",".join(map(str, self._seen))
        meta = {"format": _FORMAT, "layers": ",".join(kinds), "tokens": seen}
        parts.append(safetensors.torch.save(rest, metadata=meta))
        path = Path(path)
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with aside.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
        """Reads what :meth:`save` wrote, or a file of saved states alone. ValueError: the file is
        damaged; the message says how."""
        import safetensors
        import safetensors.torch

        data = Path(path).read_bytes()
        blobs, end = _blobs(data, str(path))
        new = cls()
        if end == len(data):
            for i, (h, u) in enumerate(blobs):
                new.set_layer(i, LayerState(h, u), 0)
            return new.to(device)
        try:
            rest = safetensors.torch.load(data[end:])
            size = int.from_bytes(data[end : end + 8], "little")
            meta = _json(data[end + 8 : end + 8 + size]).get("__metadata__", {})
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: behind the saved states: {error}") from error
        if meta.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: the format is {meta.get('format')!r}; this version reads {_FORMAT!r}"
            )
        kinds = meta["layers"].split(",") if meta["layers"] else []
        seen = [int(n) for n in meta["tokens"].split(",")] if meta["tokens"] else []
        if kinds.count("GKA") != len(blobs) or len(seen) != len(kinds):
            raise ValueError(f"{path}: has {len(blobs)} saved states for layers {meta['layers']}")
        try:
            for i, kind in enumerate(kinds):
                if kind == "GKA":
                    h, u = blobs.pop(0)
                    q, k, v = (rest.get(f"layers.{i}.conv_{name}") for name in "qkv")
                    new.set_layer(i, LayerState(h, u, (q, k, v)), seen[i])
                elif kind == "*":
                    k, v = rest[f"layers.{i}.k"], rest[f"layers.{i}.v"]
                    new.set_layer(i, KeyValues(k, v, k.shape[2]), seen[i])
        except KeyError as error:
            raise ValueError(f"{path}: lacks the tensor {error}") from error
        new.mask = rest.get("mask")
        return new.to(device)


def save_gka_state(h: Tensor, u: Tensor) -> bytes:
    """h ``[N,H,K,K]`` and u ``[N,H,K,V]`` (float32 or float64) as docs/state-format.md says."""
    return _ops.save_state(h.detach().cpu(), u.detach().cpu()).numpy().tobytes()


def load_gka_state(data: bytes) -> tuple[Tensor, Tensor]:
    """The saved state that `data` begins with, bit for bit. ValueError: it is none, or damaged."""
    try:
        return _ops.load_state(torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8))
    except RuntimeError as error:
        raise ValueError(str(error).split("\n")[0]) from error


def _blobs(data: bytes, path: str) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """The saved states at the start of `data`, and where the last one ends."""
    found: list[tuple[Tensor, Tensor]] = []
    end = 0
    buffer = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    try:
        while data[end : end + 5] == b"\x89KNST":
            rest = buffer[end:]
            found.append(_ops.load_state(rest))
            size = _ops.saved_state_bytes(rest)
            end += int.from_bytes(bytes(size.tolist()), "little")
    except RuntimeError as error:
        raise ValueError(
            f"{path}: saved state {len(found)}: {str(error).splitlines()[0]}"
        ) from error
    return found, end


def _json(data: bytes) -> dict[str, Any]:
    import json

    return json.loads(data)


def read_layer(cache: Any, index: int) -> LayerState | None:
    """A GKA layer's state in any cache of the protocol; None where it has none yet."""
    if cache is None:
        return None
    if isinstance(cache, State):
        layer = cache.layer(index)
        if isinstance(layer, KeyValues):
            raise ValueError(f"past_key_values: layer {index} has the state of an attention layer")
        return layer
    if len(cache) <= index:
        return None
    item = cache.layers[index].state if hasattr(cache, "layers") else cache[index]
    if item is None or item.get("recurrent_state") is None:
        return None
    h, u = item["recurrent_state"]
    q, k, v = item.get("conv_state") or (None, None, None)
    return LayerState(h, u, (q, k, v))


def write_layer(cache: Any, index: int, state: LayerState, tokens: int) -> None:
    if isinstance(cache, State):
        cache.set_layer(index, state, tokens)
    else:
        cache.update(
            recurrent_state=(state.h, state.u),
            conv_state=state.conv,
            layer_idx=index,
            offset=tokens,
        )
