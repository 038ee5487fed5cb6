"""kalmanet.jax against PyTorch: values and gradients; jit, vmap, grad; the plain version."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import ROOT, problem
from kalmanet.ops import chunk_gka as torch_gka

jax = pytest.importorskip("jax", reason="the extra `jax` is not installed")
import jax.numpy as jnp  # noqa: E402

from jax import export  # noqa: E402

if os.environ.get("KALMANET_TEST_INSTALLED") != "1" and "KALMANET_JAX_LIBRARY" not in os.environ:
    built = sorted(ROOT.glob("build/*/src/jax/libkalmanet_jax.so"), key=lambda p: p.stat().st_mtime)
    if not built:
        pytest.skip("libkalmanet_jax.so is not built: no jaxlib?", allow_module_level=True)
    os.environ["KALMANET_JAX_LIBRARY"] = str(built[-1])

from kalmanet.jax import chunk_gka, chunk_gka_xla, fused_recurrent_gka  # noqa: E402

SHAPES = {
    "all gates": {"T": 70, "K": 12, "V": 7},
    "no gates": {"T": 33, "K": 8, "V": 8, "gates": ()},
    "states, one token": {"T": 1, "K": 9, "V": 4, "states": True},
    "states": {"T": 130, "K": 16, "V": 5, "states": True},
}


def arrays(p):
    """The problem in JAX: a dict of arrays that jax.grad takes."""
    p = dict(p)
    state = p.pop("initial_state", None)
    made = {n: jnp.asarray(t.detach().numpy()) for n, t in p.items()}
    if state is not None:
        made |= dict(zip(("h0", "u0"), (jnp.asarray(t.detach().numpy()) for t in state)))
    return made


def call(f, p, **options):
    p = dict(p)
    if "h0" in p:
        p["initial_state"] = (p.pop("h0"), p.pop("u0"))
    if "ridge" in p:
        p["ridge_ratio"] = p.pop("ridge")
    return f(**p, output_final_state=True, **options)


def off(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("f", [chunk_gka, chunk_gka_xla, fused_recurrent_gka])
def test_values_and_gradients_are_pytorch_s(shape, f):
    p = problem(**SHAPES[shape], dtype=torch.float32)
    p["ridge"] = (
        torch.rand(p["q"].shape[:3], generator=torch.Generator().manual_seed(1)) * 0.05 + 0.01
    )
    mine = arrays(p)
    state = p.pop("initial_state", None)
    named = {n: t.clone().requires_grad_() for n, t in p.items()}
    if state is not None:
        named |= dict(zip(("h0", "u0"), (t.clone().requires_grad_() for t in state)))
    given = dict(named)
    given["ridge_ratio"] = given.pop("ridge")
    if state is not None:
        given["initial_state"] = (given.pop("h0"), given.pop("u0"))
    # 100 steps: converged, so that both gradients are the exact solution's.
    o, s = torch_gka(**given, output_final_state=True, num_iter=100)
    got, got_state = jax.jit(lambda p: call(f, p, num_iter=100))(mine)
    for name, a, b in zip(("o", "h", "u"), (got, *got_state), (o, *s)):
        assert off(a, b.detach()) <= 1e-5, f"{name}, {shape}: {off(a, b.detach()):.1e}"
    gen = torch.Generator().manual_seed(2)
    cot = [torch.randn(t.shape, generator=gen) for t in (o, *s)]
    want = torch.autograd.grad((o, *s), list(named.values()), cot)
    cot = [jnp.asarray(c.numpy()) for c in cot]

    def loss(p):
        o, s = call(f, p, num_iter=100)
        return sum(jnp.sum(a * c) for a, c in zip((o, *s), cot))

    grads = jax.jit(jax.grad(loss))(mine)
    for name, b in zip(named, want):
        assert off(grads[name], b) <= 1e-5, f"d{name}, {shape}: {off(grads[name], b):.1e}"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_plain_version_compiles_for_any_device(platform):
    """Lowered for it, here: no call into the library is in it."""
    p = arrays(problem(**SHAPES["states"], dtype=torch.float32))
    grad = jax.jit(jax.grad(lambda p: jnp.sum(call(chunk_gka_xla, p)[0])))
    exported = export.export(grad, platforms=[platform])(p)
    assert exported.platforms == (platform,) and "custom_call" not in exported.mlir_module()
    # (The other version has such a call.)
    direct = jax.jit(lambda p: call(chunk_gka, p)[0]).lower(p).as_text()
    assert "custom_call @kalmanet" in direct


@pytest.mark.parametrize("f", [chunk_gka, chunk_gka_xla, fused_recurrent_gka])
def test_vmap_equals_a_loop(f):
    p = arrays(problem(T=20, dtype=torch.float32))
    qs = jnp.stack([p["q"], 2 * p["q"], -p["q"]], 1)

    @jax.jit
    def loss(q, k):
        return jnp.sum(f(q, k, p["v"], p["g"], p["g"])[0] ** 2)

    # The library computes each as alone; XLA sums a batch of products in another order.
    bound = 1e-5 if f is chunk_gka_xla else 1e-6
    grads = jax.vmap(jax.grad(loss, (0, 1)), (1, None))(qs, p["k"])
    values = jax.vmap(loss, (1, None))(qs, p["k"])
    for i in range(3):
        assert off(values[i], loss(qs[:, i], p["k"])) <= bound
        for a, b in zip(grads, jax.grad(loss, (0, 1))(qs[:, i], p["k"])):
            assert off(a[i], b) <= bound


def test_packed_sequences():
    p = arrays(problem(B=1, T=20, dtype=torch.float32))
    cu = jnp.asarray([0, 4, 4, 20])
    o, (h, u) = call(chunk_gka, p, cu_seqlens=cu)
    for n, (a, b) in enumerate(((0, 4), (4, 4), (4, 20))):
        if a < b:
            one, (h1, _) = call(chunk_gka, {name: t[:, a:b] for name, t in p.items()})
            assert off(o[:, a:b], one) <= 1e-6 and off(h[n], h1[0]) <= 1e-6
    grad = jax.grad(lambda q: jnp.sum(call(chunk_gka, p | {"q": q}, cu_seqlens=cu)[0]))(p["q"])
    assert grad.shape == p["q"].shape and bool(jnp.isfinite(grad).all())
    many = jax.vmap(lambda q: call(chunk_gka, p | {"q": q}, cu_seqlens=cu)[0])(
        jnp.stack([p["q"]] * 2)
    )
    assert off(many[1], o) <= 1e-6


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 4e-3), ("float16", 5e-4)])
def test_sixteen_bits(dtype, bound):
    p = arrays(problem(T=30, dtype=torch.float32))
    p |= {n: p[n].astype(dtype) for n in "qkv"}
    want, _ = call(chunk_gka, {n: t.astype("float32") for n, t in p.items()})
    for f in (chunk_gka, chunk_gka_xla):
        got, _ = call(f, p)
        assert got.dtype == dtype and off(got.astype("float32"), want) <= bound


def test_nothing_seen_yet_gives_zeros():
    p = arrays(problem(T=9, gates=(), dtype=torch.float32))
    p["k"] = p["k"] * 0
    for f in (chunk_gka, chunk_gka_xla):
        value, grads = jax.value_and_grad(lambda p: jnp.sum(call(f, p)[0]))(p)  # noqa: B023
        assert value == 0
        assert all(bool(jnp.isfinite(g).all()) for g in grads.values()), f.__name__


def test_float64_and_solvers():
    """In a process of its own: float64 is a setting of the whole process in JAX."""
    code = """
