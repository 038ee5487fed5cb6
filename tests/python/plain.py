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
