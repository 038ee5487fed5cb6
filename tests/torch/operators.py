"""torch.ops.kalmanet, and its mathematics written once more in float64, token by token.

KALMANET_TORCH_LIBRARY names the library; without it the newest build is taken.
"""

import os
from pathlib import Path

import pytest
import torch

SEED = 20261123


def find_library():
    named = os.environ.get("KALMANET_TORCH_LIBRARY")
    if named:
        return Path(named)
    root = Path(__file__).resolve().parents[2]
    built = sorted(
        root.glob("build/*/src/torch/libkalmanet_torch.so"), key=lambda p: p.stat().st_mtime
    )
    if not built:
        pytest.exit("no libkalmanet_torch.so; build the target kalmanet_torch first", 2)
    return built[-1]


torch.ops.load_library(str(find_library()))
ops = torch.ops.kalmanet


# ---- the reference: DESIGN of the layer, symbol for symbol, float64 ----


def solve(h, shift, f, q, solver, num_iter):
    if solver == "direct":
        return torch.linalg.solve(h + shift * torch.eye(h.shape[0], dtype=h.dtype), q)
    step = 2 / (2 * shift + f)
    rho2 = (f / (2 * shift + f) / 2) ** 2
    previous, x, w = torch.zeros_like(q), step * q, 2.0
    for _ in range(num_iter):
        w = 1 / (1 - rho2 * w)
        x, previous = w * x - step * w * (h @ x + shift * x - q) - (w - 1) * previous, x
    return x


def gka_loop(
    q,
    k,
    v,
    g=None,
    gk=None,
    alpha=None,
    beta=None,
    ridge=None,
    h0=None,
    u0=None,
    cu_seqlens=None,
    ridge_ratio=0.02,
    solver="chebyshev",
    num_iter=30,
    scale=None,
):
    """o [B,T,H,V], h [N,H,K,K], u [N,H,K,V], relative residual [B,T,H]; float64, differentiable."""
    (B, T, _, K), V = q.shape, v.shape[3]
    gates = [t for t in (g, gk, alpha, beta, ridge) if t is not None]
    H = max([q.shape[2], k.shape[2], v.shape[2]] + [t.shape[2] for t in gates])
    q, k, v = (t.repeat_interleave(H // t.shape[2], 2) for t in (q, k, v))
    scale = K**-0.5 if scale is None else scale
    if cu_seqlens is None:
        spans = [(b, 0, T) for b in range(B)]
    else:
        cuts = cu_seqlens.tolist()
        spans = [(0, begin, end) for begin, end in zip(cuts, cuts[1:], strict=False)]
    o = [[[None] * H for _ in range(T)] for _ in range(B)]
    res = torch.zeros(B, T, H, dtype=q.dtype)
    hs, us = [], []
    for n, (b, begin, end) in enumerate(spans):
        for head in range(H):
            h = torch.zeros(K, K, dtype=q.dtype) if h0 is None else h0[n, head]
            u = torch.zeros(K, V, dtype=q.dtype) if u0 is None else u0[n, head]
            for t in range(begin, end):
                at = (b, t, head)
                kt, vt = k[at], v[at]
                if beta is not None:
                    kt, vt = beta[at] * kt, beta[at] * vt
                h = h * (1 if gk is None else gk[at].exp()) + torch.outer(kt, kt)
                u = u * (1 if g is None else g[at].exp()) + torch.outer(kt, vt)
                f = h.square().sum().sqrt()
                if f <= 2.0**-60:
                    x = torch.zeros_like(q[at])
                else:
                    shift = (ridge_ratio if ridge is None else ridge[at]) * f
                    x = solve(h, shift, f, q[at], solver, num_iter)
                    r = (h @ x + shift * x - q[at]).detach()
                    res[at] = r.norm() / q[at].detach().norm()
                m = q[at] + (1 if alpha is None else alpha[at]) * (x - q[at])
                o[b][t][head] = scale * (u.T @ m)
            hs.append(h)
            us.append(u)
    o = torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in o])
    count = len(spans)
    return (o, torch.stack(hs).view(count, H, K, K), torch.stack(us).view(count, H, K, V), res)


def conv_loop(x, weight, state, silu):
    W = weight.shape[1]
    before = torch.zeros(x.shape[0], x.shape[2], W, dtype=x.dtype) if state is None else state
    padded = torch.cat([before, x.transpose(1, 2)], 2)
    y = torch.stack(
        [(padded[:, :, t + 1 : t + 1 + W] * weight).sum(-1) for t in range(x.shape[1])], 1
    )
    return torch.nn.functional.silu(y) if silu else y, padded[:, :, -W:]


GATES = ("g", "gk", "alpha", "beta", "ridge")


def problem(
    B=2,
    T=7,
    H=2,
    K=5,
    V=3,
    heads=(2, 2, 2),
    gates=GATES,
    N=None,
    dtype=torch.float64,
    states=True,
    ridge=0.02,
):
    gen = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    made = {
        "q": unit(normal(B, T, heads[0], K), dim=-1),
        "k": unit(normal(B, T, heads[1], K), dim=-1),
        "v": normal(B, T, heads[2], V),
        "g": -normal(B, T, H).abs() * 0.2,
        "gk": -normal(B, T, H).abs() * 0.2,
        "alpha": normal(B, T, H).sigmoid(),
        "beta": normal(B, T, H).sigmoid(),
        "ridge": ridge * (0.3 * normal(B, T, H)).exp(),
    }
    made = {name: t for name, t in made.items() if name in ("q", "k", "v") or name in gates}
    if states:
        N = B if N is None else N
        root = normal(N, H, K, 2 * K) * 0.3
        made["h0"] = root @ root.transpose(-1, -2)
        made["u0"] = normal(N, H, K, V)
    return {name: t.to(dtype) for name, t in made.items()}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def available(backend):
    """Whether `backend` computes GKA in this build; a build without it says so itself."""
    p = problem(dtype=torch.float32)
    try:
        ops.gka_forward(**p, backend=backend)
        return True
    except RuntimeError as error:
        assert "backend" in str(error), f"unexpected failure of backend {backend}: {error}"
        return False


BACKENDS = [
    pytest.param("reference", torch.float64, 1e-11, 1e-8, id="reference-float64"),
    pytest.param("cpu", torch.float32, 1e-5, 1e-4, id="cpu-float32"),
]
