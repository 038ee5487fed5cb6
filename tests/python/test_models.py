"""kalmanet.models: synthetic checkpoints against a plain PyTorch model, generation, padding,
packing, gradient checkpointing, compile."""

import json
import re

import kalmanet
import pytest
import torch
from cases import DEVICE, SEED, relative
from plain import language_model
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers", reason="the extra `models` is not installed")
import safetensors.torch  # noqa: E402
from kalmanet.models import HybridQwen3Config, HybridQwen3ForCausalLM  # noqa: E402

SMALL = {
    "architectures": ["HybridQwen3ForCausalLM"], "model_type": "hybrid_qwen3", "vocab_size": 60,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 3e3},
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32",
    "hybrid_override_pattern": "GKA-*-GKA", "gka_config": {"ridge_strength": 0.03, "num_iter": 20},
}  # fmt: skip
MIXED = {"kv_proj_rank": 3, "kv_learnable_residual": True}
CHECKPOINTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "low rank": {"gka_config": {"kv_proj_rank": 3}},
    "low rank, mixed": {"gka_config": MIXED},
    "attention alone": {"hybrid_override_pattern": "*-*", "num_hidden_layers": 2},
    "memory alone": {"hybrid_override_pattern": "GKA", "num_hidden_layers": 1},
}


def config_of(change):
    return {**SMALL, **change}


def model_of(change=(), **more):
    torch.manual_seed(SEED)
    config = HybridQwen3Config(
        **{k: v for k, v in config_of(dict(change)).items() if k != "model_type"}
    )
    model = HybridQwen3ForCausalLM(config, **more).to(DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                parameter.add_(0.15 * torch.randn(parameter.shape))
    return model.eval()


def tokens(B=2, T=21):
    return torch.randint(0, 60, (B, T), generator=torch.Generator().manual_seed(SEED))


def kept(output):
    """The cache that a call returns; newer releases of Transformers call the field `cache`."""
    return output["cache"] if "cache" in output else output["past_key_values"]


def write_checkpoint(folder, change, shards, dtype):
    """A folder in the official layout, written without the package's help except for the shapes."""
    sd = {n: t.detach().clone() for n, t in model_of(change).state_dict().items()}
    if config_of(change)["tie_word_embeddings"]:
        del sd["lm_head.weight"]
    for name, t in sd.items():
        if not name.endswith(("A_log", "dt_bias")):
            sd[name] = t.to(dtype)
    config = config_of(change) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(sd)
    if shards == 1:
        safetensors.torch.save_file(sd, folder / "model.safetensors", {"format": "pt"})
    else:
        files, index = [names[i::shards] for i in range(shards)], {}
        for i, part in enumerate(files):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            safetensors.torch.save_file({n: sd[n] for n in part}, folder / file, {"format": "pt"})
            index |= dict.fromkeys(part, file)
        total = sum(t.numel() * t.element_size() for t in sd.values())
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        )
    return sd


@pytest.mark.parametrize("shards, dtype", [(1, torch.float32), (3, torch.bfloat16)])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_gives_the_logits_of_the_plain_model(case, shards, dtype, tmp_path):
    change = CHECKPOINTS[case]
    sd = write_checkpoint(tmp_path, change, shards, dtype)
    exact = {n: t.double() for n, t in sd.items()}
    want = language_model(tokens(), exact, config_of(change))
    model = kalmanet.load(tmp_path, device=DEVICE)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        got = model(tokens()).logits
    assert relative(got, want) <= 1e-5, f"{case}: {relative(got, want):.1e}"
    if dtype == torch.bfloat16:
        half = kalmanet.load(tmp_path, dtype="auto", device=DEVICE)
        kinds = {n.split(".")[-1]: p.dtype for n, p in half.named_parameters()}
        assert kinds["weight"] == torch.bfloat16
        assert kinds.get("A_log", torch.float32) == torch.float32
        assert relative(half(tokens()).logits, want) <= 5e-2