import jax, torch
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
from cases import problem
from kalmanet.jax import chunk_gka, chunk_gka_xla
from kalmanet.ops import chunk_gka as torch_gka
p = problem(T=40)
q = {n: jnp.asarray(t.numpy()) for n, t in p.items()}
for solver, tolerance in (("direct", 0.0), ("auto", 1e-9)):
    want = torch_gka(**p, solver=solver, tolerance=tolerance)[0].numpy()
    got = chunk_gka(**q, solver=solver, tolerance=tolerance)[0]
    assert got.dtype == "float64" and abs(got - want).max() < 1e-12
xla = chunk_gka_xla(**q, num_iter=60)[0]
assert abs(xla - torch_gka(**p, num_iter=60)[0].numpy()).max() < 1e-11
"""
    path = os.pathsep.join([str(ROOT / "tests" / "python"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_pytorch_is_not_imported():
    code = "import sys, kalmanet.jax; assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_errors():
    p = arrays(problem(T=5, dtype=torch.float32))
    with pytest.raises(ValueError, match="k: must have q's shape"):
        chunk_gka(p["q"], p["k"][..., :3], p["v"])
    with pytest.raises(ValueError, match="num_iter: is 0"):
        chunk_gka(p["q"], p["k"], p["v"], num_iter=0)
    with pytest.raises(Exception, match="solver: is .newton"):
        jax.block_until_ready(chunk_gka(p["q"], p["k"], p["v"], solver="newton"))
