"""torch.ops.kalmanet.* against a token loop written here in float64, with schemas and errors.

Run by ctest, which names the library in KALMANET_TORCH_LIBRARY; alone, the newest build is taken.
"""

import math
import os
import re
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
SHAPES = {
    "plain": {},
    "gqa": {"H": 4, "heads": (4, 2, 2)},
    "gva": {"H": 4, "heads": (2, 2, 4)},
    "gates decide H": {"H": 4, "heads": (2, 1, 2)},
    "one token": {"T": 1},
    "long": {"B": 1, "T": 70, "K": 8, "V": 6},
    "no gates": {"gates": (), "states": False},
    "shared states only": {"gates": ("g",)},
}


@pytest.fixture(autouse=True)
def require_backend(request):
    backend = (
        request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    )
    if backend is not None and not available(backend):
        pytest.fail(f"the {backend} backend does not compute float32 GKA in this build")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend, dtype, bound, _grad_bound", BACKENDS)
def test_forward(shape, backend, dtype, bound, _grad_bound):
    p = problem(**SHAPES[shape])
    want = gka_loop(**p)
    p = {name: t.to(dtype) for name, t in p.items()}
    got = ops.gka_forward(**p, save_x=True, want_residual=True, backend=backend)
    for name, a, b in zip(("o", "h", "u"), got[:3], want[:3], strict=False):
        assert a.shape == b.shape and a.dtype == dtype
        assert relative(a, b) <= bound, (
            f"{name}, {shape}, {backend}: {relative(a, b):.2e} > {bound}"
        )
    assert got[3].shape[:2] == p["q"].shape[:2] and got[3].shape[3] == p["q"].shape[3]
    assert (got[4].double() - want[3]).abs().max() <= max(bound, 1e-5), "residual"
    no_x = ops.gka_forward(**p, backend=backend)
    assert no_x[3].numel() == 0 and no_x[4].numel() == 0 and torch.equal(no_x[0], got[0])


@pytest.mark.parametrize("shape", ["plain", "gqa", "gva", "no gates", "one token"])
@pytest.mark.parametrize("backend, dtype, _bound, bound", BACKENDS)
def test_backward(shape, backend, dtype, _bound, bound):
    """Against autograd through the exact solve; Chebyshev with enough steps stands for it."""
    p = {name: t.requires_grad_() for name, t in problem(**SHAPES[shape]).items()}
    outputs = gka_loop(**p, solver="direct")[:3]
    gen = torch.Generator().manual_seed(SEED + 1)
    cotangents = [torch.randn(t.shape, generator=gen, dtype=t.dtype) for t in outputs]
    want = dict(zip(p, torch.autograd.grad(outputs, list(p.values()), cotangents), strict=False))

    p = {name: t.detach().to(dtype) for name, t in p.items()}
    d_o, dh, du = (t.to(dtype) for t in cotangents)
    options = {"num_iter": 100, "backend": backend}
    x = ops.gka_forward(**p, **options, save_x=True)[3]
    names = ("q", "k", "v", *GATES, "h0", "u0")
    for saved in (x, None):
        got = ops.gka_backward(**p, **options, x=saved, d_o=d_o, dh=dh, du=du)
        for name, grad in zip(names, got, strict=False):
            if name not in p:
                assert grad.numel() == 0, f"d{name} of an absent input"
                continue
            assert grad.shape == p[name].shape
            error = relative(grad, want[name])
            assert error <= bound, f"d{name}, {shape}, {backend}: {error:.2e} > {bound}"


@pytest.mark.parametrize("backend, dtype, bound, _grad_bound", BACKENDS)
def test_step_updates_in_place_and_equals_forward(backend, dtype, bound, _grad_bound):
    p = problem(T=6, dtype=dtype)
    want = ops.gka_forward(**p, backend=backend)
    h, u = p.pop("h0").clone(), p.pop("u0").clone()
    where = h.data_ptr()
    outs = []
    for t in (slice(0, 1), slice(1, 2), slice(2, 6)):
        now = {name: tensor[:, t] for name, tensor in p.items()}
        o, residual = ops.gka_step(**now, h=h, u=u, backend=backend)
        assert residual.numel() == 0
        outs.append(o)
    assert h.data_ptr() == where
    assert relative(torch.cat(outs, 1), want[0]) <= bound
    assert relative(h, want[1]) <= bound and relative(u, want[2]) <= bound


