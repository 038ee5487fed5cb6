"""torch.ops.kalmanet on CUDA tensors: the answers of the CPU's operators, on PyTorch's current
stream. Without a GPU every test here is skipped and says so."""

import pytest
import torch
from operators import SEED, ops, problem, relative

info = dict(line.split(": ", 1) for line in ops.backend_info().splitlines())
if not torch.cuda.is_available():
    WHY = f"NOT TESTED: PyTorch {torch.__version__} finds no GPU here"
elif info["cuda"].startswith("not available"):
    WHY = f"NOT TESTED: {info['cuda']}"
else:
    WHY = ""
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY)

# Relative error beside the float64 answer from the same (rounded) inputs: 16-bit results are
# rounded once, to half a unit in the last place (rms 1.7e-3 and 2.1e-4).
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def random(*shape, seed=SEED):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def agree(name, dtype, tensors, whole=(), bound=None, **options):
    """The operator on CUDA tensors of `dtype` beside itself on float64 ones of the CPU. `whole`:
    what stays float32 beside 16 bits, by index; None and integers are passed as they are."""
    op, fine = getattr(ops, name), torch.float64 if dtype == torch.float64 else torch.float32
    rounded = [
        t if t is None or not t.is_floating_point() else t.to(fine if i in whole else dtype)
        for i, t in enumerate(tensors)
    ]
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in rounded]
    there = [t.cuda() if t is not None and t.is_floating_point() else t for t in rounded]
    copy = [t.clone() if t is not None else None for t in there]  # some are updated in place
    want, got = op(*wide, **options), op(*there, **options)
    again = op(*copy, **options)
    if isinstance(want, torch.Tensor):
        want, got, again = (want,), (got,), (again,)
    for i, (a, b, c) in enumerate(zip(got, want, again, strict=True)):
        assert a.is_cuda and a.shape == b.shape, f"{name}, result {i}"
        assert torch.equal(a, c), f"{name}, result {i}: another run gives other bits"
        if b.numel():
            error = relative(a.cpu(), b)
            limit = (bound or BOUNDS)[dtype]
            assert error <= limit, f"{name}, result {i}, {dtype}: {error:.2e} > {limit}"


