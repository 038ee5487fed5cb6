#!/usr/bin/env python3
"""Forward and backward of the operators beside the best PyTorch eager version, turn by turn.

benchmarks/run calls it. Both versions run in one process on the same tensors and threads; before
anything is timed their outputs and gradients are compared, and the eager version's chunk length and
group size are chosen by trial, which counts in its favour.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from eager_gka import EagerGka

SEED = 20261123
RIDGE, NUM_ITER = 0.02, 30
NAMES = ("dq", "dk", "dv", "dg", "dalpha", "dbeta")


def flops(T, H, K, V, num_iter):
    """Operations of forward and of backward: benchmarks/flops.hpp, which has the derivation."""
    C = 64
    product = 2 * C * K * K + 4 * C * C * K
    states = 2 * C * K * K + 2 * C * K * V
    gram, norms = 2 * C * C * K, 2 * C**3 + 2 * C * K * K
    read = 2 * C * K * V + 2 * C * C * (K + V)
    forward = num_iter * product + states + gram + norms + read
    backward = (
        forward
        + 2 * read
        + 2 * C * K * V
        + 3 * product
        + (2 * C**3 + 2 * C * C * K + 2 * C * K * K)
        + 4 * C * K * K
    )
    return T * H / C * forward, T * H / C * backward


def make_inputs(T, H, K):
    gen = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    unit = torch.nn.functional.normalize
    return {
        "q": unit(normal(1, T, H, K), dim=-1),
        "k": unit(normal(1, T, H, K), dim=-1),
        "v": normal(1, T, H, K),
        "g": -0.04 * torch.rand(1, T, H, generator=gen),
        "alpha": normal(1, T, H).sigmoid(),
        "beta": normal(1, T, H).sigmoid(),
    }, normal(1, T, H, K)


def run_ours(inputs, d_o):
    """The operators as autograd calls them: x_t kept from the forward."""
    ops = torch.ops.kalmanet
    tensors = dict(inputs, gk=inputs["g"])
    settings = {"ridge_ratio": RIDGE, "num_iter": NUM_ITER}
    o, _, _, x, _ = ops.gka_forward(**tensors, **settings, save_x=True)
    dq, dk, dv, dg, dgk, dalpha, dbeta = ops.gka_backward(**tensors, **settings, x=x, d_o=d_o)[:7]
    return o, dq, dk, dv, dg + dgk, dalpha, dbeta


def run_eager(inputs, d_o, C, group):
    leaves = [t.detach().requires_grad_() for t in inputs.values()]
    o = EagerGka.apply(*leaves, RIDGE, NUM_ITER, C, group)
    return o.detach(), *torch.autograd.grad(o, leaves, d_o)


# glibc gives large blocks back to the system at once, and every fresh tensor would cost page
# faults: about 15% of the eager version's time. These keep freed memory; they are read when a
# process starts.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def seconds_of(work):
    begin, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - cpu


def check(inputs, d_o, C, group, spoil):
    """Worst relative difference over o and the gradients; exits where it is no rounding error."""
    ours, eager = run_ours(inputs, d_o), run_eager(inputs, d_o, C, group)
    worst = 0.0
    for name, a, b in zip(("o", *NAMES), ours, eager):
        difference = ((a.double() * (1.001 if spoil else 1) - b).norm() / b.double().norm()).item()
        bound = 2e-5 if name == "o" else 2e-4  # both are float32: twice the bounds of the tests
        if not difference <= bound:
            sys.exit(
                f"eager_peer: refused to time a wrong answer: {name} of the two versions differs "
                f"by {difference:.2e} (at most {bound:.0e} allowed)"
            )
        worst = max(worst, difference / bound)
    return worst


def choose(inputs, d_o, candidates):
    """The fastest (C, group) of the eager version, by the processor time of one thread, the better
    of two runs."""
    times = {}
    for candidate in candidates:
        times[candidate] = min(
            seconds_of(lambda c=candidate: run_eager(inputs, d_o, *c))[1] for _ in range(2)
        )
    return min(times, key=times.get), times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[1]
    parser.add_argument(
        "--library", default=root / "build/release/src/torch/libkalmanet_torch.so", type=Path
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=90, help="no new round after that")
    parser.add_argument("--quick", action="store_true", help="seconds: is everything still there?")
    parser.add_argument("--spoil", action="store_true", help="wrong answers, to be refused")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    if not args.library.is_file():
        sys.exit(f"eager_peer: no {args.library}; build the target kalmanet_torch first")
    torch.ops.load_library(str(args.library.resolve()))
    torch.set_num_threads(1)  # for the check and the choice

    T, H, K = (512, 2, 64) if args.quick else (4096, 4, 128)
    rounds = 2 if args.quick else args.rounds
    inputs, d_o = make_inputs(T, H, K)
    worst = check(inputs, d_o, 64, 0, args.spoil)
    print(f"gate passed: the two versions agree (largest difference {worst:.0%} of its bound)")
    # 0: every chunk-head in one batch. Otherwise that many of them at a time in the solver.
    candidates = [(16, 32), (32, 0), (32, 8), (32, 16), (64, 0), (64, 8), (64, 16)]
    if args.quick:
        candidates = [(64, 0), (32, 8)]
    best, times = choose(inputs, d_o, candidates)
    check(inputs, d_o, *best, args.spoil)
    torch.set_num_threads(args.threads)
    batched = (64, 0)  # as the issue words it: C = 64, all in one batch

    work = {
        "ours": lambda: run_ours(inputs, d_o),
        "eager": lambda: run_eager(inputs, d_o, *best),
        "eager_batched": lambda: run_eager(inputs, d_o, *batched),
    }
    wall, cpu = {name: [] for name in work}, {name: [] for name in work}
    # OpenMP's threads wait for each other after every operation: on a machine that is busy with
    # other work the eager version can take a hundred times as long.
    deadline = time.monotonic() + args.seconds
    for _ in range(rounds):
        if wall["ours"] and time.monotonic() > deadline:
            print(f"eager_peer: stopped after {len(wall['ours'])} rounds: the machine is busy")
            break
        for name, call in work.items():
            spent = seconds_of(call)
            wall[name].append(spent[0])
            cpu[name].append(spent[1])
            time.sleep(0.02)  # for waiting threads of the one to leave the other its cores
    operations = sum(flops(T, H, K, K, NUM_ITER))
    result = {
        "torch": torch.__version__,
        "threads": args.threads,
        "rounds": len(wall["ours"]),
        "instruction_set": torch.ops.kalmanet.instruction_set(),
        "shape": {"B": 1, "T": T, "H": H, "K": K, "V": K},
        "eager_chunk": best[0],
        "eager_group": best[1],
        "tried_cpu_ms": {f"C={c} group={g or 'all'}": 1e3 * t for (c, g), t in times.items()},
    }
    for name in work:
        result[name] = {
            "ms": 1e3 * statistics.median(wall[name]),
            "ms_min": 1e3 * min(wall[name]),
            "ms_max": 1e3 * max(wall[name]),
            "cpu_ms": 1e3 * statistics.median(cpu[name]),
            "gflops": 1e-9 * operations / statistics.median(wall[name]),
        }
    for name in ("eager", "eager_batched"):
        ratios = [e / o for e, o in zip(wall[name], wall["ours"])]
        result[f"{name}_over_ours"] = statistics.median(ratios)
        result[f"{name}_over_ours_range"] = [min(ratios), max(ratios)]
    # One thread each, by its processor time: the ratio that a busy machine cannot disturb much.
    torch.set_num_threads(1)
    one = {"ours": [], "eager": []}
    for _ in range(1 if args.quick else 3):
        for name, spent in one.items():
            spent.append(seconds_of(work[name])[1])
    result["one_thread"] = {
        "ours_ms": 1e3 * statistics.median(one["ours"]),
        "eager_ms": 1e3 * statistics.median(one["eager"]),
        "eager_over_ours": statistics.median(one["eager"]) / statistics.median(one["ours"]),
        "ours_gflops": 1e-9 * operations / statistics.median(one["ours"]),
        "eager_gflops": 1e-9 * operations / statistics.median(one["eager"]),
    }
    for name in work:
        r = result[name]
        print(
            f"{name:14} {r['ms']:8.1f} ms ({r['ms_min']:.1f} .. {r['ms_max']:.1f}), "
            f"{r['gflops']:6.1f} GFLOP/s, {r['cpu_ms']:.0f} ms of processor time"
        )
    print(
        f"ours is {result['eager_over_ours']:.2f} times as fast as eager (C={best[0]}, group="
        f"{best[1] or 'all'}), {result['eager_batched_over_ours']:.2f} times as fast as eager with "
        f"C=64 and all chunk-heads in one batch; on one thread each, by its processor time, "
        f"{result['one_thread']['eager_over_ours']:.2f} times as fast as the former"
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
