"""torch.ops.kalmanet.causal_conv_*, gated_rms_norm_* and unit_norm_* against PyTorch in float64."""

import pytest
import torch
from operators import SEED, conv_loop, ops, relative


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
        cotangents[0].float(), x32, w32, s32, d_final_state=cotangents[1].float(), silu=silu
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
    got = list(ops.gated_rms_norm_backward(dy32, o32, gate32, w32))
    if not gated:
        assert got.pop(1).numel() == 0
    for a, b in zip(got, grads, strict=False):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize("kind", ["official", "fla"])
def test_unit_norm(kind):
    gen = torch.Generator().manual_seed(SEED)
    x = torch.randn(11, 37, generator=gen, dtype=torch.float64, requires_grad=True)
    square = x.square().sum(-1, keepdim=True)
    want = x / (square.sqrt() + 0.1) if kind == "official" else x / (square + 0.1).sqrt()
    dy = torch.randn(11, 37, generator=gen, dtype=torch.float64)
    (grad,) = torch.autograd.grad(want, x, dy)
    x32 = x.detach().float()
    assert relative(ops.unit_norm_forward(x32, kind=kind, eps=0.1), want) <= 1e-6
    assert relative(ops.unit_norm_backward(dy.float(), x32, kind=kind, eps=0.1), grad) <= 1e-6
