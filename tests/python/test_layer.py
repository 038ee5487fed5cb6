"""GatedKalmaNet against a plain PyTorch layer, in every setting; caches, padding, packing."""

import collections
import copy
import inspect
import re

import pytest
import torch
from cases import DEVICE, SEED, relative
from kalmanet import GatedKalmaNet, State
from plain import layer as plain_layer
from torch._dynamo.testing import CompileCounterWithBackend

SMALL = {"hidden_size": 24, "head_dim": 6, "num_heads": 4}
# Settings of the layer, and what the plain one needs to be told.
SETTINGS = {
    "plain": ({}, {}),
    "gqa": ({"num_kv_heads": 2}, {}),
    "gva": ({"num_heads": 2, "num_v_heads": 4}, {}),
    "official names": ({"num_heads": None, "num_q_heads": 4, "num_k_heads": 2, "num_v_heads": 1,
                        "ridge_strength": 0.05, "solver_type": "chebyshev"}, {"ridge_ratio": 0.05}),
    "expand_v": ({"expand_v": 1.5}, {}),
    "no beta, no alpha": ({"use_beta_gate": False, "use_alpha_connection": False}, {}),
    "no v convolution": ({"use_v_conv": False, "conv_size": 2}, {}),
    "no decay": ({"use_forgetting_gate": False}, {}),
    "decay of U only": ({"use_forgetting_gate_kk": False}, {"decay_h": False}),
    "no output gate, no rescale": ({"use_gate": False, "gla_rescale": False}, {"rescale": False}),
    "few steps": ({"num_iter": 3, "mode": "fused_recurrent"}, {"num_iter": 3}),
    "fla's norm": ({"qk_norm": "fla"}, {"qk_norm": "fla"}),
    "learned ridge": ({"learned_ridge": True, "solver": "direct", "tolerance": 0.0}, {}),
    "fixed alpha": ({"fixed_alpha": 0.25}, {"fixed_alpha": 0.25}),
    "linear attention": ({"fixed_alpha": 0.0}, {"fixed_alpha": 0.0}),
    "low rank": ({"num_kv_heads": 2, "kv_proj_rank": 3}, {}),
    "low rank, mixed": ({"num_k_heads": 2, "num_v_heads": 1, "kv_proj_rank": 3,
                         "kv_learnable_residual": True}, {}),
}  # fmt: skip


def make(settings, dtype=torch.float64):
    torch.manual_seed(SEED)
    layer = GatedKalmaNet(**SMALL | settings, device=DEVICE)
    with torch.no_grad():  # nothing stays at a special value
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return layer.to(dtype)


