#!/usr/bin/env python3
"""A hybrid language model of 105 million parameters trained on one GPU, its recurrent layers GKA or
Gated DeltaNet: loss, tokens a second and memory, in one run.

    benchmarks/cuda/model_peers.py [--text PATH] [--steps 200] [--batch 8] [--context 1024]
                                   [--solvers direct,chebyshev] [--out FILE]

12 layers, of which every fourth is softmax attention, width 768, 6 heads of 128, bytes as tokens;
all that is not the recurrent layer is the same code, the same batches and the same optimizer
(AdamW, bfloat16 autocast). The peer is flash-linear-attention's layer, of the same widths, where
that package is installed (flash-linear-attention and fla-core 0.6.0, einops). Tokens a second: the
median step's, the first tenth left out (compiling, the allocator's growth). The models take turns
of 20 steps, so that whatever else the machine does hits all of them. A model that has not learnt is
no measurement: it fails the run.
"""

import argparse
import json
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH, HEADS, HEAD_DIM = 12, 768, 6, 128
TURN = 20


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]),
                        help="a file, or a folder of .py and .txt files (%(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--solvers", default="direct,chebyshev")
    parser.add_argument("--out", type=Path, help="also as JSON: figures and losses")
    return parser.parse_args()


def read(path):
    """The text's bytes; of a folder, at most 64 MiB of its files in their names' order."""
    if path.is_file():
        return path.read_bytes()
    parts, size = [], 0
    for file in sorted(p for p in path.rglob("*") if p.suffix in (".py", ".txt")):
        if size < 2**26:
            parts.append(file.read_bytes())
            size += len(parts[-1])
    return b"\n".join(parts)


def config_of(kalmanet_models, solver):
    return kalmanet_models.HybridQwen3Config(
        vocab_size=257,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH * 2 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        hybrid_override_pattern="-".join(
            "*" if i % 4 == 3 else "GKA" for i in range(LAYERS)
        ),
        gka_config={"solver_type": solver, "learned_ridge": solver == "direct"},
    )  # fmt: skip


def delta_net_layers(torch, model):
    """Gated DeltaNet in the place of each GKA layer."""
    from fla.layers import GatedDeltaNet
    from fla.ops.common import chunk_o

    # It refuses its backward on older Tritons, whose results it does not trust; a model that has
    # not learnt fails the run.
    chunk_o.TRITON_ABOVE_3_7_1 = True
    for i, block in enumerate(model.model.layers):
        if block.is_gka:
            block.gka = GatedDeltaNet(
                hidden_size=WIDTH, expand_v=1, head_dim=HEAD_DIM, num_heads=HEADS, layer_idx=i
            )
    return model


class Run:
    """One model and its optimizer."""

    def __init__(self, torch, name, model, args):
        self.torch, self.name, self.args = torch, name, args
        self.model = model.cuda().train()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.losses, self.seconds, self.peak = [], [], 0

    def step(self, tokens):
        torch, step = self.torch, len(self.losses)
        warmup = max(1, self.args.steps // 10)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, (step + 1) / warmup)
        begun = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())  # (waits for the GPU)
        self.seconds.append(time.perf_counter() - begun)

    def turn(self, batches):
        torch = self.torch
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() - self.held()
        for tokens in batches:
            self.step(tokens)
        # Of the models that wait beside it nothing counts.
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - held)

    def held(self):
        """Bytes of its weights, gradients and the optimizer's state."""
        state = [t for s in self.optimizer.state.values() for t in s.values()]
        tensors = [*self.model.parameters(), *(p.grad for p in self.model.parameters()), *state]
        return sum(
            t.numel() * t.element_size()
            for t in tensors
            if isinstance(t, self.torch.Tensor) and t.is_cuda
        )

    def said(self):
        tokens = self.args.batch * self.args.context / statistics.median(self.seconds[-TURN:])
        return f"{self.name} loss {self.losses[-1]:.3f}, {tokens:.0f} tokens/s"

    def figures(self):
        seconds = statistics.median(self.seconds[len(self.seconds) // 10 :])
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return {
            "what": self.name,
            "parameters": self.parameters,
            "tokens_per_s": self.args.batch * self.args.context / seconds,
            "peak_mib": self.peak / 2**20,
            "first_loss": self.losses[0],
            "last_loss": statistics.mean(last),
            "losses": self.losses,
        }


def models(torch, kalmanet_models, args):
    for solver in args.solvers.split(","):
        torch.manual_seed(0)
        yield (
            f"GKA, {solver}",
            kalmanet_models.HybridQwen3ForCausalLM(config_of(kalmanet_models, solver)),
        )
    try:
        torch.manual_seed(0)
        model = kalmanet_models.HybridQwen3ForCausalLM(config_of(kalmanet_models, "direct"))
        yield "Gated DeltaNet", delta_net_layers(torch, model)
    except ImportError as error:
        print(f"no peer: {error}")


def main():
    args = parse()
    sys.path.insert(0, str(ROOT / "python"))
    library = ROOT / "build/release/src/torch/libkalmanet_torch.so"
    os.environ.setdefault("KALMANET_TORCH_LIBRARY", str(library))
    import kalmanet
    import kalmanet.models
    import torch

    if not (torch.cuda.is_available() and kalmanet.backends()["cuda"].available):
        sys.exit(f"NOT MEASURED: {kalmanet.backends()['cuda'].detail}")
    text = torch.frombuffer(bytearray(read(args.text)), dtype=torch.uint8)
    runs = [Run(torch, name, m, args) for name, m in models(torch, kalmanet.models, args)]
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {len(text)} bytes of text")
    draw = torch.Generator().manual_seed(1)
    for done in range(0, args.steps, TURN):
        batches = []
        for _ in range(min(TURN, args.steps - done)):
            at = torch.randint(len(text) - args.context, (args.batch,), generator=draw)
            rows = torch.stack([text[i : i + args.context + 1] for i in at.tolist()])
            batches.append(rows.long().cuda())
        for run in runs:
            run.turn(batches)
            if done == 0:
                print(f"{run.name}: {run.seconds[0]:.1f} s for the first step", flush=True)
        said = ", ".join(run.said() for run in runs)
        print(f"step {done + len(batches):4}: {said}", flush=True)
    lines = [run.figures() for run in runs]
    for line in lines:
        print(
            f"{line['what']:16} {line['parameters'] / 1e6:6.1f}M  "
            f"{line['tokens_per_s']:8.0f} tokens/s  peak {line['peak_mib']:6.0f} MiB  "
            f"loss {line['first_loss']:.3f} to {line['last_loss']:.3f}"
        )
    if args.out:
        args.out.write_text(json.dumps(lines) + "\n")
    # Bytes at random cost ln(256) = 5.55.
    ill = [line["what"] for line in lines if not line["last_loss"] < 0.6 * line["first_loss"]]
    if ill:
        sys.exit(f"has not learnt: {', '.join(ill)}")


if __name__ == "__main__":
    main()