def test_auto_classes_and_saving_again(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model = model_of()
    kalmanet.save(model, first)
    again = transformers.AutoModelForCausalLM.from_pretrained(first)
    assert isinstance(again, HybridQwen3ForCausalLM)
    kalmanet.save(again, second, max_shard_size="20KB")
    assert len(list(second.glob("model-*.safetensors"))) > 1
    third = kalmanet.load(second, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(third(tokens()).logits, model(tokens()).logits)
    assert transformers.AutoConfig.from_pretrained(second).gka_config == SMALL["gka_config"]


def test_weights_that_do_not_fit(tmp_path):
    sd = write_checkpoint(tmp_path, {}, 1, torch.float32)
    sd["model.layers.0.gka.extra.weight"] = torch.zeros(1)
    del sd["model.norm.weight"]
    safetensors.torch.save_file(sd, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing: model.norm.weight; unexpected: .*extra.weight"):
        kalmanet.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        kalmanet.load(tmp_path / "nowhere")


CONFIG_ERRORS = {
    "layer 1 is 'GDN', which is not built yet": {"hybrid_override_pattern": "GKA-GDN-*"},
    "layer 0 is 'gka', which is no layer kind": {"hybrid_override_pattern": "gka-*-*"},
    "names 2 layers, but num_hidden_layers is 3": {"hybrid_override_pattern": "GKA-*"},
    "gka_config.ridge_ratio: it is spelled ridge_strength here": {
        "gka_config": {"ridge_ratio": 0.1}
    },
    "rope_parameters.rope_type: is 'yarn'": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    },
    "hidden_act: is 'gelu'": {"hidden_act": "gelu"},
    "attention_dropout: is not built": {"attention_dropout": 0.1},
    "num_key_value_heads: is 3; it must divide": {"num_key_value_heads": 3},
    "head_dim: is 5; rotary positions": {"head_dim": 5},
}


@pytest.mark.parametrize("message", CONFIG_ERRORS)
def test_configs_that_do_not_fit(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_of(CONFIG_ERRORS[message])


def test_greedy_generation_equals_the_whole_pass_each_time():
    model, ids = model_of(), tokens(2, 5)
    with torch.no_grad():
        want = ids
        for _ in range(12):
            logits = model(want, use_cache=False).logits
            want = torch.cat([want, logits[:, -1:].argmax(-1)], 1)
        got = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_each_alone(side):
    model = model_of()
    lengths, T = (3, 11, 7), 11
    ids, mask = tokens(3, T), torch.zeros(3, T, dtype=torch.int64)
    for b, n in enumerate(lengths):
        mask[b, T - n :] = 1 if side == "left" else 0
        if side == "right":
            mask[b, :n] = 1
    with torch.no_grad():
        got = model(ids, attention_mask=mask)
        after = model(
            tokens(3, 4)[:, :4], past_key_values=kept(got), use_cache=True,
            attention_mask=torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], 1),
        )  # fmt: skip
        for b in range(3):
            alone = model(ids[b : b + 1, mask[b].bool()], use_cache=True)
            assert relative(got.logits[b, mask[b].bool()], alone.logits[0]) <= 1e-5
            more = model(tokens(3, 4)[b : b + 1], past_key_values=kept(alone))
            assert relative(after.logits[b], more.logits[0]) <= 1e-5
        if side == "left":
            batch = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
            for b, n in enumerate(lengths):
                one = model.generate(ids[b : b + 1, T - n :], max_new_tokens=8, do_sample=False)
                assert torch.equal(batch[b, T:], one[0, n:]), f"prompt {b}"


@pytest.mark.parametrize("pattern", ["GKA-*-GKA", "GKA-GKA-GKA"])
def test_a_saved_state_goes_on(pattern, tmp_path):
    model, ids = model_of({"hybrid_override_pattern": pattern}), tokens(2, 20)
    with torch.no_grad():
        want = model(ids).logits
        state = kalmanet.State()
        outs = [model(ids[:, :9], past_key_values=state, use_cache=True).logits]
        state.save(tmp_path / "s")
        state = kalmanet.State.load(tmp_path / "s", DEVICE)
        for t in range(9, 20):
            outs.append(model(ids[:, t : t + 1], past_key_values=state, use_cache=True).logits)
    assert relative(torch.cat(outs, 1), want) <= 1e-5
    assert state.get_seq_length() == 20


def test_beam_search_and_sampling_run():
    model = model_of()
    beams = model.generate(tokens(2, 4), max_new_tokens=5, num_beams=3, do_sample=False)
    assert beams.shape[0] == 2 and beams.shape[1] <= 9
    torch.manual_seed(1)
    one = model.generate(tokens(2, 4), max_new_tokens=5, do_sample=True)
    torch.manual_seed(1)
    assert torch.equal(one, model.generate(tokens(2, 4), max_new_tokens=5, do_sample=True))


@pytest.mark.parametrize("pattern", ["GKA-*-GKA", "GKA-GKA-GKA"])
def test_a_cache_of_transformers(pattern):
    """Given by hand, in a loop and to generate()."""
    model, ids = model_of({"hybrid_override_pattern": pattern}), tokens(2, 12)
    with torch.no_grad():
        want = model(ids).logits
        for make in (
            transformers.DynamicCache,
            lambda: transformers.DynamicCache(config=model.config),
        ):
            cache, outs = make(), []
            for begin, end in ((0, 5), (5, 6), (6, 12)):
                out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
                assert kept(out) is cache and cache.get_seq_length() == end
                outs.append(out.logits)
            assert relative(torch.cat(outs, 1), want) <= 1e-5
            cache.reorder_cache(torch.tensor([1, 1]))
            swapped = model(ids[:1, :1].repeat(2, 1), past_key_values=cache, use_cache=True).logits
            assert torch.equal(swapped[0], swapped[1])
            cache.reset()
            assert cache.get_seq_length() == 0
            assert torch.equal(model(ids, past_key_values=cache, use_cache=True).logits, want)
        plain = model.generate(ids, max_new_tokens=6, do_sample=False)
        cache = transformers.DynamicCache()
        got = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
        assert torch.equal(got, plain) and cache.get_seq_length() == 12 + 5
        # And on with the same cache.
        more = model.generate(got, max_new_tokens=3, do_sample=False, past_key_values=cache)
        assert torch.equal(more, model.generate(ids, max_new_tokens=9, do_sample=False))
        beams = [
            model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, **given)
            for given in ({}, {"past_key_values": transformers.DynamicCache()})
        ]
        assert torch.equal(*beams)
    other = transformers.DynamicCache()
    other.update(torch.zeros(2, 2, 3, 6), torch.zeros(2, 2, 3, 6), 0)
    with pytest.raises(ValueError, match="this cache was filled by another model"):
        model(ids, past_key_values=other)
    with pytest.raises(NotImplementedError, match="cannot go back to fewer tokens"):
        cache.layers[0].crop(1)