def tokens(B=2, T=11, dtype=torch.float64):
    gen = torch.Generator().manual_seed(SEED + 2)
    return torch.randn(B, T, 24, generator=gen, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_plain_layer(name):
    settings, told = SETTINGS[name]
    layer = make(settings)
    o = layer.options
    x = tokens().requires_grad_()
    got, none, cache = layer(x)
    assert none is None and cache is None and got.shape == x.shape
    sd = {n: p for n, p in layer.named_parameters()}
    want = plain_layer(x, sd, (o.num_heads, o.num_k_heads, o.num_v_heads), 6, **told)
    assert relative(got, want) <= 1e-9, f"{name}: {relative(got, want):.1e}"
    # Gradients of the exact solution, which enough steps of the plain iteration meet.
    exact = make(settings | ({} if o.learned_ridge else {"num_iter": 200}))
    x2 = tokens().requires_grad_()
    out = exact(x2)[0]
    sd = {n: p for n, p in exact.named_parameters()}
    want = plain_layer(
        x2, sd, (o.num_heads, o.num_k_heads, o.num_v_heads), 6, **told | {"num_iter": 200}
    )
    cot = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    named = {"x": x2, **sd}
    ours = torch.autograd.grad(out, named.values(), cot, allow_unused=True)
    theirs = torch.autograd.grad(want, named.values(), cot, allow_unused=True)
    for parameter, a, b in zip(named, ours, theirs):
        assert (a is None) == (b is None), parameter
        if b is not None and b.norm() > 1e-12:
            assert relative(a, b) <= 1e-6, f"{name}: d{parameter} {relative(a, b):.1e}"


def test_parameter_names_are_the_checkpoint_s():
    names = set(GatedKalmaNet(**SMALL).state_dict())
    linear = {f"{n}_proj.weight" for n in ("q", "k", "v", "g", "o", "a", "b", "alpha")}
    assert names == linear | {
        "b_proj.bias", "alpha_proj.bias", "A_log", "dt_bias", "q_conv1d.weight", "k_conv1d.weight",
        "v_conv1d.weight", "o_norm.weight",
    }  # fmt: skip
    more = GatedKalmaNet(**SMALL, num_kv_heads=2, kv_proj_rank=3, kv_learnable_residual=True)
    shapes = {n: tuple(t.shape) for n, t in more.state_dict().items() if n not in names}
    assert shapes == {
        "proj_k.linearA.weight": (3, 12), "proj_k.linearB.weight": (24, 3),
        "proj_v.linearA.weight": (3, 12), "proj_v.linearB.weight": (24, 3),
        "k_rep": (4, 2), "v_rep": (4, 2),
    }  # fmt: skip
    assert more.q_conv1d.weight.shape == (24, 1, 4) and more.A_log.shape == (4,)
    assert sorted(more.no_weight_decay()) == [
        "A_log", "alpha_proj.bias", "b_proj.bias", "dt_bias", "o_norm.weight",
    ]  # fmt: skip


def test_the_expansion_starts_as_a_repeat():
    torch.manual_seed(1)
    repeat = GatedKalmaNet(**SMALL, num_kv_heads=2, device=DEVICE).double()
    for residual in (False, True):
        expanded = GatedKalmaNet(
            **SMALL, num_kv_heads=2, kv_proj_rank=3, kv_learnable_residual=residual, device=DEVICE
        ).double()
        expanded.load_state_dict(repeat.state_dict(), strict=False)
        assert relative(expanded(tokens())[0], repeat(tokens())[0]) <= 1e-12


def test_official_parameters_of_a_gate_that_is_off_are_left_alone():
    off = GatedKalmaNet(**SMALL, use_forgetting_gate=False)
    off.load_state_dict(off.state_dict() | {
        "A_log": torch.zeros(4), "dt_bias": torch.zeros(4), "a_proj.weight": torch.zeros(4, 24)
    })  # fmt: skip


def test_the_published_arguments():
    """flash-linear-attention's in their order, with their defaults; the official ones by name."""
    theirs = {
        "hidden_size": 2048, "expand_v": 1.0, "head_dim": 128, "num_heads": 16,
        "num_v_heads": None, "num_kv_heads": None, "mode": "chunk", "use_beta_gate": True,
        "use_alpha_connection": True, "use_v_conv": True, "use_forgetting_gate": True,
        "use_forgetting_gate_kk": True, "gla_rescale": True, "ridge_ratio": 0.02, "num_iter": 30,
        "use_gate": True, "conv_size": 4, "layer_idx": None, "norm_eps": 1e-6,
    }  # fmt: skip
    ours = inspect.signature(GatedKalmaNet).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    two_names = ("num_heads", "ridge_ratio")  # None stands for their default
    for name, value in theirs.items():
        assert ours[name].default == (None if name in two_names else value), name
    with torch.device("meta"):
        layer = GatedKalmaNet()
    o = layer.options
    assert (o.num_heads, o.num_k_heads, o.num_v_heads, o.ridge_ratio) == (16, 16, 16, 0.02)
    assert (o.head_dim, o.value_dim, o.solver) == (128, 128, "chebyshev")
    forward = inspect.signature(layer.forward).parameters
    wanted = ("hidden_states", "attention_mask", "past_key_values", "use_cache")
    assert list(forward)[:5] == [*wanted, "output_attentions"] and "cu_seqlens" in forward
    official = {
        "hidden_size": 24, "head_dim": 6, "num_q_heads": 4, "num_k_heads": 2, "num_v_heads": 2,
        "use_beta_gate": True, "use_alpha_connection": True, "use_v_conv": True,
        "use_forgetting_gate": True, "use_forgetting_gate_kk": True, "gla_rescale": True,
        "solver_type": "chebyshev", "bp_lambda": True, "num_iter": 30, "ridge_strength": 0.02,
        "use_gate": True, "conv_size": 4, "layer_idx": 3, "norm_eps": 1e-6, "chunk_size": 64,
        "kv_proj_rank": 2, "kv_learnable_residual": True,
    }  # fmt: skip
    layer = GatedKalmaNet(**official)
    o = layer.options
    assert (o.num_heads, o.num_k_heads, o.num_v_heads, layer.layer_idx) == (4, 2, 2, 3)
    assert (o.solver, o.ridge_ratio, o.chunk_size, o.kv_proj_rank) == ("chebyshev", 0.02, 64, 2)


@pytest.mark.parametrize("first", [*range(1, 10), 63, 64, 65, 69])
def test_prefill_of_any_length(first):
    """Around the chunk sizes, the step's limit and the convolution's reach."""
    layer, T = make({}, torch.float32), 70
    x = tokens(T=T, dtype=torch.float32)
    with torch.no_grad():
        want = layer(x)[0]
        got, _, state = layer(x[:, :first], use_cache=True)
        outs = [got]
        for t in range(first, T):
            outs.append(layer(x[:, t : t + 1], past_key_values=state, use_cache=True)[0])
    assert relative(torch.cat(outs, 1), want) <= 1e-5


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_prefill_and_tokens_equal_one_pass(name, grad):
    layer = make(SETTINGS[name][0], torch.float32)
    x = tokens(dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        want, _, whole = layer(x, use_cache=True)
        state, outs = State(), []
        for begin, end in ((0, 6), (6, 7), (7, 8), (8, 11)):
            o, _, state = layer(x[:, begin:end], past_key_values=state, use_cache=True)
            outs.append(o)
    assert relative(torch.cat(outs, 1), want) <= 1e-5
    assert state.get_seq_length() == whole.get_seq_length() == 11
    a, b = state[0], whole[0]
    for x, y in zip(a["recurrent_state"], b["recurrent_state"]):
        assert relative(x, y) <= 1e-5
    for x, y in zip(a["conv_state"], b["conv_state"]):
        assert y is None or relative(x, y) <= 1e-5


class FlaCache:
    """flash-linear-attention's cache, as far as its layers use it."""

    def __init__(self, with_layers):
        self.states = []
        self.seen = 0
        if with_layers:
            self.layers = self.Layers(self)

    class Layers:
        def __init__(self, cache):
            self.cache = cache

        def __getitem__(self, i):
            return type("Layer", (), {"state": self.cache.states[i]})

    def __len__(self):
        return len(self.states)

    def __getitem__(self, i):
        return self.states[i]

    def update(self, recurrent_state=None, conv_state=None, layer_idx=0, offset=1):
        self.seen += offset
        state = {"recurrent_state": recurrent_state, "conv_state": conv_state}
        self.states[layer_idx : layer_idx + 1] = [state]


@pytest.mark.parametrize("with_layers", [False, True])
def test_the_cache_of_flash_linear_attention(with_layers):
    layer = make({"layer_idx": 0}, torch.float32)
    x = tokens(dtype=torch.float32)
    cache = FlaCache(with_layers)
    with torch.no_grad():
        want = layer(x)[0]
        first, _, returned = layer(x[:, :5], past_key_values=cache, use_cache=True)
        assert returned is cache and cache.seen == 5
        kept = [t.clone() for t in cache[0]["recurrent_state"]]
        held = cache[0]["recurrent_state"]
        second, _, _ = layer(x[:, 5:], past_key_values=cache, use_cache=True)
    assert relative(torch.cat([first, second], 1), want) <= 1e-5 and cache.seen == 11
    assert all(torch.equal(a, b) for a, b in zip(kept, held)), "another cache's tensors written to"
    assert cache[0]["conv_state"][0].shape == (2, 24, 4)


@pytest.mark.parametrize("side", ["left", "right", "both", "hole"])
def test_padding(side):
    layer = make({}, torch.float32)
    B, T = 3, 12
    x = tokens(B, T, torch.float32)
    mask = torch.ones(B, T, dtype=torch.int64)
    if side in ("left", "both"):
        mask[0, :5] = 0
    if side in ("right", "both"):
        mask[1, 7:] = 0
    if side == "hole":
        mask[2, 3:6] = 0
    if side == "both":
        mask[2] = 0  # nothing at all
    with torch.no_grad():
        got, _, state = layer(x, attention_mask=mask, use_cache=True)
        new = tokens(B, 1, torch.float32) + 1
        after, _, state = layer(
            new, attention_mask=torch.cat([mask, torch.ones(B, 1)], 1), past_key_values=state,
            use_cache=True,
        )  # fmt: skip
        for b in range(B):
            alone = x[b : b + 1, mask[b].bool()]
            own = State()
            if alone.shape[1]:
                want, _, own = layer(alone, past_key_values=own, use_cache=True)
                assert relative(got[b : b + 1, mask[b].bool()], want) <= 1e-5, f"sequence {b}"
            want, _, _ = layer(new[b : b + 1], past_key_values=own, use_cache=True)
            assert relative(after[b : b + 1], want) <= 1e-5, f"sequence {b}, next token"
    assert torch.equal(got[mask == 0], torch.zeros(int((mask == 0).sum()), 24))


def test_packed_sequences_and_their_states():
    layer = make({}, torch.float32)
    cu = torch.tensor([0, 4, 4, 11])
    x = tokens(1, 11, torch.float32)
    with torch.no_grad():
        got, _, state = layer(x, cu_seqlens=cu, use_cache=True)
        for n, (begin, end) in enumerate(((0, 4), (4, 11))):
            want, _, own = layer(x[:, begin:end], use_cache=True)
            assert relative(got[:, begin:end], want) <= 1e-5
            at = 0 if n == 0 else 2
            assert (
                relative(state[0]["recurrent_state"][0][at], own[0]["recurrent_state"][0][0])
                <= 1e-5
            )
        assert torch.equal(state[0]["recurrent_state"][0][1], torch.zeros(4, 6, 6))


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_sixteen_bits_and_autocast(dtype, bound):
    layer = make({}, torch.float32)
    x = tokens(dtype=torch.float32)
    want = layer(x)[0]
    with torch.autocast(DEVICE, dtype):
        got, _, state = layer(x, use_cache=True)
    assert got.dtype == dtype and relative(got, want) <= bound
    assert state[0]["recurrent_state"][0].dtype == torch.float32
    half = make({}, dtype)
    assert relative(half(x.to(dtype))[0], want) <= 2 * bound


def same_results(layer, compiled, T):
    """Output, and gradients of x and of every parameter."""
    x = tokens(T=T, dtype=torch.float32)
    named = [*layer.parameters()]
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = compiled(a)[0], layer(b)[0]
    assert relative(got, want) <= 1e-6, f"T = {T}"
    for g, w in zip(*(torch.autograd.grad(o.sum(), [t, *named]) for o, t in ((got, a), (want, b)))):
        assert relative(g, w) <= 1e-5, f"T = {T}"


@pytest.mark.parametrize("settings", [{"num_kv_heads": 2}, {"qk_norm": "fla", "solver": "direct"}])
def test_compile_without_graph_break_or_recompilation(settings):
    torch._dynamo.reset()
    layer = make(settings, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    same_results(layer, compiled, 64)
    first = counter.frame_count
    for T in range(65, 129):
        if T in (80, 101, 128):
            same_results(layer, compiled, T)
        else:
            compiled(tokens(T=T, dtype=torch.float32).requires_grad_())
        assert counter.frame_count == first, f"T = {T} was compiled anew"


def test_compile_through_inductor():
    """At most twice as far from float64 as PyTorch's own operators: its exp may be another."""
    torch._dynamo.reset()
    layer = make({}, torch.float32)
    fine, x = copy.deepcopy(layer).double(), tokens(T=20, dtype=torch.float32)

    def results(f, module, given):
        o = f(given.requires_grad_())[0]
        return [o, *torch.autograd.grad(o.sum(), [given, *module.parameters()])]

    got = results(torch.compile(layer, fullgraph=True), layer, x.clone())
    want, exact = results(layer, layer, x.clone()), results(fine, fine, x.double())
    for i, (g, w, e) in enumerate(zip(got, want, exact)):
        assert relative(g, e) <= max(1e-5 if i else 1e-6, 2 * relative(w, e)), f"result {i}"


def test_export_runs_at_other_lengths():
    layer = make({}, torch.float32)
    program = torch.export.export(
        layer, (tokens(T=16, dtype=torch.float32),), strict=False,
        dynamic_shapes={"hidden_states": {1: torch.export.Dim("T", min=2, max=4096)}},
    )  # fmt: skip
    x = tokens(T=33, dtype=torch.float32)
    assert relative(program.module()(x)[0], layer(x)[0]) <= 1e-6


# Tensors of B*T*D numbers are what a layer's time goes by. Each of these reads or writes some; the
# C++ layer does the same and no more (benchmarks/python_layer.py holds the two together).
FORWARD = {
    "aten::mm": 5,  # q, k, v, gate and output projections
    "kalmanet::causal_conv_forward": 3,
    "kalmanet::unit_norm_forward": 2,
    "kalmanet::gka_forward": 1,
    "kalmanet::gated_rms_norm_forward": 1,
}
BACKWARD = {
    "aten::mm": 5 + 3,  # to x from q, k, v, gate and three gates a head; through the output's
    "aten::add": 6,  # of the seven gradients of x
    "kalmanet::gated_rms_norm_backward": 1,
    "kalmanet::gka_backward": 1,
    "kalmanet::unit_norm_backward": 2,
    "kalmanet::causal_conv_backward": 3,
}


class LargeResults(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operators that fill new tensors of at least `size` numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.counts = size, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.counts[func._schema.name] += any(
            t.numel() >= self.size and t.untyped_storage().data_ptr() not in inputs for t in made
        )
        return result


def test_the_layer_makes_no_large_tensor_that_it_need_not():
    layer = make({}, torch.float32)
    B, T, D = 2, 128, 24
    x = tokens(B, T, torch.float32).requires_grad_()
    with LargeResults(B * T * D) as forward:
        out = layer(x)[0]
    assert +forward.counts == FORWARD
    cotangent = torch.ones_like(out)
    with LargeResults(B * T * D) as backward:
        torch.autograd.grad(out, [x, *layer.parameters()], cotangent)
    assert +backward.counts == BACKWARD


ERRORS: dict[str, dict] = {
    "num_kv_heads: sets the key and the value heads": {"num_kv_heads": 2, "num_v_heads": 2},
    "num_heads is 4 and num_q_heads is 2: they are two names": {"num_q_heads": 2},
    "num_k_heads: is 3, which does not divide the largest head count, 4": {"num_k_heads": 3},
    "expand_v: is 1.25, which gives a value head dim of 7.5": {"expand_v": 1.25},
    "head_dim: is 300; it must be an integer from 1 to 256": {"head_dim": 300},
    "conv_size: is 17": {"conv_size": 17},
    "qk_norm: is 'l2'; allowed are": {"qk_norm": "l2"},
    "fixed_alpha: is 2": {"fixed_alpha": 2},
    "fixed_alpha: is 0.5 but use_alpha_connection is False": {
        "fixed_alpha": 0.5, "use_alpha_connection": False,
    },
    "learned_ridge: has no effect with fixed_alpha 0": {"fixed_alpha": 0, "learned_ridge": True},
    'arithmetic: is "bfloat16", which is for solver': {
        "arithmetic": "bfloat16", "solver": "direct",
    },
    "kv_learnable_residual: needs a kv_proj_rank": {"kv_learnable_residual": True},
    "mode: is 'parallel'": {"mode": "parallel"},
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_settings_that_do_not_fit(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GatedKalmaNet(**SMALL | ERRORS[message])


def test_calls_that_do_not_fit():
    layer = GatedKalmaNet(**SMALL, device=DEVICE)
    x = tokens(dtype=torch.float32)
    cases = {
        "hidden_states: must be [B,T,hidden_size] with hidden_size 24": lambda: layer(x[..., :5]),
        "hidden_states: have dtype torch.float64 but the parameters are": lambda: layer(x.double()),
        "cu_seqlens: needs B == 1": lambda: layer(x, cu_seqlens=torch.tensor([0, 11])),
        "attention_mask: must be [B,T] = [2, 11]": lambda: layer(
            x, attention_mask=torch.ones(2, 5)
        ),
        "attention_mask: excludes cu_seqlens": lambda: layer(
            x, attention_mask=torch.ones(2, 11), cu_seqlens=torch.tensor([0, 11])
        ),
        "past_key_values: the layer's h_kk must be [2, 4, 6, 6], got [1, 4, 6, 6]": lambda: layer(
            x, past_key_values=layer(x[:1], use_cache=True)[2]
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(TypeError, match="unknown arguments: flavour"):
        layer(x, flavour=1)
    with pytest.raises(TypeError, match="flavour"):
        GatedKalmaNet(**SMALL, flavour=1)
