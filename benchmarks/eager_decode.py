#!/usr/bin/env python3
"""A token of one sequence through 24 layers, 16 heads of 128: gka_step beside softmax attention.

Attention reads a cache of 8192 tokens with PyTorch's scaled_dot_product_attention, in float32 and
bfloat16, by PyTorch's own choice of code (flash) and by plain products (math). Every layer has a
cache, or states, of its own, as in a model; projections are left out of both. Turn by turn in one
process; the operators' answers are compared first.

    benchmarks/eager_decode.py [--quick] [--threads 2] [--library FILE] [--out FILE]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention

SEED = 20261124


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="does it run? figures mean nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def load(path):
    if path is None:
        root = Path(__file__).resolve().parents[1]
        found = sorted(root.glob("build/*/src/torch/libkalmanet_torch.so"))
        if not found:
            sys.exit("eager_decode: no libkalmanet_torch.so; build the target kalmanet_torch")
        path = found[-1]
    torch.ops.load_library(str(path.resolve()))


def token(H, D):
    """q, k, v, a log decay of about fifty tokens' memory, alpha and beta of one token."""
    q, k = (normalize(torch.randn(1, 1, H, D), dim=-1) for _ in range(2))
    g = -torch.rand(1, 1, H) / 25
    return q, k, torch.randn(1, 1, H, D), g, torch.rand(1, 1, H), torch.rand(1, 1, H)


class Gka:
    def __init__(self, layers, H, D, **solver):
        self.solver = solver
        self.states = [(torch.zeros(1, H, D, D), torch.zeros(1, H, D, D)) for _ in range(layers)]

    def step(self, inputs, backend="auto", layers=None):
        q, k, v, g, alpha, beta = inputs
        for h, u in self.states[:layers]:
            o, _ = torch.ops.kalmanet.gka_step(
                q, k, v, h, u, g, g, alpha, beta, backend=backend, **self.solver
            )
        return o


class Attention:
    """Each layer's cache already holds the new token's key and value, as the last of its 8192."""

    def __init__(self, layers, H, D, length, dtype, backend):
        self.dtype, self.backend = dtype, backend
        self.caches = [torch.randn(2, 1, H, length, D).to(dtype).unbind() for _ in range(layers)]

    def step(self, inputs, **_):
        q = inputs[0].transpose(1, 2).to(self.dtype)
        with sdpa_kernel(self.backend):
            for k, v in self.caches:
                o = scaled_dot_product_attention(q, k, v)
        return o

    def check(self, inputs):
        q = inputs[0].transpose(1, 2).double()
        k, v = (t.double() for t in self.caches[-1])
        want = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1) @ v
        return ((self.step(inputs).double() - want).norm() / want.norm()).item()


def gate(name, error, bound):
    if not error <= bound:
        sys.exit(f"eager_decode: refused to time a wrong answer: {name}, {error:.1e} > {bound:.0e}")


def check_gka(name, peer, H, D):
    """The first tokens of a fresh layer beside the float64 reference of the same solver."""
    ours, want = Gka(1, H, D, **peer.solver), Gka(1, H, D, **peer.solver)
    for _ in range(12):
        inputs = token(H, D)
        got, expected = ours.step(inputs).double(), want.step(inputs, "reference").double()
        gate(name, ((got - expected).norm() / expected.norm()).item(), 2e-5)


def main():
    args = arguments()
    load(args.library)
    torch.manual_seed(SEED)
    layers, H, D, length = (2, 2, 32, 256) if args.quick else (24, 16, 128, 8192)
    rounds, filled = (2, 8) if args.quick else (9, 160)
    peers = {
        "chebyshev(30)": Gka(layers, H, D),
        "direct": Gka(layers, H, D, solver="direct"),
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = f"attention {str(dtype).removeprefix('torch.')}"
        flash = Attention(layers, H, D, length, dtype, SDPBackend.FLASH_ATTENTION)
        peers[name] = flash
        peers[name + ", math"] = Attention(layers, H, D, 1, dtype, SDPBackend.MATH)
        peers[name + ", math"].caches = flash.caches
    with torch.no_grad():
        for name, peer in peers.items():
            if isinstance(peer, Gka):
                check_gka(name, peer, H, D)
                # A state of few keys is solved in float64 (docs/numerics.md): fill it.
                for _ in range(filled):
                    peer.step(token(H, D))
            else:
                bound = 2e-2 if peer.dtype == torch.bfloat16 else 1e-5
                gate(name, peer.check(token(H, D)), bound)
        result = {"layers": layers, "heads": H, "dim": D, "cache": length, "rounds": rounds}
        result |= {"torch": torch.__version__, "threads": args.threads, "peers": {}}
        samples = {name: {"ms": [], "one_ms": []} for name in peers}
        for field, threads, clock in (
            ("ms", args.threads, time.perf_counter),
            ("one_ms", 1, time.thread_time),
        ):
            torch.set_num_threads(threads)
            for _ in range(rounds):
                for name, peer in peers.items():
                    inputs = token(H, D)
                    peer.step(inputs, layers=1)
                    begin = clock()
                    peer.step(inputs)
                    samples[name][field].append(1e3 * (clock() - begin))
    for name, fields in samples.items():
        result["peers"][name] = {field: statistics.median(v) for field, v in fields.items()}
        ms, one = (result["peers"][name][field] for field in ("ms", "one_ms"))
        print(f"{name:25s} {ms:8.2f} ms a token, one thread {one:8.2f} ms of processor time")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
