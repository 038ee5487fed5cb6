"""torch.ops.kalmanet.layer_step on CUDA tensors: beside float64 PyTorch, beside the operators taken
one by one, and in a graph. Without a GPU every test here is skipped and says so."""

import math

import pytest
import torch
from operators import ops, relative
from test_cuda import DTYPES, pytestmark  # noqa: F401  (skips without a GPU)
from test_layer_step import SHAPES, Layer

# Beside float64: float32 as the CPU's; of 16 bits o is rounded twice.
BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}
# The step kernel's head dim. From three 16-bit tokens on q, k and v are rounded as well.
FAST = {"K": 128, "V": 128}
FAST_SHAPES = {
    "fast": FAST,
    "fast, gqa": FAST | {"H": 4, "heads": (4, 2, 1)},
    "fast, direct": FAST | {"solver": "direct", "absent": ("ridge", "v_conv")},
    "fast, nothing optional": FAST | {"absent": ("gate", "b", "alpha", "a", "ridge", "v_conv")},
}
FEW = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def on_gpu(tensors):
    return {name: None if t is None else t.cuda() for name, t in tensors.items()}


def twins(dtype, shape):
    """The layer with its float64 twin, on the CPU, and the same on the GPU."""
    layer, there = Layer(dtype, **shape), Layer(dtype, **shape)
    there.weights, there.states = on_gpu(there.weights), on_gpu(there.states)
    return layer, there


@DTYPES
@pytest.mark.parametrize("shape", SHAPES | FAST_SHAPES)
def test_beside_float64(dtype, shape):
    layer, there = twins(dtype, (SHAPES | FAST_SHAPES)[shape])
    bound = BOUNDS[dtype]
    for T in (2, 1, 1, 5, 1):
        if T >= 3 and shape in FAST_SHAPES:
            bound = FEW.get(dtype, bound)
        tokens = layer.tokens(T)
        want, want_residual = layer.want(tokens)
        ask = shape not in FAST_SHAPES  # without: the step kernel
        got, residual = there.step(on_gpu(tokens), want_residual=ask)
        assert got.is_cuda and got.dtype == dtype and got.shape == want.shape
        error = relative(got.cpu(), want)
        assert error <= bound, f"o, {shape}, T {T}: {error:.2e} > {bound}"
        if ask:
            limit = 2e-3 if dtype.itemsize == 2 else 1e-4
            assert (residual.cpu().double() - want_residual).abs().max() <= limit, "residual"
        for name, state in there.states.items():
            if state is not None:
                error = relative(state.cpu(), layer.plain[name])
                limit = bound if bound == FEW.get(dtype) else min(bound, 2e-5)
                assert error <= limit, f"{name}, {shape}: {error:.2e}"


def one_by_one(tokens, layer):
    """What a layer without the fused step calls, in float32 (float64) between its projections."""
    t, w, s, o = tokens, layer.weights, layer.states, layer.options
    B, T = t["q"].shape[:2]
    fine = torch.float64 if layer.dtype == torch.float64 else torch.float32
    qkv = {}
    for name in "qkv":
        rows = t[name].to(fine).reshape(B, T, -1)
        weight = w[f"conv_{name}_weight"]
        if weight is not None:
            rows, state = ops.causal_conv_forward(
                rows, weight.to(fine), s["conv_" + name], want_final_state=True
            )
            s["conv_" + name].copy_(state)
        qkv[name] = rows.reshape(t[name].shape)
    kind = o.get("qk_norm", "official")
    for name in "qk":
        flat = qkv[name].reshape(-1, layer.K)
        qkv[name] = ops.unit_norm_forward(flat, kind=kind).reshape(qkv[name].shape)
    gates = dict.fromkeys(("g", "gk", "alpha", "beta", "ridge"))
    if t["b"] is not None:
        gates["beta"] = t["b"].to(fine).sigmoid() + 1e-6
    if t["alpha"] is not None:
        gates["alpha"] = t["alpha"].to(fine).sigmoid()
    elif o.get("fixed_alpha", 1.0) != 1:
        gates["alpha"] = torch.full((B, T, layer.H), o["fixed_alpha"], dtype=fine, device="cuda")
    if t["a"] is not None:
        rate = torch.nn.functional.softplus(t["a"].to(fine) + w["dt_bias"].to(fine))
        gates["g"] = -w["A_log"].to(fine).exp() * rate
        gates["gk"] = gates["g"] if o.get("decay_h", True) else None
    if t["ridge"] is not None:
        gates["ridge"] = t["ridge"].to(fine).clamp(math.log(1.2e-4), math.log(0.135)).exp()
    out, _ = ops.gka_step(
        **qkv, h=s["h"], u=s["u"], **gates, scale=o.get("scale"),
        solver=o.get("solver", "chebyshev"),
    )  # fmt: skip
    gate = None if t["gate"] is None else t["gate"].to(fine).reshape(-1, layer.V)
    rows = ops.gated_rms_norm_forward(out.reshape(-1, layer.V), gate, w["o_norm"].to(fine))
    return rows.reshape(out.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES | FAST_SHAPES)
