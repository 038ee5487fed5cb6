"""chunk_gka and fused_recurrent_gka against the naive functions: outputs, states, gradients."""

import inspect

import pytest
import torch
from cases import cotangents, leaves, problem, relative, widened
from kalmanet.ops import (
    chunk_gka,
    fused_recurrent_gka,
    naive_recurrent_gka,
    naive_recurrent_gka_chebyshev,
)

# Relative root mean square, of o, of the states, of gradients. The reference computes in float64
# from the same (rounded) inputs, so a 16-bit bound is above all the rounding of the result: half a
# unit in the last place is 2^-9 for bfloat16 (rms of about 1.7e-3), 2^-12 for float16.
BOUNDS = {
    torch.float64: (1e-9, 1e-12, 1e-8),
    torch.float32: (2e-5, 1e-6, 1e-4),
    torch.float16: (5e-4, 1e-6, 1e-3),
    torch.bfloat16: (3e-3, 1e-6, 5e-3),
}
# What Chebyshev's 30 steps leave of the exact gradient at the default ridge of 0.02 (its value is
# compared with the same 30 steps).
TRUNCATION = 2e-3
ALL = ("g", "gk", "alpha")
SUBSETS = [tuple(g for i, g in enumerate(ALL) if n >> i & 1) for n in range(8)]
VALUE_DIMS = {50: 20, 60: 77, 100: 33}
SOLVE = {"solver": "direct", "tolerance": 0.0}
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=lambda d: str(d).removeprefix("torch."))


def must_agree(where, dtype, bounds, mine, theirs, got, want):
    """o, states and the gradients of all leaves: `got` (o, (h, u)) from `mine`."""
    (o, state), (want_o, want_state) = got, want
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    assert o.dtype == dtype and state[0].dtype == state[1].dtype == fine
    o_bound, state_bound, grad_bound = bounds
    error = relative(o, want_o)
    assert error <= o_bound, f"o, {where}, {dtype}: {error:.2e} > {o_bound}"
    for name, a, b in zip(("h_kk", "h_kv"), state, want_state):
        error = relative(a, b)
        assert error <= state_bound, f"{name}, {where}, {dtype}: {error:.2e} > {state_bound}"
    cot = cotangents((want_o, *want_state))
    cot[0] = cot[0].to(dtype).double()  # the same numbers go into both
    grads = torch.autograd.grad((o, *state), list(mine.values()), [
        c.to(t.dtype) for c, t in zip(cot, (o, *state))
    ])  # fmt: skip
    expected = torch.autograd.grad((want_o, *want_state), list(theirs.values()), cot)
    for name, a, b in zip(mine, grads, expected):
        assert a.dtype == mine[name].dtype and a.shape == mine[name].shape
        error = relative(a, b)
        assert error <= grad_bound, f"d{name}, {where}, {dtype}: {error:.2e} > {grad_bound}"


@dtypes
@pytest.mark.parametrize("T", [1, 7, 63, 300, 500])
@pytest.mark.parametrize("K", VALUE_DIMS)
def test_forward_states_and_gradients(K, T, dtype):
    """All gates, an initial state, the exact solution and its gradients."""
    p = problem(B=1, T=T, H=2 if T < 300 else 1, K=K, V=VALUE_DIMS[K], dtype=dtype, states=True)
    reference = widened(p)
    mine, theirs = leaves(p), leaves(reference)
    got = chunk_gka(**p, **SOLVE, output_final_state=True)
    want = naive_recurrent_gka(**reference, output_final_state=True)
    must_agree(f"K {K}, T {T}", dtype, BOUNDS[dtype], mine, theirs, got, want)


@dtypes
@pytest.mark.parametrize("gates", SUBSETS, ids=lambda gates: "+".join(gates) or "none")
def test_every_set_of_gates(gates, dtype):
    p = problem(B=2, T=63, H=1, K=50, V=20, dtype=dtype, gates=gates)
    reference = widened(p)
    mine, theirs = leaves(p), leaves(reference)
    got = chunk_gka(**p, **SOLVE, output_final_state=True)
    want = naive_recurrent_gka(**reference, output_final_state=True)
    must_agree(f"gates {gates}", dtype, BOUNDS[dtype], mine, theirs, got, want)


