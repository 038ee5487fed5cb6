"""What PyTorch asks of an operator: gradcheck, opcheck, compile, export, vmap, autocast,
checkpointing, deterministic mode, second derivatives refused."""

import pytest
import torch
import torch.utils.checkpoint
from cases import DEVICE, SEED, cotangents, leaves, problem, relative
from kalmanet.ops import chunk_gka, fused_recurrent_gka, gka, naive_recurrent_gka
from torch._dynamo.testing import CompileCounterWithBackend

ops = torch.ops.kalmanet


def random(*shape, dtype=torch.float32, seed=SEED):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def operator_calls(dtype, gradients):
    """Each functional operator with all its tensors."""
    p = problem(T=5, K=4, V=3, dtype=dtype, states=True)
    h0, u0 = p.pop("initial_state")
    ridge, beta = (random(2, 5, 2, dtype=h0.dtype, seed=s).sigmoid() for s in (1, 2))
    first = [p[n] for n in ("q", "k", "v", "g", "gk", "alpha")] + [beta, ridge, h0, u0]
    x, weight, state = random(2, 5, 6, dtype=dtype), random(6, 4), random(2, 6, 4, dtype=dtype)
    weight = weight.to(dtype)
    o, gate, norm = (random(*s, dtype=dtype, seed=i) for i, s in enumerate(((9, 6), (9, 6), (6,))))
    forward = {
        "gka_forward": (first, {"save_x": True}),
        "causal_conv_forward": ([x, weight, state], {"want_final_state": True}),
        "gated_rms_norm_forward": ([o, gate, norm], {}),
        "unit_norm_forward": ([o], {"kind": "fla"}),
    }
    if gradients:
        return {n: ([t.clone().requires_grad_() for t in a], kw) for n, (a, kw) in forward.items()}
    d_o = random(2, 5, 2, 3, dtype=dtype)
    backward = {
        "gka_backward": ([d_o, *first, None, None, None, h0, u0], {}),
        "causal_conv_backward": ([x, x, weight, state, None, state], {}),
        "gated_rms_norm_backward": ([o, o, gate, norm], {}),
        "unit_norm_backward": ([o, gate], {}),
        "gka_step": ([*first[:3], h0.clone(), u0.clone(), *first[3:8]], {}),
        "layer_step": (
            [
                *first[:3],
                h0.clone(),
                u0.clone(),
                random(2, 8, 3, dtype=h0.dtype),
                random(2, 8, 3, dtype=h0.dtype),
                random(2, 6, 3, dtype=h0.dtype),
                *(random(c, 3, dtype=dtype) for c in (8, 8, 6)),
                random(3, dtype=dtype),
                random(2, 5, 2, 3, dtype=dtype),
                *(random(2, 5, 2, dtype=dtype) for _ in range(3)),
                None,
                *(random(2, dtype=dtype) for _ in range(2)),
            ],
            {"want_residual": True},
        ),
        "causal_conv_step": ([x[:, 0], weight, state.clone()], {}),
    }
    return forward | backward


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype, gradients):
    for name, (args, kwargs) in operator_calls(dtype, gradients).items():
        torch.library.opcheck(getattr(ops, name).default, tuple(args), kwargs)


# A state of 16 (16 + 16) numbers, and one of 112 (112 + 64), an odd multiple of 256.
@pytest.mark.parametrize("K, V", [(3, 2), (100, 64)])
@pytest.mark.parametrize("lengths", [None, [520, 0, 640]])
def test_segment_states_in_fake_and_autograd(lengths, K, V):
    """What the forward keeps for the backward every 512 tokens: its shape without data, and that
    gradients are those of a call that keeps nothing."""
    p = problem(B=1, T=1160, H=1, K=K, V=V, dtype=torch.float32)
    cu = None if lengths is None else torch.tensor([0, *lengths], device=DEVICE).cumsum(0).cpu()
    args = [p[n] for n in ("q", "k", "v", "g", "gk", "alpha")]
    torch.library.opcheck(
        ops.gka_forward.default,
        (*args, None, None, None, None, cu),
        {"save_x": True},
        test_utils=("test_schema", "test_faketensor"),
    )
    kept = [t.clone().requires_grad_() for t in args]
    o = ops.gka_forward(*kept, cu_seqlens=cu, save_x=True)[0]
    got = torch.autograd.grad(o.sum(), kept)
    want = ops.gka_backward(torch.ones_like(o), *args, None, None, None, None, cu)[:6]
    for name, a, b in zip(("q", "k", "v", "g", "gk", "alpha"), got, want, strict=True):
        assert relative(a, b) < 1e-5, f"d{name}: {relative(a, b):.1e}"


@pytest.mark.cpu_only("saved states are bytes in the processor's memory")
def test_opcheck_of_saved_states():
    h, u = random(2, 3, 4, 4), random(2, 3, 4, 5)
    data = ops.save_state(h, u)
    torch.library.opcheck(ops.save_state.default, (h, u))
    torch.library.opcheck(ops.saved_state_bytes.default, (data,))
    # Dtype and sizes of what it gives are in the data: there is nothing to say without them.
    torch.library.opcheck(
        ops.load_state.default, (data,), test_utils=("test_schema", "test_autograd_registration")
    )


