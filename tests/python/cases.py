"""Random problems and the measure of errors."""

import os
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

SEED = 20261123
# Of the option --device (conftest.py).
DEVICE = os.environ.get("KALMANET_TEST_DEVICE", "cpu")


_TORCH = torch  # conftest.py puts a TorchOnDevice in the other name's place


class TorchOnDevice:
    """`torch`, with its new tensors on DEVICE. Random ones are drawn on the CPU: the same numbers
    everywhere, also from a CPU generator."""

    FACTORIES = frozenset(
        ["arange", "empty", "eye", "full", "ones", "rand", "randint", "randn", "tensor", "zeros"]
    )  # fmt: skip

    def __getattr__(self, name):
        real = getattr(_TORCH, name)
        if name not in self.FACTORIES:
            return real

        def make(*args, device=None, requires_grad=False, **options):
            made = real(*args, device=device or "cpu", **options)
            return (made if device else made.to(DEVICE)).requires_grad_(requires_grad)

        return make


def problem(
    B=2, T=37, H=2, K=16, V=8, dtype=torch.float64, gates=("g", "gk", "alpha"), states=False, N=None
):
    """Arguments of chunk_gka, drawn in float64 and rounded to `dtype` (gates and states at least
    float32)."""
    gen = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    p = {
        "q": unit(normal(B, T, H, K), dim=-1),
        "k": unit(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, H, V),
        "g": -normal(B, T, H).abs() * 0.1,
        "gk": -normal(B, T, H).abs() * 0.1,
        "alpha": normal(B, T, H).sigmoid(),
    }
    p = {
        name: t.to(dtype if name in "qkv" else fine)
        for name, t in p.items()
        if name in ("q", "k", "v") or name in gates
    }
    if states:
        N = B if N is None else N
        root = normal(N, H, K, 2 * K) * 0.3
        p["initial_state"] = (
            (root @ root.transpose(-1, -2)).to(fine),
            normal(N, H, K, V).to(fine),
        )
    return p


def widened(p, dtype=torch.float64):
    """The same numbers in another dtype."""

    def cast(t):
        return tuple(x.to(dtype) for x in t) if isinstance(t, tuple) else t.to(dtype)

    return {name: cast(t) for name, t in p.items()}


def leaves(p):
    """Every tensor of a problem by name, made to require gradients, in place."""
    named = {}
    for name, t in list(p.items()):
        if isinstance(t, tuple):
            p[name] = tuple(x.detach().clone().requires_grad_() for x in t)
            named |= dict(zip(("h0", "u0"), p[name]))
        else:
            p[name] = named[name] = t.detach().clone().requires_grad_()
    return named


def relative(a, b):
    """Root of the mean squared difference over that of `b`."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def cotangents(tensors, seed=SEED + 1):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=gen, dtype=torch.float64) for t in tensors]