@dtypes
@pytest.mark.parametrize("T", [1, 63, 300])
def test_the_defaults(T, dtype):
    """Chebyshev with 30 steps: the same iteration in o, the exact solution in the gradients."""
    p = problem(B=1, T=T, H=1, K=60, V=77, dtype=dtype, states=True)
    reference = widened(p)
    mine, theirs = leaves(p), leaves(reference)
    o, state = chunk_gka(**p, output_final_state=True)
    want, _ = naive_recurrent_gka_chebyshev(**reference)
    error = relative(o, want)
    assert error <= BOUNDS[dtype][0], f"o, T {T}, {dtype}: {error:.2e} > {BOUNDS[dtype][0]}"
    exact = naive_recurrent_gka(**reference, output_final_state=True)
    o_bound, state_bound, grad_bound = BOUNDS[dtype]
    bounds = (o_bound + TRUNCATION, state_bound, grad_bound + TRUNCATION)
    must_agree(f"defaults, T {T}", dtype, bounds, mine, theirs, (o, state), exact)


@dtypes
def test_packed_sequences_against_the_definition(dtype):
    cuts = [0, 7, 7, 8, 71, 134]
    p = problem(B=1, T=cuts[-1], H=1, K=50, V=20, N=5, dtype=dtype, states=True)
    reference = widened(p)
    mine, theirs = leaves(p), leaves(reference)
    got = chunk_gka(**p, **SOLVE, cu_seqlens=torch.tensor(cuts), output_final_state=True)
    h0, u0 = reference.pop("initial_state")
    outs, states = [], []
    for n, (begin, end) in enumerate(zip(cuts, cuts[1:])):
        before = (h0[n : n + 1], u0[n : n + 1])
        if begin == end:
            states.append(before)
            continue
        o, state = naive_recurrent_gka(
            **{name: t[:, begin:end] for name, t in reference.items()},
            initial_state=before, output_final_state=True,
        )  # fmt: skip
        outs.append(o)
        states.append(state)
    want = torch.cat(outs, 1), tuple(torch.cat(s) for s in zip(*states))
    must_agree("packed", dtype, BOUNDS[dtype], mine, theirs, got, want)


@dtypes
@pytest.mark.parametrize("cuts", [(100, 200, 300), (1, 64, 71, 300)], ids=str)
def test_chained_states_carry_gradients(cuts, dtype):
    """Calls that hand their states on, against one call of the definition."""
    p = problem(B=1, T=300, H=1, K=50, V=20, dtype=dtype, states=True)
    reference = widened(p)
    mine, theirs = leaves(p), leaves(reference)
    state, begin, outs = p.pop("initial_state"), 0, []
    for end in cuts:
        o, state = chunk_gka(
            **{name: t[:, begin:end] for name, t in p.items()}, **SOLVE,
            initial_state=state, output_final_state=True,
        )  # fmt: skip
        outs.append(o)
        begin = end
    want = naive_recurrent_gka(**reference, output_final_state=True)
    got = torch.cat(outs, 1), state
    must_agree(f"cut at {cuts}", dtype, BOUNDS[dtype], mine, theirs, got, want)


@pytest.mark.parametrize("num_iter", [1, 5, 30])
def test_chebyshev_is_the_published_iteration(num_iter):
    p = problem(T=70, states=True)
    o, state = chunk_gka(**p, num_iter=num_iter, output_final_state=True)
    want, want_state = naive_recurrent_gka_chebyshev(
        **p, num_iter=num_iter, output_final_state=True
    )
    assert relative(o, want) <= 1e-9
    assert all(relative(a, b) <= 1e-12 for a, b in zip(state, want_state))


@pytest.mark.parametrize(
    "solver",
    [
        "chebyshev",
        "direct",
        pytest.param("cg", marks=pytest.mark.cpu_only("the solver cg")),
        "auto",
    ],
)
def test_every_solver_meets_the_exact_one(solver):
    p = problem(dtype=torch.float32)
    want, _ = naive_recurrent_gka(**widened(p))
    steps = {"num_iter": 60} if solver == "cg" else {"num_iter": "auto"}
    o, state, residual = chunk_gka(**p, solver=solver, **steps, return_residual=True)
    assert state is None and relative(o, want) <= 1e-4
    assert residual.shape == o.shape[:3] and residual.dtype == torch.float32
    assert not residual.requires_grad and residual.max() <= 1e-3


