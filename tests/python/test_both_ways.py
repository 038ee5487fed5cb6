"""Model folders between the package and the `kalmanet` command: the same greedy tokens and the same
loss, both ways."""

import json
import os
import subprocess
from pathlib import Path

import kalmanet
import pytest
import torch
from cases import ROOT, SEED

pytest.importorskip("transformers", reason="the extra `models` is not installed")
import safetensors.torch  # noqa: E402
from plain import language_model  # noqa: E402


def command(*arguments):
    named = os.environ.get("KALMANET_COMMAND")
    built = sorted(ROOT.glob("build/*/apps/kalmanet"), key=lambda p: p.stat().st_mtime)
    if not named and not built:
        pytest.skip("no build/*/apps/kalmanet: build the target kalmanet for these tests")
    path = Path(named) if named else built[-1]
    run = subprocess.run(
        [path, *map(str, arguments)], capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr.decode()
    return run.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"line {i * 7919 % 1000} of a text about nothing.\n" for i in range(600))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module", params=["GKA-*-GKA", "GKA-GKA"])
def trained(request, text, tmp_path_factory):
    """A folder that the command trained."""
    out = tmp_path_factory.mktemp("run") / "run"
    more = ["--learned-ridge", "--untied"] if request.param == "GKA-GKA" else ["--kv-heads", 2]
    command(
        "train", "--text", text, "--out", out, "--pattern", request.param, "--layers",
        request.param.count("-") + 1, "--width", 32, "--heads", 4, "--steps", 60, "--batch", 4,
        "--context", 48, "--lr", 0.01, "--warmup", 5, "--quiet", "--threads", 1, *more,
    )  # fmt: skip
    return out / "latest"


def greedy_bytes(model, prompt, count):
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=256)[0]
    return bytes(t for t in out[len(prompt) :].tolist() if t < 256)


def command_bytes(folder, prompt, count):
    return command(
        "generate", "--model", folder, "--prompt", prompt.decode(), "--max-new-tokens", count,
        "--temperature", 0, "--no-echo", "--threads", 1,
    )  # fmt: skip


def loss_of(model, path, count):
    """Mean nats of each byte of the file's beginning after the first."""
    data = path.read_bytes()[:count]
    with torch.no_grad():
        return model(torch.tensor([list(data)]), labels=torch.tensor([list(data)])).loss.item()


def test_a_trained_folder_generates_the_same_in_python(trained, text):
    model = kalmanet.load(trained)
    prompt = b"line 9"
    want = command_bytes(trained, prompt, 80)
    assert greedy_bytes(model, prompt, 80).rstrip(b"\n") == want.rstrip(b"\n")
    assert len(set(want)) > 4, f"{want!r} says little"
    report = json.loads(
        command("eval", "--model", trained, "--text", text, "--max-bytes", 400, "--json", "--quiet")
    )
    want_loss = report["nats"] / report["bytes"]
    got = loss_of(model, text, 400)
    assert abs(got - want_loss) <= 1e-5 * want_loss, (got, report)


def test_a_folder_saved_in_python_generates_the_same_in_the_command(trained, tmp_path):
    torch.manual_seed(SEED)
    model = kalmanet.load(trained)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    kalmanet.save(model, tmp_path, tokenizer=trained, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for prompt in (b"line 4", b"nothing"):
        want = greedy_bytes(model, prompt, 60)
        assert command_bytes(tmp_path, prompt, 60).rstrip(b"\n") == want.rstrip(b"\n")
    assert b"GKA" in command("info", tmp_path)


def test_the_command_s_tokenizer_is_one_of_transformers(trained):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(trained / "tokenizer.json"))
    for text in ("line 9 of a text", "naïve → 日本\n"):
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode()) and tokenizer.decode(ids) == text