@DTYPES
@pytest.mark.parametrize("W", [1, 4, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_conv(dtype, W, packed):
    B, T, D = (1, 103, 37) if packed else (2, 103, 37)
    cu = torch.tensor([0, 1, 1, 40, 103]) if packed else None
    N = 4 if packed else B
    x, weight, state = random(B, T, D), random(D, W, seed=1) * 0.5, random(N, D, W, seed=2)
    dy, d_final = random(B, T, D, seed=3), random(N, D, W, seed=4)
    agree("causal_conv_forward", dtype, [x, weight, state, cu], want_final_state=True)
    agree("causal_conv_forward", dtype, [x, weight, None, cu], whole=(1,), silu=False)
    # (The weight's gradient is a long sum that may cancel.)
    loose = {d: 4 * b for d, b in BOUNDS.items()}
    agree("causal_conv_backward", dtype, [dy, x, weight, state, cu, d_final], bound=loose)
    if not packed:
        agree("causal_conv_step", dtype, [x[:, 0], weight, state.clone()])


def test_causal_conv_step_updates_its_state_in_place():
    x, weight = random(2, 6, 5).float(), random(5, 4, seed=1).float()
    want, final = ops.causal_conv_forward(x, weight, want_final_state=True)
    state = torch.zeros(2, 5, 4, device="cuda")
    got = [ops.causal_conv_step(x[:, t].cuda(), weight.cuda(), state) for t in range(6)]
    assert relative(torch.stack(got, 1).cpu(), want) <= 1e-6
    assert torch.equal(state.cpu(), final)


@DTYPES
@pytest.mark.parametrize("packed", [False, True])
def test_causal_conv_of_aligned_rows(dtype, packed):
    """16 bytes a load: as many channels as more than one block takes."""
    B, T, D = (1, 203, 264) if packed else (2, 203, 264)
    cu = torch.tensor([0, 1, 1, 40, 203]) if packed else None
    N = 4 if packed else B
    x, weight, state = random(B, T, D), random(D, 4, seed=1) * 0.5, random(N, D, 4, seed=2)
    dy, d_final = random(B, T, D, seed=3), random(N, D, 4, seed=4)
    agree("causal_conv_forward", dtype, [x, weight, state, cu], want_final_state=True)
    agree("causal_conv_forward", dtype, [x, weight, None, cu], whole=(1,), silu=False)
    loose = {d: 4 * b for d, b in BOUNDS.items()}
    agree("causal_conv_backward", dtype, [dy, x, weight, state, cu, d_final], bound=loose)
    agree("causal_conv_backward", dtype, [dy, x, weight, None, cu, None], whole=(2,), bound=loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution_alone_and_in_a_batch(dtype):
    """Longer inputs are cut into longer spans: no bit of an answer knows."""
    x, dy = (random(12, 1061, 1024, seed=i).to(dtype).cuda() for i in (1, 2))
    weight, state = random(1024, 4, seed=3).to(dtype).cuda(), random(12, 1024, 4, seed=4)
    state = state.to(dtype).cuda()
    y, final = ops.causal_conv_forward(x, weight, state, want_final_state=True)
    dx, _, dstate = ops.causal_conv_backward(dy, x, weight, state, None, state)
    for n in (0, 7, 11):
        one = slice(n, n + 1)
        alone = ops.causal_conv_forward(x[one], weight, state[one], want_final_state=True)
        assert torch.equal(alone[0], y[one]) and torch.equal(alone[1], final[one])
        alone = ops.causal_conv_backward(dy[one], x[one], weight, state[one], None, state[one])
        assert torch.equal(alone[0], dx[one]) and torch.equal(alone[2], dstate[one])


@DTYPES
@pytest.mark.parametrize("V", [1, 8, 33, 64, 128, 256, 700])
def test_norms(dtype, V):
    o, gate, weight, dy = (
        random(*s, seed=i) for i, s in enumerate([(570, V)] * 2 + [(V,), (570, V)])
    )
    o = o + 0.5  # V = 1 without a gate: d_o is nothing but eps, not what this is about
    loose = {d: 4 * b for d, b in BOUNDS.items()}
    agree("gated_rms_norm_forward", dtype, [o, gate, weight])
    agree("gated_rms_norm_forward", dtype, [o, None, weight], whole=(2,))
    if V > 1:
        agree("gated_rms_norm_backward", dtype, [dy, o, gate, weight], bound=loose)
        agree("gated_rms_norm_backward", dtype, [dy, o, None, weight], bound=loose)
        for kind in ("official", "fla"):
            agree("unit_norm_backward", dtype, [dy, o], kind=kind, bound=loose)
    for kind in ("official", "fla"):
        agree("unit_norm_forward", dtype, [o, gate][:1], kind=kind)


def test_any_strides():
    x, weight = random(2, 40, 12).float(), random(12, 4, seed=1).float()
    want = ops.causal_conv_forward(x.cuda(), weight.cuda())[0]
    odd = torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
    assert not odd.is_contiguous()
    assert torch.equal(
        ops.causal_conv_forward(odd.cuda()[:], weight.t().contiguous().t().cuda())[0], want
    )
    # Aligned rows inside of wider ones: 16 bytes a load, as where they are dense.
    wide = torch.stack([x, x], 2).flatten(2).cuda()[..., 12:]
    assert not wide.is_contiguous()
    assert torch.equal(ops.causal_conv_forward(wide, weight.cuda())[0], want)
    some = random(80, 3, 16).float().cuda()[:, 1]
    assert not some.is_contiguous()
    assert torch.equal(ops.unit_norm_forward(some), ops.unit_norm_forward(some.contiguous()))
    rows = random(9, 24).float().cuda()
    norm = ops.gated_rms_norm_forward(rows, None, rows[0])
    assert torch.equal(ops.gated_rms_norm_forward(rows.t().contiguous().t(), None, rows[0]), norm)


GKA = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 6e-4}


@DTYPES
@pytest.mark.parametrize("solver", ["chebyshev", "direct", "auto"])
def test_gka_forward(dtype, solver):
    p = problem(T=70, K=20, V=12)
    tensors = [p[n] for n in ("q", "k", "v", "g", "gk", "alpha", "beta", "ridge", "h0", "u0")]
    # 16-bit states are none: float32 beside 16 bits.
    options = {"solver": solver, "num_iter": 40, "tolerance": 1e-10 if solver != "chebyshev" else 0}
    agree("gka_forward", dtype, tensors, whole=range(3, 10), bound=GKA, **options)


def test_gka_step_updates_its_states_in_place():
    p = {n: t.float() for n, t in problem(T=3, K=20, V=12).items()}
    inputs = {n: t for n, t in p.items() if n not in ("h0", "u0")}
    want, h, u = ops.gka_forward(**p)[:3]
    state = p["h0"].cuda(), p["u0"].cuda()
    got, _ = ops.gka_step(**{n: t.cuda() for n, t in inputs.items()}, h=state[0], u=state[1])
    assert relative(got.cpu(), want) <= 2e-5
    assert relative(state[0].cpu(), h) <= 1e-6 and relative(state[1].cpu(), u) <= 1e-6


def test_auto_is_chebyshev_where_it_is_cheap_and_direct_elsewhere():
    p = {n: t.float().cuda() for n, t in problem(T=40, K=20, gates=("g", "gk")).items()}

    def o(**options):
        return ops.gka_forward(**p, **options)[0]

    # 51 steps for 1e-5 at 0.02; 558 at 1.2e-4, which a direct solve costs less than.
    assert torch.equal(o(solver="auto"), o(solver="chebyshev", num_iter=0))
    assert torch.equal(o(solver="auto", ridge_ratio=1.2e-4), o(solver="direct", ridge_ratio=1.2e-4))
    with pytest.raises(
        RuntimeError, match="solver cg is not available .* chebyshev, direct or auto"
    ):
        o(solver="cg")


def test_work_is_put_on_the_current_stream():
    """Inputs are made late on a stream of their own: an operator elsewhere would read zeros."""
    p = {n: t.float().cuda() for n, t in problem(T=40, K=20).items()}
    x, weight = random(2, 40, 12).float().cuda(), random(12, 4, seed=1).float().cuda()
    want = ops.gka_forward(**p)[0], ops.causal_conv_forward(x, weight)[0]
    late = {"v": torch.zeros_like(p["v"]), "x": torch.zeros_like(x)}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late["v"].copy_(p["v"])
        late["x"].copy_(x)
        got = (
            ops.gka_forward(**p | {"v": late["v"]})[0],
            ops.causal_conv_forward(late["x"], weight)[0],
        )
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_step_in_a_graph():
    p = {n: t.float().cuda() for n, t in problem(T=1, K=20, V=12).items()}
    inputs = {n: t for n, t in p.items() if n not in ("h0", "u0")}
    h, u = p["h0"].clone(), p["u0"].clone()
    ops.gka_step(**inputs, h=h, u=u)  # nothing is done for the first time inside the capture
    h.copy_(p["h0"]), u.copy_(p["u0"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = ops.gka_step(**inputs, h=h, u=u)
    want_h, want_u = p["h0"].clone(), p["u0"].clone()
    for _ in range(3):
        want, _ = ops.gka_step(**inputs, h=want_h, u=want_u)
        graph.replay()
        assert torch.equal(o, want)
    assert torch.equal(h, want_h) and torch.equal(u, want_u)


def test_tensors_of_two_devices():
    p = {n: t.float().cuda() for n, t in problem().items()}
    with pytest.raises(RuntimeError, match="alpha: is on cpu, but q is on cuda:0; move one"):
        ops.gka_forward(**p | {"alpha": p["alpha"].cpu()})
    with pytest.raises(RuntimeError, match="k: is on cuda:0, but q is on cpu"):
        ops.gka_forward(**p | {"q": p["q"].cpu()})
    with pytest.raises(RuntimeError, match="weight: is on cpu, but x is on cuda:0"):
        ops.causal_conv_forward(torch.zeros(1, 2, 3, device="cuda"), torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match='backend: is "cpu", but q is on cuda:0; pass "auto"'):
        ops.gka_forward(**p, backend="cpu")
    with pytest.raises(RuntimeError, match='backend: is "cuda", but q is on cpu'):
        ops.gka_forward(**{n: t.cpu() for n, t in p.items()}, backend="cuda")
    assert torch.equal(ops.gka_forward(**p, backend="cuda")[0], ops.gka_forward(**p)[0])


def test_empty_calls():
    x = torch.zeros(2, 0, 3, device="cuda")
    state = torch.ones(2, 3, 4, device="cuda")
    y, final = ops.causal_conv_forward(x, state[0], state, want_final_state=True)
    assert y.shape == x.shape and torch.equal(final, state)
    none = torch.zeros(0, 5, device="cuda")
    assert ops.gated_rms_norm_forward(none, None, torch.ones(5, device="cuda")).shape == (0, 5)
    sums = ops.gated_rms_norm_backward(none, none, None, torch.ones(5, device="cuda"))
    assert torch.equal(sums[2], torch.zeros(5, device="cuda"))


@pytest.mark.skipif(not WHY and torch.cuda.device_count() < 2, reason="NOT TESTED: one GPU here")
def test_tensors_of_another_gpu_than_the_current_one():
    p = {n: t.float() for n, t in problem(T=40, K=20).items()}
    there = {n: t.to("cuda:1") for n, t in p.items()}
    assert torch.cuda.current_device() == 0
    want = ops.gka_forward(**{n: t.cuda() for n, t in p.items()})[0]
    got = ops.gka_forward(**there)[0]
    assert got.device == torch.device("cuda", 1) and torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), want.cpu())
    rows, x, weight = random(9, 24).float(), random(2, 40, 12).float(), random(12, 4).float()
    want = ops.gated_rms_norm_backward(rows.cuda(), rows.cuda(), None, rows[0].cuda())
    got = ops.gated_rms_norm_backward(*(t.to("cuda:1") for t in (rows, rows)), None, rows[0].to(1))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))
    want = ops.causal_conv_forward(x.cuda(), weight.cuda())[0]
    assert torch.equal(ops.causal_conv_forward(x.to(1), weight.to(1))[0].cpu(), want.cpu())
    with pytest.raises(RuntimeError, match="k: is on cuda:0, but q is on cuda:1"):
        ops.gka_forward(**there | {"k": p["k"].cuda()})