def test_packed_sequences():
    model, ids = model_of(), tokens(1, 17)
    cu = torch.tensor([0, 5, 6, 17])
    with torch.no_grad():
        got = model(ids, cu_seqlens=cu).logits
        for a, b in zip(cu.tolist(), cu.tolist()[1:]):
            assert relative(got[:, a:b], model(ids[:, a:b]).logits) <= 1e-5
    with pytest.raises(ValueError, match="cannot be kept for packed sequences"):
        model(ids, cu_seqlens=cu, use_cache=True)


def test_loss_and_gradient_checkpointing():
    ids = tokens()
    results = []
    for on in (False, True):
        model = model_of().train()
        if on:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    logits = model_of()(ids).logits
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert relative(results[0][0], want) <= 1e-6
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*(grads for _, grads in results)):
        assert torch.equal(a, b)


def test_new_weights():
    torch.manual_seed(0)
    config = HybridQwen3Config(
        hidden_size=64, num_hidden_layers=2, hybrid_override_pattern="GKA-*", num_key_value_heads=2,
        gka_config={"learned_ridge": True, **MIXED},
    )  # fmt: skip
    model = HybridQwen3ForCausalLM(config).to(DEVICE)
    std = {n: p.std().item() for n, p in model.named_parameters() if p.numel() > 1000}
    assert len(std) > 10
    for name, value in std.items():
        if "conv1d" in name or "linearB" in name or "ridge" in name:
            continue
        want = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert abs(value / want - 1) < 0.1, f"{name}: {value}"
    gka = model.model.layers[0].gka
    assert gka.A_log.max() <= 2.78 and gka.b_proj.bias.abs().max() == 0
    assert gka.proj_k.linearB.weight.abs().max() == 0 and gka.k_rep.sum() == 4
    assert torch.allclose(gka.ridge_proj.bias.exp(), torch.tensor(0.01))
    dt = torch.nn.functional.softplus(gka.dt_bias)
    assert dt.min() >= 1e-4 and dt.max() <= 0.1001


@pytest.mark.parametrize("pattern", ["GKA-*", "GKA-GKA"])
def test_compile_of_a_two_layer_model(pattern):
    torch._dynamo.reset()
    model = model_of({"num_hidden_layers": 2, "hybrid_override_pattern": pattern}).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    first = None
    for T in range(64, 129):
        ids = tokens(2, T)
        if T not in (64, 97, 128):
            compiled(ids)
            assert counter.frame_count == first, f"T = {T} was compiled anew"
            continue
        got, want = compiled(ids).logits, model(ids).logits
        assert relative(got, want) <= 1e-5
        grads = [
            torch.autograd.grad(o.square().mean(), list(model.parameters())) for o in (got, want)
        ]
        for a, b in zip(*grads):
            assert relative(a, b) <= 1e-4
        if T == 64:
            first = counter.frame_count
        assert counter.frame_count == first, f"T = {T} was compiled anew"


def test_calls_that_do_not_fit():
    model, ids = model_of({"max_position_embeddings": 16}), tokens(2, 12)
    with pytest.raises(ValueError, match="max_position_embeddings: is 16, but .* 21 tokens"):
        model(tokens(2, 21))
    with pytest.raises(ValueError, match=r"attention_mask: must be \[B,T\] = \[2, 12\]"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(
        ValueError, match="past_key_values: must be a kalmanet.State or .* got tuple"
    ):
        model(ids, past_key_values=())
    with pytest.raises(ValueError, match="input_ids: give either"):
        model()
