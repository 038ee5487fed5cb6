"""torch.ops.kalmanet.layer_step against the layer between its projections in float64 PyTorch."""

import math

import pytest
import torch
from operators import SEED, conv_loop, gka_loop, ops, relative
from torch.nn.functional import silu, softplus

SHAPES = {
    "plain": {},
    "gqa, odd sizes": {"H": 4, "heads": (4, 2, 1), "K": 5, "V": 7},
    "gva": {"H": 4, "heads": (2, 2, 4)},
    "one tap": {"W": 1},
    "nothing optional": {"absent": ("gate", "b", "alpha", "a", "ridge", "v_conv")},
    "v as it is, fla norm": {"absent": ("v_conv",), "qk_norm": "fla"},
    "U alone decays, fixed alpha": {
        "absent": ("alpha",),
        "decay_h": False,
        "fixed_alpha": 0.3,
        "scale": 1.0,
    },
    "direct": {"solver": "direct"},
}


class Layer:
    """Weights, states and tokens; `step` is the operator, `want` the same by plain PyTorch."""

    def __init__(self, dtype, B=2, H=2, heads=(2, 2, 2), K=16, V=12, W=4, absent=(), **options):
        self.gen = torch.Generator().manual_seed(SEED)
        self.dtype, self.B, self.H, self.heads, self.K, self.V = dtype, B, H, heads, K, V
        self.absent, self.options = absent, options
        weights = {
            "conv_q_weight": self.normal(heads[0] * K, W) / 2,
            "conv_k_weight": self.normal(heads[1] * K, W) / 2,
            "conv_v_weight": self.normal(heads[2] * V, W) / 2,
            "o_norm": 1 + self.normal(V) / 5,
            "A_log": self.normal(H),
            "dt_bias": self.normal(H) - 3,
        }
        self.weights = {name: t.to(dtype) for name, t in weights.items()}
        sizes = {"h": (H, K, K), "u": (H, K, V)}
        for name, (n, d) in zip("qkv", zip(heads, (K, K, V), strict=True), strict=True):
            sizes["conv_" + name] = (n * d, W)
        state = torch.float64 if dtype == torch.float64 else torch.float32
        self.states = {name: torch.zeros(B, *size, dtype=state) for name, size in sizes.items()}
        if "v_conv" in absent:
            self.weights["conv_v_weight"] = self.states["conv_v"] = None
        if "a" in absent:
            self.weights["A_log"] = self.weights["dt_bias"] = None
        self.plain = {n: None if t is None else t.clone().double() for n, t in self.states.items()}

    def normal(self, *sizes):
        return torch.randn(*sizes, generator=self.gen, dtype=torch.float64)

    def tokens(self, T):
        sizes = {
            "q": (self.heads[0], self.K),
            "k": (self.heads[1], self.K),
            "v": (self.heads[2], self.V),
            "gate": (self.H, self.V),
        }
        sizes |= dict.fromkeys(("b", "alpha", "a", "ridge"), (self.H,))
        made = {n: self.normal(self.B, T, *size).to(self.dtype) for n, size in sizes.items()}
        made["ridge"] -= 4
        return {name: None if name in self.absent else t for name, t in made.items()}

    def step(self, tokens, **options):
        arguments = tokens | self.weights | self.states | self.options | options
        return ops.layer_step(**arguments)

    def want(self, tokens):
        t = {n: None if x is None else x.double() for n, x in tokens.items()}
        w = {n: None if x is None else x.double() for n, x in self.weights.items()}
        B, T = t["q"].shape[:2]
        qkv = {}
        for name in "qkv":
            rows = t[name].reshape(B, T, -1)
            if w[f"conv_{name}_weight"] is not None:
                state, weight = self.plain["conv_" + name], w[f"conv_{name}_weight"]
                rows, self.plain["conv_" + name] = conv_loop(rows, weight, state, True)
            qkv[name] = rows.reshape(t[name].shape)
        fla = self.options.get("qk_norm") == "fla"
        for name in "qk":
            norm = qkv[name].norm(dim=-1, keepdim=True)
            qkv[name] = qkv[name] / ((norm**2 + 1e-6).sqrt() if fla else norm + 1e-6)
        gates = {}
        if t["b"] is not None:
            gates["beta"] = t["b"].sigmoid() + 1e-6
        alpha = self.options.get("fixed_alpha", 1.0)
        fixed = torch.full((B, T, self.H), alpha, dtype=torch.float64)
        gates["alpha"] = fixed if t["alpha"] is None else t["alpha"].sigmoid()
        if t["a"] is not None:
            gates["g"] = -w["A_log"].exp() * softplus(t["a"] + w["dt_bias"])
            if self.options.get("decay_h", True):
                gates["gk"] = gates["g"]
        if t["ridge"] is not None:
            gates["ridge"] = t["ridge"].clamp(math.log(1.2e-4), math.log(0.135)).exp()
        solver = {"solver": self.options.get("solver", "chebyshev")}
        state = {"h0": self.plain["h"], "u0": self.plain["u"]}
        scale = self.options.get("scale")
        o, self.plain["h"], self.plain["u"], residual = gka_loop(
            **qkv, **gates, **state, **solver, scale=scale
        )
        o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w["o_norm"]
        return o if t["gate"] is None else o * silu(t["gate"]), residual


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.bfloat16, 6e-3)]
)
def test_layer_step(shape, dtype, bound):
    layer = Layer(dtype, **SHAPES[shape])
    for T in (5, 1, 3):
        tokens = layer.tokens(T)
        (got, residual), (want, want_residual) = (
            layer.step(tokens, want_residual=True),
            layer.want(tokens),
        )
        assert got.dtype == dtype and got.shape == want.shape
        assert relative(got, want) <= bound, f"o, {shape}: {relative(got, want):.2e} > {bound}"
        limit = 2e-3 if dtype == torch.bfloat16 else 1e-4
        assert (residual.double() - want_residual).abs().max() <= limit, "residual"
        for name, state in layer.states.items():
            if state is not None:
                error = relative(state, layer.plain[name])
                assert error <= min(bound, 2e-5), f"{name}, {shape}: {error:.2e}"
    assert layer.step(layer.tokens(1))[1].numel() == 0