def test_no_operator_is_left_out():
    named = {
        name.removeprefix("kalmanet::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("kalmanet::")
    }
    about_strings = {"backend_info", "instruction_set", "set_instruction_set"}
    states = {"save_state", "saved_state_bytes", "load_state"}
    assert named == set(operator_calls(torch.float32, False)) | states | about_strings


@pytest.mark.parametrize("same_gate", [False, True])
def test_gradcheck_of_gka(same_gate):
    p = problem(B=1, T=6, H=2, K=3, V=2, states=True)
    named = leaves(p)
    ridge = (random(1, 6, 2, dtype=torch.float64) * 0.1).exp().mul(0.1).requires_grad_()
    if same_gate:
        p["gk"] = p["g"]
        del named["gk"]

    def f(*tensors):
        new = dict(zip(named, tensors))
        # H is symmetric: only such states are asked for.
        h0 = (new["h0"] + new["h0"].transpose(-1, -2)) / 2
        gk = new["g"] if same_gate else new["gk"]
        o, state = chunk_gka(
            new["q"], new["k"], new["v"], new["g"], gk, new["alpha"], ridge_ratio=tensors[-1],
            initial_state=(h0, new["u0"]), output_final_state=True, solver="direct",
            tolerance=0.0,
        )  # fmt: skip
        return (o, *state)

    assert torch.autograd.gradcheck(f, (*named.values(), ridge), atol=1e-6, rtol=1e-5)


def test_gradcheck_with_few_heads_and_beta():
    gen = (1, 6, 4)
    q, k, v = (random(1, 6, h, 3, dtype=torch.float64, seed=h).requires_grad_() for h in (2, 1, 4))
    beta = random(*gen, dtype=torch.float64).sigmoid().requires_grad_()

    def f(*t):
        return gka(t[0], t[1], t[2], beta=t[3], solver="direct", tolerance=0.0)[0]

    assert torch.autograd.gradcheck(f, (q, k, v, beta), atol=1e-6, rtol=1e-5)


def test_gradcheck_of_convolution_and_norm():
    for name in ("causal_conv_forward", "gated_rms_norm_forward", "unit_norm_forward"):
        args, kwargs = operator_calls(torch.float64, True)[name]
        assert torch.autograd.gradcheck(lambda *a: getattr(ops, name)(*a, **kwargs), args), name  # noqa: B023


def test_a_second_derivative_is_an_error():
    p = problem(T=5)
    named = leaves(p)
    (grad,) = torch.autograd.grad(chunk_gka(**p)[0].sum(), named["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="gka_backward: second derivatives do not exist"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(naive_recurrent_gka(**p)[0].sum(), named["q"], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), named["k"])
    assert second.norm() > 0


def test_torch_func_derivatives_are_an_error():
    p = problem(T=5)
    with pytest.raises(RuntimeError, match=r"torch.func transforms other than vmap \(here: Grad"):
        torch.func.grad(lambda q: chunk_gka(q, p["k"], p["v"])[0].sum())(p["q"])
    with pytest.raises(RuntimeError, match=r"torch.func transforms other than vmap \(here: Jvp"):
        torch.func.jvp(lambda q: chunk_gka(q, p["k"], p["v"])[0], (p["q"],), (p["q"],))


@pytest.mark.parametrize("f", [chunk_gka, fused_recurrent_gka])
def test_vmap_equals_a_loop(f):
    p = problem(T=6, states=True)
    q, v = random(2, 2, 3, 6, 2, 16, dtype=torch.float64)
    q.requires_grad_()
    k = p["k"].clone().requires_grad_()

    def one(q, v, k):
        o, s = f(
            q, k, v[..., :8], p["g"], initial_state=p["initial_state"], output_final_state=True
        )
        return o, s[0]

    # q mapped over its second dimension, v over its first, k over none.
    vs = v.movedim(0, 1).movedim(0, 1).contiguous()
    got = torch.vmap(one, in_dims=(1, 1, None))(q, vs, k)
    want = [torch.stack(t) for t in zip(*(one(q[:, i], vs[:, i], k) for i in range(3)))]
    for a, b in zip(got, want):
        assert relative(a, b) <= 1e-12
    cot = cotangents(got)
    for a, b in zip(torch.autograd.grad(got, (q, k), cot), torch.autograd.grad(want, (q, k), cot)):
        assert relative(a, b) <= 1e-10


def test_vmap_of_packed_sequences_convolution_and_norm():
    cu = torch.tensor([0, 2, 6])
    q = random(3, 1, 6, 2, 4, dtype=torch.float64)
    f = lambda q, cu: chunk_gka(q, q, q, cu_seqlens=cu)[0]  # noqa: E731
    got = torch.vmap(f, in_dims=(0, None))(q, cu)
    assert torch.equal(got, torch.stack([f(x, cu) for x in q]))
    with pytest.raises(ValueError, match="cu_seqlens: vmap cannot map over it"):
        torch.vmap(f)(q, cu.expand(3, 3).contiguous())
    for name in ("causal_conv_forward", "gated_rms_norm_forward", "unit_norm_forward"):
        args, kwargs = operator_calls(torch.float64, False)[name]
        op = getattr(ops, name)
        for mapped in range(len(args)):
            batch = [torch.stack([a, 2 * a]) if i == mapped else a for i, a in enumerate(args)]
            dims = tuple(0 if i == mapped else None for i in range(len(args)))
            first = lambda *a: (lambda r: r[0] if isinstance(r, tuple) else r)(op(*a, **kwargs))  # noqa: B023, E731
            got = torch.vmap(first, in_dims=dims)(*batch)
            for i in range(2):
                want = first(*(a[i] if j == mapped else a for j, a in enumerate(batch)))
                assert relative(got[i], want) <= 1e-12, (name, mapped)


def test_vmap_over_a_backward():
    p = problem(T=5)
    named = leaves(p)
    o = chunk_gka(**p)[0]
    cots = torch.stack([c for c in cotangents([o, o])])
    got = torch.autograd.grad(o, named["k"], cots, is_grads_batched=True, retain_graph=True)[0]
    for i in range(2):
        (want,) = torch.autograd.grad(o, named["k"], cots[i], retain_graph=True)
        assert relative(got[i], want) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_without_graph_break_or_recompilation(dtype):
    torch._dynamo.reset()

    def f(q, k, v, g, gk, alpha):
        o, state = chunk_gka(q, k, v, g, gk, alpha, output_final_state=True)
        return o.float() * 2, state

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for T in (64, 77, 100, 128):
        p = problem(T=T, dtype=dtype)
        mine, theirs = dict(p), dict(p)
        a, b = leaves(mine), leaves(theirs)
        got, state = compiled(**mine)
        want, want_state = f(**theirs)
        assert torch.equal(got, want) and torch.equal(state[0], want_state[0])
        for x, y in zip(
            torch.autograd.grad(got.sum() + state[1].sum(), a.values()),
            torch.autograd.grad(want.sum() + want_state[1].sum(), b.values()),
        ):
            # x is saved in one and solved for again in the other if autograd is traced.
            assert relative(x, y) <= 1e-5
        # (Dynamo may start the first compilation over, for its symbolic numbers.)
        if T == 64:
            first = counter.frame_count
        assert counter.frame_count == first, f"T = {T} was compiled anew"


def test_compile_through_inductor():
    torch._dynamo.reset()
    p = problem(T=9, dtype=torch.float32)
    named = leaves(p)
    compiled = torch.compile(lambda **p: chunk_gka(**p)[0].sin(), fullgraph=True)
    want = chunk_gka(**p)[0].sin()
    got = compiled(**p)
    assert relative(got, want) <= 1e-6
    for a, b in zip(
        torch.autograd.grad(got.sum(), named.values()),
        torch.autograd.grad(want.sum(), named.values()),
    ):
        assert relative(a, b) <= 1e-5


def test_export_runs_at_other_lengths():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, g):
            return chunk_gka(q, k, v, g, g, solver="auto")[0]

    p = problem(T=16, dtype=torch.float32, gates=("g",))
    T = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(
        Module(), tuple(p.values()), dynamic_shapes=({1: T},) * 4, strict=False
    )
    p = problem(T=33, dtype=torch.float32, gates=("g",))
    assert torch.equal(program.module()(*p.values()), Module()(*p.values()))


def test_autocast_changes_nothing():
    p = problem(dtype=torch.float32)
    want = chunk_gka(**p)[0], naive_recurrent_gka(**p)[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        got = chunk_gka(**p)[0], naive_recurrent_gka(**p)[0]
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    p = problem(dtype=torch.float32)
    mine, theirs = dict(p), dict(p)
    a, b = leaves(mine), leaves(theirs)
    o, _ = torch.utils.checkpoint.checkpoint(
        lambda *t: chunk_gka(*t), *mine.values(), use_reentrant=use_reentrant
    )
    want, _ = chunk_gka(**theirs)
    assert torch.equal(o, want)
    for x, y in zip(
        torch.autograd.grad(o.sum(), a.values()) if not use_reentrant
        else (o.sum().backward(), [t.grad for t in a.values()])[1],
        torch.autograd.grad(want.sum(), b.values()),
    ):  # fmt: skip
        assert torch.equal(x, y)


def test_deterministic_mode():
    p = problem(T=70, dtype=torch.float32)
    named = leaves(p)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            o, _ = chunk_gka(**p)
            results.append((o, *torch.autograd.grad(o.sum(), named.values())))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_an_input_changed_before_the_backward_is_an_error():
    p = problem(T=5)
    named = leaves(p)
    v = p["v"] * 1
    o, _ = chunk_gka(p["q"], p["k"], v)
    v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(o.sum(), named["q"])