def test_ridge_ratio_of_each_token_has_a_gradient():
    p = problem(T=21)
    ridge = (torch.rand(2, 21, 2, generator=torch.Generator().manual_seed(3)) * 0.1 + 0.01).double()
    mine, theirs = ridge.clone().requires_grad_(), ridge.clone().requires_grad_()
    o, _ = chunk_gka(**p, ridge_ratio=mine, **SOLVE)
    want, _ = naive_recurrent_gka(**p, ridge_ratio=theirs)
    assert relative(o, want) <= 1e-9
    cot = cotangents((want,))
    (got,) = torch.autograd.grad(o, mine, cot)
    (expected,) = torch.autograd.grad(want, theirs, cot)
    assert relative(got, expected) <= 1e-8
    one = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    chunk_gka(**p, ridge_ratio=one, **SOLVE)[0].backward(cot[0])
    other = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    naive_recurrent_gka(**p, ridge_ratio=other)[0].backward(cot[0])
    assert relative(one.grad, other.grad) <= 1e-8


def test_the_same_tensor_for_both_decays():
    p = problem(gates=("g",))
    g = p.pop("g").requires_grad_()
    separate = [g.detach().clone().requires_grad_() for _ in range(2)]
    (together,) = torch.autograd.grad(chunk_gka(**p, g=g, gk=g)[0].square().sum(), g)
    apart = torch.autograd.grad(
        chunk_gka(**p, g=separate[0], gk=separate[1])[0].square().sum(), separate
    )
    assert relative(together, apart[0] + apart[1]) <= 1e-12


def test_packed_sequences_equal_separate_ones():
    cu = torch.tensor([0, 3, 3, 4, 37])
    p = problem(B=1, N=4, states=True)
    mine, theirs = p, dict(p)
    a, b = leaves(mine), leaves(theirs)
    o, (h, u) = chunk_gka(**mine, cu_seqlens=cu, output_final_state=True)
    again = chunk_gka(**mine, cu_seqlens=None, cu_seqlens_cpu=cu, output_final_state=True)
    assert torch.equal(again[0], o)
    parts = []
    for n in range(4):
        begin, end = cu[n].item(), cu[n + 1].item()
        one = {
            name: tuple(x[n : n + 1] for x in t) if isinstance(t, tuple) else t[:, begin:end]
            for name, t in theirs.items()
        }
        parts.append(
            chunk_gka(**one, output_final_state=True)
            if end > begin
            else (one["v"], one["initial_state"])
        )
    want = torch.cat([part[0] for part in parts], 1)
    want_state = [torch.cat([part[1][i] for part in parts]) for i in range(2)]
    assert relative(o, want) <= 1e-12
    assert relative(h, want_state[0]) <= 1e-12 and relative(u, want_state[1]) <= 1e-12
    cot = cotangents((o, h, u))
    got = torch.autograd.grad((o, h, u), list(a.values()), cot)
    expected = torch.autograd.grad((want, *want_state), list(b.values()), cot)
    for name, x, y in zip(a, got, expected):
        assert relative(x, y) <= 1e-10, name


@pytest.mark.parametrize("step", [1, 8, 9])
def test_chained_calls_equal_one(step):
    p = problem(T=36, dtype=torch.float32)
    want, want_state = chunk_gka(**p, output_final_state=True)
    state, outs = None, []
    for t in range(0, 36, step):
        now = {name: x[:, t : t + step] for name, x in p.items()}
        before = None if state is None else [x.clone() for x in state]
        o, new = fused_recurrent_gka(**now, initial_state=state, output_final_state=True)
        if state is not None:
            assert all(torch.equal(a, b) for a, b in zip(state, before)), "state written to"
        state = new
        outs.append(o)
    assert relative(torch.cat(outs, 1), want) <= 2e-5
    assert all(relative(a, b) <= 1e-6 for a, b in zip(state, want_state))


def test_the_recurrent_function_has_a_backward():
    p = problem(T=5)
    mine, theirs = dict(p), dict(p)
    a, b = leaves(mine), leaves(theirs)
    got = torch.autograd.grad(fused_recurrent_gka(**mine, **SOLVE)[0].square().sum(), a.values())
    want = torch.autograd.grad(naive_recurrent_gka(**theirs)[0].square().sum(), b.values())
    for name, x, y in zip(a, got, want):
        assert relative(x, y) <= 1e-8, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K, V", [(1, 1), (8, 3)])
