"""Gated KalmaNet in JAX: learn the decay and the ridge that make a memory answer best."""

import jax.numpy as jnp
from kalmanet.jax import chunk_gka

import jax

key = jax.random.key(0)
k = jax.random.normal(key, (1, 64, 1, 16))
k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
v = jax.random.normal(jax.random.key(1), (1, 64, 1, 16))


@jax.jit
def loss(p):
    """Each of the last 32 queries asks for the value of 8 tokens ago."""
    g = jnp.full((1, 64, 1), -jnp.exp(p["decay"]))
    ridge = jnp.full((1, 64, 1), jnp.exp(p["ridge"]))
    q = jnp.roll(k, 8, 1)
    o, _ = chunk_gka(q, k, v, g, g, ridge_ratio=ridge, scale=1.0, solver="direct")
    return jnp.mean((o - jnp.roll(v, 8, 1))[:, 32:] ** 2)


p = {"decay": jnp.asarray(-1.0), "ridge": jnp.asarray(-2.0)}
print(f"loss {loss(p):.4f}")
for _ in range(300):
    p = jax.tree.map(lambda x, g: x - 0.3 * g, p, jax.grad(loss)(p))
print(f"loss {loss(p):.4f}, memory of {jnp.exp(-p['decay']):.0f} tokens, {jnp.exp(p['ridge']):.4f}")