@pytest.mark.parametrize("backend, dtype, bound, _grad_bound", BACKENDS)
def test_packed_equals_separate(backend, dtype, bound, _grad_bound):
    lengths = [3, 0, 1, 9]
    cu = torch.tensor([0] + lengths).cumsum(0)
    p = problem(B=1, T=13, N=4, dtype=dtype)
    got = ops.gka_forward(**p, cu_seqlens=cu, backend=backend)
    for n, (begin, end) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        one = {
            name: t[n : n + 1] if name in ("h0", "u0") else t[:, begin:end] for name, t in p.items()
        }
        if begin < end:
            want = ops.gka_forward(**one, backend=backend)
            assert relative(got[0][:, begin:end], want[0]) <= bound, f"sequence {n}"
        else:
            want = (None, one["h0"], one["u0"])
        assert relative(got[1][n : n + 1], want[1]) <= bound, f"state h of sequence {n}"
        assert relative(got[2][n : n + 1], want[2]) <= bound, f"state u of sequence {n}"
    every_other = torch.stack([cu, cu], 1)[:, 0]
    assert not every_other.is_contiguous()
    again = ops.gka_forward(**p, cu_seqlens=every_other, backend=backend)
    assert torch.equal(again[0], got[0]), "cu_seqlens with a stride"


@pytest.mark.parametrize("backend, dtype, _bound, _grad_bound", BACKENDS)
def test_strides_do_not_matter(backend, dtype, _bound, _grad_bound):
    """Transposed, sliced, interleaved layouts and expanded gates give the same bits."""
    p = problem(B=2, T=9, H=4, heads=(4, 2, 2), dtype=dtype)
    p["alpha"] = torch.full((), 0.7, dtype=dtype).expand(2, 9, 4)
    want = ops.gka_forward(**{n: t.contiguous() for n, t in p.items()}, backend=backend)

    def awkward(t):
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)

    odd = {n: t if n == "alpha" else awkward(t) for n, t in p.items()}
    assert odd["alpha"].stride() == (0, 0, 0) and not odd["q"].is_contiguous()
    got = ops.gka_forward(**odd, backend=backend)
    for name, a, b in zip(("o", "h", "u"), got, want, strict=False):
        assert torch.equal(a, b), f"{name}, {backend}"


@pytest.mark.parametrize("backend, dtype, _bound, _grad_bound", BACKENDS)
def test_thread_count_does_not_matter(backend, dtype, _bound, _grad_bound):
    p = problem(B=3, T=40, H=4, K=8, V=8, heads=(4, 2, 4), dtype=dtype)
    d_o = torch.ones(3, 40, 4, 8, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                ops.gka_forward(**p, backend=backend)[:3]
                + ops.gka_backward(**p, d_o=d_o, backend=backend)
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=False)):
            assert torch.equal(a, b), f"result {i} of {backend} depends on the number of threads"


@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("backend, dtype, _bound, _grad_bound", BACKENDS)
def test_empty_and_zero_keys(T, backend, dtype, _bound, _grad_bound):
    p = problem(T=T, states=False, dtype=dtype)
    p["k"].zero_()
    o, h, u, _, residual = ops.gka_forward(**p, want_residual=True, backend=backend)
    assert o.shape == (2, T, 2, 3)
    for t in (o, h, u, residual):
        assert torch.equal(t, torch.zeros_like(t))
    grads = ops.gka_backward(**p, d_o=torch.ones_like(o), backend=backend)
    assert all(torch.isfinite(t).all() for t in grads)