def test_two_hundred_steps_of_training_give_the_same_losses(text, tmp_path):
    """The command's loop and one of ten lines here, from the same weights over the same windows."""
    # (At twice this rate Adam blows rounding up to 5e-4 around step 150.)
    steps, batch, context, lr = 200, 2, 32, 1e-3

    def train(out, *more):
        command(
            "train", "--text", text, "--out", tmp_path / out, "--pattern", "GKA-*", "--layers", 2,
            "--width", 16, "--heads", 2, "--untied", "--batch", batch, "--context", context,
            "--schedule", "constant", "--clip", 0, "--sequential", "--quiet", "--threads", 1,
            "--log-every", 1, "--solver", "direct", *more,
        )  # fmt: skip

    # A step too small to change anything leaves the weights that the seed gives.
    train("first", "--steps", 1, "--lr", 1e-30)
    train("run", "--steps", steps, "--lr", lr)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    want = torch.tensor([line["loss"] for line in lines if "loss" in line])
    model = kalmanet.load(tmp_path / "first" / "latest").train()
    named = list(model.named_parameters())
    decays = [p for n, p in named if p.dim() >= 2 and "embed" not in n]
    others = [p for n, p in named if not (p.dim() >= 2 and "embed" not in n)]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    data = torch.tensor(list(text.read_bytes()))
    windows = (int(len(data) * 0.9) - 1) // context
    got = []
    for step in range(steps):
        starts = [(step * batch + i) % windows * context for i in range(batch)]
        ids = torch.stack([data[s : s + context + 1] for s in starts])
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        got.append(loss.item())
    off = (torch.tensor(got) - want).abs()
    assert want.numel() == steps and want[-1] < want[0] - 1
    assert off.max() <= 1e-4, f"{off.max():.1e} at step {off.argmax()}, {off[0]:.1e} at the first"


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_synthetic_checkpoints_mean_the_same_in_the_command(trained, text, tmp_path, mixed, dtype):
    """Low-rank keys and values, tied and untied embeddings, shards, 16-bit weights beside float32
    A_log and dt_bias; test_models.py holds the same checkpoints against a plain model."""
    from kalmanet.models import HybridQwen3Config, HybridQwen3ForCausalLM

    torch.manual_seed(SEED)
    config = HybridQwen3Config(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=mixed,
        hybrid_override_pattern="GKA-*-GKA",
        gka_config={"kv_proj_rank": 5, "kv_learnable_residual": mixed},
    )  # fmt: skip
    model = HybridQwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                parameter.add_(0.1 * torch.randn(parameter.shape))
                parameter.copy_(parameter.to(getattr(torch, dtype)))
    model.to(getattr(torch, dtype))
    for layer in model.model.layers:
        if layer.is_gka:
            layer.gka.A_log.data = layer.gka.A_log.data.float()
            layer.gka.dt_bias.data = layer.gka.dt_bias.data.float()
    kalmanet.save(model, tmp_path, tokenizer=trained, max_shard_size="40KB")
    model = kalmanet.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    for prompt in (b"line 4", b"x"):
        want = greedy_bytes(model, prompt, 60)
        # (The command writes text: U+FFFD for what is none.)
        got = command_bytes(tmp_path, prompt, 60).decode()
        assert got.rstrip("\n") == want.decode(errors="replace").rstrip("\n")
    report = json.loads(
        command(
            "eval", "--model", tmp_path, "--text", text, "--max-bytes", 300, "--json", "--quiet"
        )
    )
    want_loss = report["nats"] / report["bytes"]
    assert abs(loss_of(model, text, 300) - want_loss) <= 1e-5 * want_loss
    # And the plain model, in float64 from the files themselves.
    stored = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= {n: t.double() for n, t in safetensors.torch.load_file(file).items()}
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    kinds = json.loads((tmp_path / "config.json").read_text())
    ids = torch.tensor([list(text.read_bytes()[:300])])
    logits = language_model(ids, stored, kinds)[0]
    plain_loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
    assert abs(plain_loss - want_loss) <= 1e-5 * want_loss