def test_sixteen_bits_have_no_smallest_size(dtype, K, V):
    p = problem(K=K, V=V, dtype=dtype)
    reference = widened(p)
    mine, theirs = leaves(p), leaves(reference)
    got = torch.autograd.grad(chunk_gka(**p, **SOLVE)[0].float().sum(), mine.values())
    want = torch.autograd.grad(naive_recurrent_gka(**reference)[0].sum(), theirs.values())
    for name, a, b in zip(mine, got, want):
        assert (a.double() - b).norm() <= 0.01 * b.norm() + 1e-6, name


def test_nothing_seen_yet_gives_zeros():
    p = problem(T=9, gates=())
    p["k"] = p["k"] * 0
    for f in (chunk_gka, fused_recurrent_gka, naive_recurrent_gka, naive_recurrent_gka_chebyshev):
        mine = dict(p)
        named = leaves(mine)
        o, _ = f(**mine)
        assert torch.equal(o, torch.zeros_like(o)), f.__name__
        for name, grad in zip(named, torch.autograd.grad(o.sum(), named.values())):
            assert grad.isfinite().all(), f"d{name} of {f.__name__}"


def test_mixed_dtypes_take_the_wider_and_return_v_s():
    p = problem(dtype=torch.float32)
    want, _ = chunk_gka(**p)
    p["v"] = p["v"].bfloat16()
    p["g"] = p["g"].bfloat16()
    o, _ = chunk_gka(**p)
    assert o.dtype == torch.bfloat16 and relative(o, want) <= 1e-2


def test_any_strides():
    p = problem(dtype=torch.float32)
    want, _ = chunk_gka(**p)
    odd = {n: torch.stack([t, t], -1).transpose(0, 1).transpose(0, 1)[..., 0] for n, t in p.items()}
    assert not odd["q"].is_contiguous()
    assert torch.equal(chunk_gka(**odd)[0], want)


def test_bp_lambda_false_holds_the_norm_constant():
    p = problem(T=6, gates=())
    named = leaves(p)
    with_norm = torch.autograd.grad(chunk_gka(**p, **SOLVE)[0].sum(), named["k"])[0]
    without = torch.autograd.grad(chunk_gka(**p, **SOLVE, bp_lambda=False)[0].sum(), named["k"])[0]
    k = p["k"]
    # lambda as a number that autograd does not see.
    h = torch.einsum("bthi,bthj->bthij", k, k).cumsum(1)
    f = h.detach().square().sum((-2, -1)).sqrt()
    x = torch.linalg.solve(
        h + 0.02 * f[..., None, None] * torch.eye(16, dtype=torch.float64), p["q"]
    )
    u = torch.einsum("bthi,bthj->bthij", k, p["v"]).cumsum(1)
    o = torch.einsum("bthij,bthi->bthj", u, x) * 16**-0.5
    (want,) = torch.autograd.grad(o.sum(), k)
    assert relative(without, want) <= 1e-8 and relative(with_norm, want) > 1e-4


PUBLISHED = {
    "q": ..., "k": ..., "v": ..., "g": None, "gk": None, "alpha": None, "scale": None,
    "ridge_ratio": 0.02, "num_iter": 30, "initial_state": None, "output_final_state": False,
    "cu_seqlens": None, "cu_seqlens_cpu": None,
}  # fmt: skip


@pytest.mark.parametrize("f, without", [
    (chunk_gka, ()),
    (fused_recurrent_gka, ("cu_seqlens_cpu",)),
    (naive_recurrent_gka, ("num_iter", "cu_seqlens", "cu_seqlens_cpu")),
])  # fmt: skip
def test_the_published_signatures(f, without):
    """Names, order and defaults; ours follow by keyword."""
    want = {n: d for n, d in PUBLISHED.items() if n not in without}
    ours = inspect.signature(f).parameters
    assert list(ours)[: len(want)] == list(want)
    for name, default in want.items():
        got = ours[name].default
        assert got is inspect.Parameter.empty if default is ... else got == default, name
    rest = list(ours.values())[len(want) :]
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in rest)


def test_the_naive_iteration_s_signature():
    ours = inspect.signature(naive_recurrent_gka_chebyshev).parameters
    exact = inspect.signature(naive_recurrent_gka).parameters
    assert list(ours) == [*exact, "num_iter"] and ours["num_iter"].default == 30
