#!/usr/bin/env python3
"""GKA beside Gated DeltaNet on one GPU, in one run: forward, forward and backward, memory.

    benchmarks/cuda/peers.py [--quick] [--shapes B1T8192H32,..] [--out FILE]

The peer is flash-linear-attention's Triton kernel, measured where that package is installed
(flash-linear-attention and fla-core 0.6.0, einops); its first call compiles for a minute or two.
Inputs: K = V = 128, bfloat16, unit keys and queries, log decays of -exp(U(-6, -2)), a memory of
about 30 tokens (`memory 256`: a constant -1/256). Each of ours is held to the float64 definition on
the CPU first, at 300 tokens; what fails is not timed. Medians of CUDA events around ten calls in a
row, turn by turn, in ms a call (a peer of many kernels waits for its launches otherwise); the ratio
is that of ours over the peer's in the same shape. Peak: MiB that forward and backward take beside
the inputs.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
K = 128
SHAPES = "B1T8192H32,B1T2048H32,B1T8192H8,B8T2048H32,B1T32768H32"
# Beside what rounding the output to bfloat16 costs (1.66e-3): twice that, the promise for 16 bits;
# chebyshev(30) is held to the definition with as many steps, and a gradient to one more rounding.
BOUND = {"o": 3.3e-3, "gradients": 5e-3}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first shape, few rounds")
    parser.add_argument("--shapes", default=SHAPES, help="comma-separated, as %(default)s")
    parser.add_argument("--out", type=Path, help="also as JSON lines")
    return parser.parse_args()


def shape_of(name):
    match = re.fullmatch(r"B(\d+)T(\d+)H(\d+)", name)
    if not match:
        sys.exit(f"--shapes: {name!r} is not of the form B1T8192H32")
    return tuple(map(int, match.groups()))


def inputs(torch, B, T, H, memory=None, device="cuda"):
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    q, k = (unit(torch.randn(B, T, H, K, device=device), dim=-1).bfloat16() for _ in range(2))
    v = torch.randn(B, T, H, K, device=device).bfloat16()
    g = -torch.exp(torch.rand(B, T, H, device=device) * 4 - 6)
    if memory is not None:
        g = torch.full_like(g, -1 / memory)
    beta = torch.rand(B, T, H, device=device).bfloat16()
    ridge = torch.exp(math.log(0.005) + torch.rand(B, T, H, device=device) * math.log(10))
    return q, k, v, g, beta, ridge


def ours(kalmanet, solver, ridge):
    """f(q, k, v, g, a) of chunk_gka; ridge None: one a token, which is a."""

    def call(q, k, v, g, a):
        return kalmanet.ops.chunk_gka(
            q, k, v, g, g, ridge_ratio=a if ridge is None else ridge, solver=solver
        )[0]

    return call


VARIANTS = {
    # solver, ridge ratio (None: one a token in 0.005..0.05), memory (None: as the peer's)
    "direct, ridge 0.02": ("direct", 0.02, None),
    "direct, ridge 0.005": ("direct", 0.005, None),
    "direct, a ridge a token": ("direct", None, None),
    "direct, memory 256": ("direct", 0.02, 256),
    "chebyshev(30)": ("chebyshev", 0.02, None),
}


def gate(torch, kalmanet, name):
    """The error of o and the worst of the gradients' against float64 on the CPU."""
    solver, ridge, memory = VARIANTS[name]
    q, k, v, g, _, a = inputs(torch, 1, 300, 2, memory, "cpu")
    given = [t.requires_grad_() for t in (q, k, v, g, *([a] if ridge is None else []))]
    fine = [t.detach().double().requires_grad_() for t in given]
    there = [t.detach().cuda().requires_grad_() for t in given]
    f = ours(kalmanet, solver, ridge)
    results = []
    for ts in (fine, there):
        o = f(*ts, *([None] if ridge is not None else []))
        cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        grads = torch.autograd.grad(o, ts, cotangent.to(o))
        results.append([t.double().cpu() for t in (o.detach(), *grads)])
    errors = [((b - a).norm() / a.norm()).item() for a, b in zip(*results)]
    return errors[0], max(errors[1:])