ERRORS = {
    "q of three dimensions": ({"q": lambda t: t["q"][0]}, "q: "),
    "k of another length": ({"k": lambda t: t["k"].repeat(1, 2, 1, 1)}, "k: "),
    "logit of another dtype": ({"alpha": lambda t: t["alpha"].double()}, "alpha: "),
    "NaN in the ridge": ({"ridge": lambda t: t["ridge"] * math.nan}, "ridge: .*NaN"),
    "state of another shape": ({"h": lambda t: t["h"][:1]}, "h: "),
    "state of another dtype": ({"u": lambda t: t["u"].double()}, "u: "),
    "no state of v's convolution": ({"conv_v": None}, "conv_v: "),
    "unknown norm": ({"qk_norm": "l1"}, 'qk_norm: .*"l1"'),
    "unknown solver": ({"solver": "newton"}, 'solver: .*"newton"'),
    "no A_log": ({"A_log": None}, "A_log: "),
    "alpha beyond 1": ({"fixed_alpha": 2.0}, "fixed_alpha: "),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_errors_name_the_argument(mistake):
    changes, message = ERRORS[mistake]
    layer = Layer(torch.float32)
    arguments = layer.tokens(2) | layer.weights | layer.states
    changed = {name: c(arguments) if callable(c) else c for name, c in changes.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.layer_step(**(arguments | changed))
    for name, state in layer.states.items():
        assert not state.any(), f"{name} was written"


def test_schema_holds_when_run():
    layer = Layer(torch.float32)
    arguments = layer.tokens(2) | layer.weights | layer.states
    torch.library.opcheck(ops.layer_step.default, (), arguments, test_utils="test_schema")