def conv_loop(x, weight, state, silu):
    W = weight.shape[1]
    before = torch.zeros(x.shape[0], x.shape[2], W, dtype=x.dtype) if state is None else state
    padded = torch.cat([before, x.transpose(1, 2)], 2)
    y = torch.stack(
        [(padded[:, :, t + 1 : t + 1 + W] * weight).sum(-1) for t in range(x.shape[1])], 1
    )
    return torch.nn.functional.silu(y) if silu else y, padded[:, :, -W:]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("W", [1, 4])
def test_causal_conv(silu, with_state, W):
    gen = torch.Generator().manual_seed(SEED)
    x = torch.randn(2, 9, 37, generator=gen, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, W, generator=gen, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 37, W, generator=gen, dtype=torch.float64, requires_grad=True)
    inputs = [x, weight] + ([state] if with_state else [])
    want = conv_loop(x, weight, state if with_state else None, silu)
    cotangents = [torch.randn(t.shape, generator=gen, dtype=torch.float64) for t in want]
    grads = torch.autograd.grad(want, inputs, cotangents)
    x32, w32, s32 = (t.detach().float() for t in (x, weight, state))
    s32 = s32 if with_state else None
    y, final = ops.causal_conv_forward(x32, w32, s32, silu=silu, want_final_state=True)
    assert relative(y, want[0]) <= 1e-6 and relative(final, want[1]) <= 1e-6
    assert ops.causal_conv_forward(x32, w32, s32, silu=silu)[1].numel() == 0
    got = ops.causal_conv_backward(
        x32, w32, s32, dy=cotangents[0].float(), d_final_state=cotangents[1].float(), silu=silu
    )
    for name, a, b in zip(("dx", "dweight", "dstate"), got, grads, strict=False):
        assert relative(a, b) <= 1e-5, f"{name}: {relative(a, b):.2e}"
    if not with_state:
        assert got[2].numel() == 0
    rolling = torch.zeros(2, 37, W) if s32 is None else s32.clone()
    steps = [ops.causal_conv_step(x32[:, t], w32, rolling, silu=silu) for t in range(9)]
    assert relative(torch.stack(steps, 1), want[0]) <= 1e-6 and relative(rolling, want[1]) <= 1e-6


def test_causal_conv_packed():
    gen = torch.Generator().manual_seed(SEED)
    x, weight = torch.randn(1, 9, 20, generator=gen), torch.randn(20, 4, generator=gen)
    cu = torch.tensor([0, 2, 2, 9])
    y, final = ops.causal_conv_forward(x, weight, cu_seqlens=cu, want_final_state=True)
    for n, (begin, end) in enumerate([(0, 2), (2, 2), (2, 9)]):
        if begin == end:
            assert torch.equal(final[n], torch.zeros(20, 4))
            continue
        one = ops.causal_conv_forward(x[:, begin:end], weight, want_final_state=True)
        assert torch.equal(y[:, begin:end], one[0]) and torch.equal(final[n : n + 1], one[1])


