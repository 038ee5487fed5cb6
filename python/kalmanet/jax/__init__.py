"""Gated KalmaNet for JAX.

    from kalmanet.jax import chunk_gka          # the library's kernels, on the CPU
    from kalmanet.jax import chunk_gka_xla      # plain jax.numpy, on any XLA device

Both have gradients for every array (of the exact ridge solution, by implicit differentiation) and
work under ``jit``, ``vmap`` and ``grad``. Needs the extra: ``pip install 'kalmanet[jax]'``. PyTorch
is not imported.
"""

from __future__ import annotations

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError("kalmanet.jax needs JAX: pip install 'kalmanet[jax]'") from error

from .ffi import chunk_gka, fused_recurrent_gka
from .xla import chunk_gka_xla

__all__ = ["chunk_gka", "chunk_gka_xla", "fused_recurrent_gka"]