def peer(torch):
    """FLA's Gated DeltaNet, or None."""
    try:
        from fla.ops.common import chunk_o
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        print(f"no peer: {error}")
        return None
    # It refuses its backward on older Tritons, whose results it does not trust; this only times it.
    chunk_o.TRITON_ABOVE_3_7_1 = True
    return lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta)[0]


class Timer:
    CALLS = 10  # between two events

    def __init__(self, torch, rounds):
        self.torch, self.rounds = torch, rounds

    def once(self, f):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.CALLS):
            f()
        end.record()
        self.torch.cuda.synchronize()
        return begin.elapsed_time(end) / self.CALLS

    def medians(self, calls):
        """Each call's median, round by round in turn."""
        for f in calls:
            f(), f()
        times = [[self.once(f) for f in calls] for _ in range(self.rounds)]
        return [statistics.median(t) for t in zip(*times)]


def passes(torch, f, given):
    """Forward alone; forward and backward with every gradient."""
    given = [t.detach().requires_grad_() for t in given]
    cotangent = torch.randn_like(f(*given))

    def forward():
        with torch.no_grad():
            f(*given)

    def both():
        torch.autograd.grad(f(*given), given, cotangent)

    return forward, both


def peak(torch, f):
    f()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_rate(torch, timer):
    """GB/s, bytes read and written."""
    source, target = (torch.empty(2**28, device="cuda") for _ in range(2))
    ms = timer.medians([lambda: target.copy_(source)])[0]
    return 2 * source.numel() * 4 / ms / 1e6


def main():
    args = parse()
    sys.path.insert(0, str(ROOT / "python"))
    library = ROOT / "build/release/src/torch/libkalmanet_torch.so"
    os.environ.setdefault("KALMANET_TORCH_LIBRARY", str(library))
    import kalmanet
    import kalmanet.ops
    import torch

    if not (torch.cuda.is_available() and kalmanet.backends()["cuda"].available):
        sys.exit(f"NOT MEASURED: {kalmanet.backends()['cuda'].detail}")
    timer = Timer(torch, 5 if args.quick else 9)
    copy = copy_rate(torch, timer)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy {copy:.0f} GB/s")

    variants = {}
    for name in VARIANTS:
        errors = dict(zip(BOUND, gate(torch, kalmanet, name)))
        passed = all(errors[what] <= BOUND[what] for what in BOUND)
        said = ", ".join(f"{what} {errors[what]:.2e} (bound {BOUND[what]:.1e})" for what in BOUND)
        print(f"gate {'passed' if passed else 'FAILED'}: {name}: {said}", flush=True)
        if passed:
            variants[name] = VARIANTS[name]
    delta_net = peer(torch)
    lines = []
    for shape in args.shapes.split(",")[: 1 if args.quick else None]:
        B, T, H = shape_of(shape)
        calls = {}
        if delta_net is not None:
            q, k, v, g, beta, _ = inputs(torch, B, T, H)
            calls["Gated DeltaNet"] = passes(torch, delta_net, (q, k, v, g, beta))
        for name, (solver, ridge, memory) in variants.items():
            q, k, v, g, _, a = inputs(torch, B, T, H, memory)
            f = ours(kalmanet, solver, ridge)
            if ridge is None:
                calls[name] = passes(torch, f, (q, k, v, g, a))
            else:
                calls[name] = passes(torch, lambda *ts, f=f: f(*ts, None), (q, k, v, g))
        forward = timer.medians([f for f, _ in calls.values()])
        both = timer.medians([f for _, f in calls.values()])
        for name, f_ms, b_ms, (_, f) in zip(calls, forward, both, calls.values()):
            line = {"shape": shape, "what": name, "forward_ms": f_ms, "forward_backward_ms": b_ms}
            if delta_net is not None:
                line |= {"forward_ratio": f_ms / forward[0], "both_ratio": b_ms / both[0]}
            line["peak_mib"] = peak(torch, f)
            lines.append(line)
            ratios = f"{line['forward_ratio']:5.2f} {line['both_ratio']:5.2f}" if delta_net else ""
            print(
                f"{shape:12} {name:24} forward {f_ms:7.3f}  and backward {b_ms:7.3f}  "
                f"of the peer's {ratios}  peak {line['peak_mib']:6.0f} MiB",
                flush=True,
            )
        del calls
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sys.exit(0 if len(variants) == len(VARIANTS) else 1)


if __name__ == "__main__":
    main()
