"""The layer once more, from its description, in plain PyTorch and the dtype of its weights: what
the package's layer is held against. It reads any of its state dicts."""

import torch
import torch.nn.functional as F
from kalmanet.ops import naive_recurrent_gka, naive_recurrent_gka_chebyshev


def causal_conv(x, weight):
    W = weight.shape[-1]
    y = F.conv1d(F.pad(x.transpose(1, 2), (W - 1, 0)), weight, groups=x.shape[2])
    return F.silu(y.transpose(1, 2))


def expand(t, sd, letter, heads, H):
    by_head = t.unflatten(-1, (heads, -1))
    if f"{letter}_rep" in sd:
        residual = torch.einsum("eh,bthd->bted", sd[f"{letter}_rep"], by_head)
    else:
        residual = by_head.repeat_interleave(H // heads, 2)
    if heads == H and f"{letter}_rep" not in sd and f"proj_{letter}.linearA.weight" not in sd:
        return residual
    if f"proj_{letter}.linearA.weight" in sd:
        a, b = sd[f"proj_{letter}.linearA.weight"], sd[f"proj_{letter}.linearB.weight"]
        residual = residual + F.linear(F.silu(F.linear(t, a)), b).unflatten(-1, (H, -1))
    return residual


def layer(
    x, sd, heads, K, qk_norm="official", rescale=True, ridge_ratio=0.02, num_iter=30, decay_h=True,
    fixed_alpha=None,
):  # fmt: skip
    """x [B,T,D] through the layer with the state dict `sd`. heads: of q, k, v."""
    H = max(heads)
    linear = lambda name: F.linear(x, sd[f"{name}.weight"], sd.get(f"{name}.bias"))  # noqa: E731
    q, k = (causal_conv(linear(f"{n}_proj"), sd[f"{n}_conv1d.weight"]) for n in "qk")
    v = linear("v_proj")
    if "v_conv1d.weight" in sd:
        v = causal_conv(v, sd["v_conv1d.weight"])
    q = q.unflatten(-1, (heads[0], K)).repeat_interleave(H // heads[0], 2)
    k, v = expand(k, sd, "k", heads[1], H), expand(v, sd, "v", heads[2], H)

    def unit(t):
        if qk_norm == "fla":
            return t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        return t / (t.norm(dim=-1, keepdim=True) + 1e-6)

    q, k = unit(q), unit(k)
    if "b_proj.weight" in sd:
        beta = (linear("b_proj").sigmoid() + 1e-6).unsqueeze(-1)
        k, v = beta * k, beta * v
    alpha = linear("alpha_proj").sigmoid() if "alpha_proj.weight" in sd else None
    if fixed_alpha is not None:
        alpha = torch.full_like(q[..., 0], fixed_alpha)
    g = None
    if "a_proj.weight" in sd:
        g = -sd["A_log"].exp() * F.softplus(linear("a_proj") + sd["dt_bias"])
    if "ridge_proj.weight" in sd:
        bounds = torch.tensor([1.2e-4, 0.135]).log().tolist()
        ridge_ratio = linear("ridge_proj").clamp(*bounds).exp()
        solve, options = naive_recurrent_gka, {}
    else:
        solve, options = naive_recurrent_gka_chebyshev, {"num_iter": num_iter}
    o, _ = solve(
        q, k, v, g, g if decay_h else None, alpha, None if rescale else 1.0, ridge_ratio, **options
    )
    o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * sd["o_norm.weight"]
    if "g_proj.weight" in sd:
        o = o * F.silu(linear("g_proj").unflatten(-1, (H, -1)))
    return F.linear(o.flatten(2), sd["o_proj.weight"])


def rms(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def attention(x, sd, heads, kv_heads, D, theta, eps):
    T = x.shape[1]
    linear = lambda n: F.linear(x, sd[f"{n}_proj.weight"], sd.get(f"{n}_proj.bias"))  # noqa: E731
    q, k, v = (linear(n).unflatten(-1, (-1, D)) for n in "qkv")
    q, k = rms(q, sd["q_norm.weight"], eps), rms(k, sd["k_norm.weight"], eps)
    angle = torch.outer(
        torch.arange(T, dtype=torch.float64),
        theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D),
    )
    z = torch.polar(torch.ones_like(angle), angle)[:, None]

    def turn(t):  # pairs (i, i + D/2) as complex numbers
        a, b = t.double().chunk(2, -1)
        turned = torch.complex(a, b) * z
        return torch.cat([turned.real, turned.imag], -1).to(t.dtype)

    q, k = turn(q), turn(k)
    k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
    return F.linear(o, sd["o_proj.weight"], sd.get("o_proj.bias"))


def language_model(ids, sd, config):
    """Logits [B,T,vocab] of a checkpoint `sd` (names as on disk) and its config.json, a dict."""
    eps, D = config["rms_norm_eps"], config["head_dim"]
    Hq, Hk = config["num_attention_heads"], config["num_key_value_heads"]
    gka = config.get("gka_config", {})
    x = sd["model.embed_tokens.weight"][ids]
    for i, kind in enumerate(config["hybrid_override_pattern"].split("-")):
        prefix = f"model.layers.{i}."
        here = {n[len(prefix) :]: t for n, t in sd.items() if n.startswith(prefix)}
        part = lambda p: {n[len(p) :]: t for n, t in here.items() if n.startswith(p)}  # noqa: B023, E731
        y = rms(x, here["input_layernorm.weight"], eps)
        if kind == "GKA":
            heads = (Hq, Hk, Hk)
            told = {
                "ridge_ratio": gka.get("ridge_strength", 0.02),
                "num_iter": gka.get("num_iter", 30),
            }
            x = x + layer(y, part("gka."), heads, D, **told)
        else:
            theta = config["rope_parameters"]["rope_theta"]
            x = x + attention(y, part("self_attn."), Hq, Hk, D, theta, eps)
        y = rms(x, here["post_attention_layernorm.weight"], eps)
        mlp = part("mlp.")
        gated = F.silu(F.linear(y, mlp["gate_proj.weight"])) * F.linear(y, mlp["up_proj.weight"])
        x = x + F.linear(gated, mlp["down_proj.weight"])
    x = rms(x, sd["model.norm.weight"], eps)
    return F.linear(x, sd.get("lm_head.weight", sd["model.embed_tokens.weight"]))
