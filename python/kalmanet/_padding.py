"""Padded batches to packed sequences, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Unpadded:
    x: Tensor  # [1,total,D], the tokens that count, sequence by sequence
    cu_seqlens: Tensor  # int64 [B+1] on the CPU
    places: Tensor  # [total], where they were in [B*T]
    shape: tuple[int, int]  # B, T

    def pad(self, out: Tensor) -> Tensor:
        """[1,total,D'] to [B,T,D'], zeros between."""
        B, T = self.shape
        padded = out.new_zeros((B * T, out.shape[-1])).index_copy(0, self.places, out[0])
        return padded.view(B, T, -1)


def unpad(x: Tensor, mask: Tensor) -> Unpadded | None:
    """x [B,T,D], mask [B,S] of 0 and 1 with S >= T, whose last T columns count. None where nothing
    is masked."""
    B, T, D = x.shape
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(
            f"attention_mask: must be [B,T] = {[B, T]} (or longer, then its end counts) of 0 and 1,"
            f" got {list(mask.shape)}"
        )
    mask = mask[:, mask.shape[1] - T :] != 0
    if bool(mask.all()):
        return None
    places = mask.flatten().nonzero().squeeze(1)
    lengths = mask.sum(1).cpu()
    cu_seqlens = torch.zeros(B + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    packed = x.reshape(B * T, D).index_select(0, places).unsqueeze(0)
    return Unpadded(packed, cu_seqlens, places, (B, T))
