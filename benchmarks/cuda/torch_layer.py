#!/usr/bin/env python3
"""What the layer costs on a GPU around the recurrence: the convolution and the norms beside the
copy rate, then whole layers, forward, backward and one token, fused and operator by operator.

    benchmarks/cuda/torch_layer.py [--rounds 20] [--pieces | --tokens]

Medians of CUDA events, B1 T8192, ten calls of a kernel in a row. Its rate counts the bytes that it
must move, each tensor once. The results are compared with the CPU's first (float64, a small size).
A token is timed as PyTorch calls it and as a graph of ten, each of another input.
"""

import argparse
import importlib
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
T, D, V = 8192, 4096, 128


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pieces", action="store_true", help="the convolution and the norms alone")
    parser.add_argument("--tokens", action="store_true", help="one token alone")
    return parser.parse_args()


def main():
    args = parse()
    rounds = args.rounds
    sys.path.insert(0, str(ROOT / "python"))
    library = ROOT / "build/release/src/torch/libkalmanet_torch.so"
    os.environ.setdefault("KALMANET_TORCH_LIBRARY", str(library))
    import kalmanet
    import kalmanet.ops
    import torch

    if not (torch.cuda.is_available() and kalmanet.backends()["cuda"].available):
        sys.exit(f"NOT MEASURED: {kalmanet.backends()['cuda'].detail}")
    ops = torch.ops.kalmanet

    def ms(f, count=rounds, calls=1):
        """Of one of so many calls in a row: with one, the launch is in it."""
        for _ in range(3):
            f()
        times = []
        for _ in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                f()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        return statistics.median(times)

    def calls(x, w, dy, rows, gate, norm, d_rows):
        """Each operator, and how often its bytes are those of x."""
        return {
            "convolution forward": (lambda: ops.causal_conv_forward(x, w), 2),
            "convolution backward": (lambda: ops.causal_conv_backward(dy, x, w), 3),
            "gated norm forward": (lambda: ops.gated_rms_norm_forward(rows, gate, norm), 3),
            "gated norm backward": (
                lambda: ops.gated_rms_norm_backward(d_rows, rows, gate, norm),
                5,
            ),
            "unit norm forward": (lambda: ops.unit_norm_forward(rows), 2),
            "unit norm backward": (lambda: ops.unit_norm_backward(d_rows, rows), 3),
        }

    def tensors(tokens, channels, dtype):
        torch.manual_seed(0)
        x, dy = (torch.randn(1, tokens, channels, dtype=dtype) for _ in range(2))
        rows, gate, d_rows = (torch.randn(tokens * channels // V, V, dtype=dtype) for _ in range(3))
        made = (x, torch.randn(channels, 4, dtype=dtype), dy, rows, gate, torch.randn(V), d_rows)
        return [t.to(dtype) for t in made]

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    small = tensors(100, 256, torch.float64)
    there = calls(*(t.cuda() for t in small))
    for name, (f, _) in calls(*small).items():
        want, got = first(f()), first(there[name][0]()).cpu()
        error = ((got - want).norm() / want.norm()).item()
        assert error < 1e-12, f"{name}: relative error {error}"

    source, target = (torch.empty(2**28, device="cuda") for _ in range(2))
    copy = 2 * source.numel() * 4 / ms(lambda: target.copy_(source)) / 1e6
    print(f"copy {copy:.0f} GB/s on {torch.cuda.get_device_name()}")
    for dtype in () if args.tokens else (torch.float32, torch.bfloat16):
        made = [t.cuda() for t in tensors(T, D, dtype)]
        size = made[0].numel() * made[0].element_size()
        for name, (f, passes) in calls(*made).items():
            t = ms(f, calls=10)
            rate = passes * size / t / 1e6
            print(f"{name:22} {str(dtype)[6:]:9} {t:7.3f} ms {rate / copy:5.2f} of the copy rate")
        del made

    def tokens(layer, batch):
        """One token: as called, in a graph; in ms."""
        xs = torch.randn(10, batch, 1, layer.options.hidden_size, device="cuda").to(torch.bfloat16)
        state = layer(xs[:, :, 0].transpose(0, 1), use_cache=True)[2]

        def one(x):
            return layer(x, past_key_values=state, use_cache=True)[0]

        called = ms(lambda: one(xs[0]))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in xs:
                one(x)
        return called, ms(graph.replay) / len(xs)

    if args.pieces:
        return
    mixer = importlib.import_module("kalmanet.layer")
    fuses = mixer.can_fuse
    for solver in ("chebyshev", "direct"):
        torch.cuda.reset_peak_memory_stats()
        layer = kalmanet.GatedKalmaNet(
            hidden_size=2048, head_dim=128, num_heads=16, device="cuda", dtype=torch.bfloat16,
            solver=solver,
        )  # fmt: skip
        what = f"layer of 16 heads, width 2048, bfloat16, {solver}:"
        if not args.tokens:
            x = torch.randn(1, T, 2048, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                forward = ms(lambda: layer(x)[0], 5)  # noqa: B023
            x.requires_grad_()
            both = ms(lambda: layer(x)[0].backward(x.detach()), 5)  # noqa: B023
            most = torch.cuda.max_memory_allocated() / 2**20
            print(
                f"{what} forward {forward:.2f} ms, with backward {both:.2f} ms ({most:.0f} MiB at "
                "most)"
            )
        for batch in (1, 16, 128):
            for fused in (True, False):
                mixer.can_fuse = fuses if fused else lambda *_: False
                with torch.no_grad():
                    called, replayed = tokens(layer, batch)
                print(
                    f"{what} one token of {batch:3} sequences, "
                    f"{'fused' if fused else 'operator by operator'}: "
                    f"called {called:.3f} ms, in a graph {replayed:.4f} ms"
                )
    mixer.can_fuse = fuses


if __name__ == "__main__":
    main()
