"""The operators by their published names, and `gka`, which has everything."""

from .decode import Draft, step_gka
from .gka import chunk_gka, fused_recurrent_gka, gka
from .naive import naive_recurrent_gka, naive_recurrent_gka_chebyshev

__all__ = [
    "Draft",
    "chunk_gka",
    "fused_recurrent_gka",
    "gka",
    "naive_recurrent_gka",
    "naive_recurrent_gka_chebyshev",
    "step_gka",
]