def test_beside_the_operators_one_by_one(dtype, shape):
    (layer, fused), (_, separate) = (twins(dtype, (SHAPES | FAST_SHAPES)[shape]) for _ in range(2))
    bound = 2 * BOUNDS[dtype]  # each is within one of float64
    for T in (1, 1, 4, 1):
        tokens = on_gpu(layer.tokens(T))
        got, want = fused.step(tokens)[0], one_by_one(tokens, separate)
        error = relative(got, want)
        assert error <= bound, f"o, {shape}, T {T}: {error:.2e} > {bound}"
        for name, state in fused.states.items():
            if state is None:
                continue
            if name.startswith("conv"):
                assert torch.equal(state, separate.states[name]), name
            else:
                error = relative(state, separate.states[name])
                assert error <= bound / 20, f"{name}, {shape}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["plain", "fast"])
@pytest.mark.parametrize("T", [1, 4])
def test_in_a_graph(dtype, shape, T):
    options = (SHAPES | FAST_SHAPES)[shape]
    (layer, eager), (_, captured) = (twins(dtype, options) for _ in range(2))
    tokens = on_gpu(layer.tokens(T))
    captured.step(tokens)  # nothing is done for the first time inside the capture
    for state in captured.states.values():
        state.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = captured.step(tokens)
    for state in captured.states.values():
        assert not state.any()  # (a capture does nothing)
    for _ in range(4):
        for name, t in on_gpu(layer.tokens(T)).items():
            tokens[name].copy_(t)
        want = eager.step(tokens)[0]
        graph.replay()
        assert torch.equal(o, want)
    for name, state in captured.states.items():
        assert torch.equal(state, eager.states[name]), name


def test_errors_name_the_argument():
    layer, there = twins(torch.float32, {})
    arguments = on_gpu(layer.tokens(1)) | there.weights | there.states
    with pytest.raises(RuntimeError, match="solver cg is not available"):
        ops.layer_step(**arguments, solver="cg")
    with pytest.raises(RuntimeError, match="conv_k: is on cpu, but q is on cuda:0"):
        ops.layer_step(**arguments | {"conv_k": layer.states["conv_k"]})
    with pytest.raises(RuntimeError, match="h: "):
        ops.layer_step(**arguments | {"h": there.states["h"][:1]})
    assert not any(state.any() for state in there.states.values())
    # Of a ridge's NaN the host knows nothing: it shows in the answer, of its head alone.
    arguments["ridge"][:, :, 0] = math.nan
    o, _ = ops.layer_step(**arguments)
    assert o[:, :, 0].isnan().all() and not o[:, :, 1].isnan().any()


def test_nothing_to_do():
    layer, there = twins(torch.float32, {})
    o, _ = there.step(on_gpu(layer.tokens(0)))
    assert o.shape[1] == 0 and not any(state.any() for state in there.states.values())