@pytest.mark.parametrize("gated", [True, False])
def test_gated_rms_norm(gated):
    gen = torch.Generator().manual_seed(SEED)
    o, gate = (torch.randn(11, 37, generator=gen, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(37, generator=gen, dtype=torch.float64)
    inputs = [o, gate, weight] if gated else [o, weight]
    for t in inputs:
        t.requires_grad_()
    want = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    if gated:
        want = want * torch.nn.functional.silu(gate)
    dy = torch.randn(11, 37, generator=gen, dtype=torch.float64)
    grads = list(torch.autograd.grad(want, inputs, dy))
    o32, gate32, w32, dy32 = (t.detach().float() for t in (o, gate, weight, dy))
    gate32 = gate32 if gated else None
    assert relative(ops.gated_rms_norm_forward(o32, gate32, w32), want) <= 1e-6
    got = list(ops.gated_rms_norm_backward(o32, gate32, w32, dy=dy32))
    if not gated:
        assert got.pop(1).numel() == 0
    for a, b in zip(got, grads, strict=False):
        assert relative(a, b) <= 1e-5


def test_schemas_declare_what_is_written():
    step = torch.ops.kalmanet.gka_step.default._schema
    written = {a.name for a in step.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"h", "u"}
    conv = torch.ops.kalmanet.causal_conv_step.default._schema
    written = {a.name for a in conv.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"state"}
    for name in (
        "gka_forward",
        "gka_backward",
        "causal_conv_forward",
        "causal_conv_backward",
        "gated_rms_norm_forward",
        "gated_rms_norm_backward",
    ):
        schema = getattr(torch.ops.kalmanet, name).default._schema
        assert not schema.is_mutable, name


def test_schemas_hold_when_run():
    p = problem(dtype=torch.float32)
    ops_and_args = [
        (ops.gka_forward.default, p),
        (ops.gka_backward.default, p | {"d_o": torch.ones(2, 7, 2, 3)}),
        (
            ops.gka_step.default,
            {n: t for n, t in p.items() if n not in ("h0", "u0")}
            | {"h": p["h0"].clone(), "u": p["u0"].clone()},
        ),
    ]
    for op, kwargs in ops_and_args:
        torch.library.opcheck(op, (), kwargs | {"backend": "reference"}, test_utils="test_schema")


ERRORS = {
    "k with another head dim": ({"k": lambda p: p["k"][..., :4]}, {}, "k: "),
    "q of three dimensions": ({"q": lambda p: p["q"][0]}, {}, "q: "),
    "five dimensions of h0": ({"h0": lambda p: p["h0"][None]}, {}, "h0: .*5 dimensions"),
    "v of another length": ({"v": lambda p: p["v"][:, :6]}, {}, "v: "),
    "heads that do not divide": (
        {"k": lambda p: p["k"].repeat(1, 1, 2, 1)[:, :, :3]},
        {},
        "heads",
    ),
    "gate of another shape": ({"g": lambda p: p["g"][:, :6]}, {}, "g: "),
    "integer q": ({"q": lambda p: p["q"].long()}, {}, "q: .*dtype Long"),
    "mixed dtypes": ({"v": lambda p: p["v"].double()}, {}, "v: .*float64"),
    "float64 on the cpu backend": (
        {n: (lambda p, n=n: p[n].double()) for n in ("q", "k", "v", *GATES, "h0", "u0")},
        {"backend": "cpu"},
        "float64",
    ),
    "state of another shape": ({"h0": lambda p: p["h0"][:1]}, {}, "h0: "),
    "head dim too large": (
        {"q": lambda p: torch.zeros(2, 7, 2, 300), "k": lambda p: torch.zeros(2, 7, 2, 300)},
        {},
        "q: .*300",
    ),
    "zero ridge": ({"ridge": lambda p: p["ridge"] * 0}, {}, "ridge"),
    "NaN in the ridge": ({"ridge": lambda p: p["ridge"] * math.nan}, {}, "ridge"),
    "negative ridge_ratio": ({"ridge": None}, {"ridge_ratio": -1.0}, "ridge_ratio: "),
    "negative num_iter": ({}, {"num_iter": -1}, "num_iter: .*-1"),
    "num_iter beyond int": ({}, {"num_iter": 2**40}, "num_iter: "),
    "unknown solver": ({}, {"solver": "newton"}, 'solver: .*"newton"'),
    "unknown backend": ({}, {"backend": "tpu"}, 'backend: .*"tpu"'),
    "chunk_size too large": ({}, {"chunk_size": 1000}, "chunk_size: "),
    "cu_seqlens of int32": (
        {},
        {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)},
        "cu_seqlens: .*int64",
    ),
    "cu_seqlens with a batch": ({}, {"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens|B"),
    "one offset": ({}, {"cu_seqlens": torch.tensor([0])}, "cu_seqlens: .*at least 2"),
    "cu_seqlens matrix": ({}, {"cu_seqlens": torch.tensor([[0, 7]])}, "cu_seqlens: .*1 dim"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    change, options, message = ERRORS[case]
    p = problem(dtype=torch.float32)
    p |= {name: make(p) if make else None for name, make in change.items()}
    with pytest.raises(RuntimeError) as caught:
        ops.gka_forward(**p, **{"backend": "reference", **options})
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("offsets", [[1, 9], [0, 5], [0, 9, 4, 9], [0, -1, 9]])
def test_bad_offsets(offsets):
    p = problem(B=1, T=9, N=len(offsets) - 1, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        ops.gka_forward(**p, cu_seqlens=torch.tensor(offsets), backend="reference")
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        ops.causal_conv_forward(
            torch.zeros(1, 9, 4), torch.zeros(4, 4), cu_seqlens=torch.tensor(offsets)
        )


def test_errors_of_conv_and_norm():
    x, weight = torch.zeros(2, 3, 4), torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match="weight: .*2 dimensions"):
        ops.causal_conv_forward(x, weight[None])
    with pytest.raises(RuntimeError, match="weight"):
        ops.causal_conv_forward(x, weight[:3])
    with pytest.raises(RuntimeError, match="x"):
        ops.causal_conv_forward(x.double(), weight)
    with pytest.raises(RuntimeError, match="state"):
        ops.causal_conv_step(x[:, 0], weight, torch.zeros(1, 4, 4))
    with pytest.raises(RuntimeError, match="o: .*2 dimensions"):
        ops.gated_rms_norm_forward(x, None, torch.ones(4))
    with pytest.raises(RuntimeError, match="gate"):
        ops.gated_rms_norm_forward(x[0], x[0, :2], torch.ones(4))


def test_backend_can_be_asked_and_forced():
    info = ops.backend_info()
    assert "cpu:" in info and "reference:" in info
    assert ops.instruction_set() in ("baseline", "avx2", "avx512")
    before = ops.instruction_set()
    try:
        ops.set_instruction_set("baseline")
        assert ops.instruction_set() == "baseline"
    finally:
        ops.set_instruction_set("")
    assert ops.instruction_set() == before
    with pytest.raises(RuntimeError, match="instruction_set: .*sse9"):
        ops.set_instruction_set("sse9")


def test_calls_leave_no_memory_behind():
    """Every way that arguments are passed, called often; 32 bytes lost a call would be 256 KiB.

    Not the operators that return a string: LibTorch 2.13 keeps 46 bytes of each, and nobody asks
    for the instruction set in a loop.
    """
    p = problem(B=1, T=1, H=1, K=2, V=2, heads=(1, 1, 1), dtype=torch.float32)
    inputs = {n: t for n, t in p.items() if n not in ("h0", "u0")}
    h, u = p["h0"].clone(), p["u0"].clone()
    d_o = torch.ones(1, 1, 1, 2)
    x, weight, state = torch.ones(1, 1, 2), torch.ones(2, 2), torch.zeros(1, 2, 2)
    row, cu = torch.ones(1, 2), torch.tensor([0, 1])
    calls = {
        "gka_forward": lambda: ops.gka_forward(**p, cu_seqlens=cu, scale=0.5, num_iter=1),
        "gka_backward": lambda: ops.gka_backward(**p, cu_seqlens=cu, d_o=d_o, num_iter=1),
        "gka_step": lambda: ops.gka_step(**inputs, h=h, u=u, cu_seqlens=cu, num_iter=1),
        "causal_conv_forward": lambda: ops.causal_conv_forward(x, weight, state, cu),
        "causal_conv_backward": lambda: ops.causal_conv_backward(x, weight, state, cu, dy=x),
        "causal_conv_step": lambda: ops.causal_conv_step(row, weight, state),
        "gated_rms_norm_forward": lambda: ops.gated_rms_norm_forward(row, row, row[0]),
        "gated_rms_norm_backward": lambda: ops.gated_rms_norm_backward(row, row, row[0], dy=row),
    }

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, call in calls.items():
            for _ in range(2000):
                call()
            before = resident()
            for _ in range(8000):
                call()
            grown = resident() - before
            assert grown < 160 * 1024, f"{name}: {grown / 8000:.0f} bytes a call"
    finally:
        torch.set_num_threads(before_threads)
