"""torch.ops.kalmanet.gka_* against a token loop in float64, on every backend."""

import pytest
import torch
from operators import BACKENDS, GATES, SEED, gka_loop, ops, problem, relative

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


# A state of 16 (16 + 16) numbers, and one of 112 (112 + 64), an odd multiple of 256.
@pytest.mark.parametrize("size", [{}, {"K": 100, "V": 64}], ids=str)
@pytest.mark.parametrize("lengths", [None, [600, 1, 0, 520, 39]])
def test_segment_states_change_no_bit(lengths, size):
    """What the forward keeps every 512 tokens for the backward; in another chunk size, nothing."""
    p = problem(B=1, T=1160, dtype=torch.float32, **size)
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    N = 1 if lengths is None else len(lengths)
    for name in ("h0", "u0"):
        p[name] = p[name].expand(N, *p[name].shape[1:]).contiguous()
    B, T, H, K = 1, 1160, p["g"].shape[2], p["q"].shape[3]
    o, _h, _u, x, _r, states = ops.gka_forward(**p, cu_seqlens=cu, save_x=True)
    assert states.shape[:3] == (B, H, T) and states.dtype == torch.float32
    numbers = 16 * -(-K // 16) * 16 * (-(-K // 16) + -(-o.shape[3] // 16))
    assert states.shape[3] == -(-numbers // 512)
    again = ops.gka_forward(**p, cu_seqlens=cu, save_x=True)[5]
    assert torch.equal(states, again), "other numbers where no state is"
    d_o = torch.ones_like(o)
    got = ops.gka_backward(d_o=d_o, **p, cu_seqlens=cu, x=x, segment_states=states)
    want = ops.gka_backward(d_o=d_o, **p, cu_seqlens=cu, x=x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    other = ops.gka_backward(d_o=d_o, **p, cu_seqlens=cu, x=x, segment_states=2 * states)
    assert not torch.equal(other[1], want[1]), "not read"
    with pytest.raises(RuntimeError, match="segment_states: is not the"):
        ops.gka_backward(d_o=d_o, **p, cu_seqlens=cu, x=x, segment_states=states[:, :, ::2])
    for options in ({"chunk_size": 12}, {"backend": "reference"}):
        assert ops.gka_forward(**p, cu_seqlens=cu, save_x=True, **options)[5].numel() == 0


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
    o, h, u, _, residual, _ = ops.gka_forward(**p, want_residual=True, backend=backend)
    assert o.shape == (2, T, 2, 3)
    for t in (o, h, u, residual):
        assert torch.equal(t, torch.zeros_like(t))
    grads = ops.gka_backward(**p, d_o=torch.ones_like(o), backend=backend)
    assert all(torch.isfinite(t).all() for t in grads)
