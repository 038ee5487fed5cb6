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
RIDGE, NUM_ITER, TOLERANCE, MEMORY = 0.02, 30, 1e-5, 256
SOLVERS = {"chebyshev": ("chebyshev", NUM_ITER), "direct": ("direct", TOLERANCE)}
NAMES = ("dq", "dk", "dv", "dg", "dalpha", "dbeta")


def flops(T, H, K, V, solver):
    """Operations of forward and backward: benchmarks/flops.hpp, which has the derivation."""
    C = 64
    product = 2 * C * K * K + 4 * C * C * K
    if solver == "direct":
        solve = K**3 + 2 * C * K * K + 2 * C * C * K + 2 * C**3 / 3 + 5 * (product + 2 * C**3)
    else:
        solve = NUM_ITER * product
    states = 2 * C * K * K + 2 * C * K * V
    gram, norms = 2 * C * C * K, 2 * C**3 + 2 * C * K * K
    read = 2 * C * K * V + 2 * C * C * (K + V)
    forward = solve + states + gram + norms + read
    backward = (
        forward
        + 2 * read
        + 2 * C * K * V
        + 3 * product
        + (2 * C**3 + 2 * C * C * K + 2 * C * K * K)
        + 4 * C * K * K
    )
    return T * H / C * (forward + backward)


def make_inputs(T, H, K):
    gen = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    unit = torch.nn.functional.normalize
    return {
        "q": unit(normal(1, T, H, K), dim=-1),
        "k": unit(normal(1, T, H, K), dim=-1),
        "v": normal(1, T, H, K),
        "g": -2 / MEMORY * torch.rand(1, T, H, generator=gen),
        "alpha": normal(1, T, H).sigmoid(),
        "beta": normal(1, T, H).sigmoid(),
    }, normal(1, T, H, K)


def run_ours(inputs, d_o, solver):
    """The operators as autograd calls them: x_t and segment states kept from the forward."""
    ops = torch.ops.kalmanet
    tensors = dict(inputs, gk=inputs["g"])
    settings = {"ridge_ratio": RIDGE, "num_iter": NUM_ITER, "solver": solver}
    o, _, _, x, _, states = ops.gka_forward(**tensors, **settings, save_x=True)
    kept = {"x": x, "segment_states": states}
    dq, dk, dv, dg, dgk, dalpha, dbeta = ops.gka_backward(**tensors, **settings, **kept, d_o=d_o)[
        :7
    ]
    return o, dq, dk, dv, dg + dgk, dalpha, dbeta


def run_eager(inputs, d_o, solver, C, group):
    leaves = [t.detach().requires_grad_() for t in inputs.values()]
    o = EagerGka.apply(*leaves, RIDGE, SOLVERS[solver], C, group)
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


def check(inputs, d_o, solver, C, group, spoil):
    """Worst relative difference over o and the gradients; exits where it is no rounding error."""
    ours, eager = run_ours(inputs, d_o, solver), run_eager(inputs, d_o, solver, C, group)
    worst = 0.0
    for name, a, b in zip(("o", *NAMES), ours, eager):
        difference = ((a.double() * (1.001 if spoil else 1) - b).norm() / b.double().norm()).item()
        bound = 2e-5 if name == "o" else 2e-4  # both are float32: twice the bounds of the tests
        if not difference <= bound:
            sys.exit(
                f"eager_peer: refused to time a wrong answer: {solver}, {name} of the two versions "
                f"differs by {difference:.2e} (at most {bound:.0e} allowed)"
            )
        worst = max(worst, difference / bound)
    return worst


# Chunk length and how many chunk-heads the solver takes at a time; 0: all in one batch.
CANDIDATES = {
    "chebyshev": [(16, 32), (32, 0), (32, 8), (32, 16), (64, 0), (64, 8), (64, 16)],
    "direct": [(32, 0), (32, 8), (32, 16), (32, 32), (64, 0), (64, 8), (64, 16), (128, 4)],
}


def choose(inputs, d_o, solver, candidates):
    """The fastest (C, group) of an eager version, by the processor time of one thread, the better
    of two runs."""
    times = {}
    for candidate in candidates:
        times[candidate] = min(
            seconds_of(lambda c=candidate: run_eager(inputs, d_o, solver, *c))[1] for _ in range(2)
        )
    return min(times, key=times.get), times


def measure(work, rounds, seconds):
    """Turn by turn: {name: [seconds by the clock]}, {name: [seconds of processor time]}."""
    wall, cpu = {name: [] for name in work}, {name: [] for name in work}
    # OpenMP's threads wait for each other after every operation: on a machine that is busy with
    # other work the eager versions can take a hundred times as long.
    deadline = time.monotonic() + seconds
    first = next(iter(work))
    for _ in range(rounds):
        if wall[first] and time.monotonic() > deadline:
            print(f"eager_peer: stopped after {len(wall[first])} rounds: the machine is busy")
            break
        for name, call in work.items():
            spent = seconds_of(call)
            wall[name].append(spent[0])
            cpu[name].append(spent[1])
            time.sleep(0.02)  # for waiting threads of the one to leave the other its cores
    return wall, cpu


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
    inputs, d_o = make_inputs(T, H, K)
    best, tried = {}, {}
    for solver in SOLVERS:
        worst = check(inputs, d_o, solver, 64, 0, args.spoil)
        print(f"gate passed: {solver}: both versions agree (difference {worst:.0%} of its bound)")
        candidates = [(64, 0), (32, 8)] if args.quick else CANDIDATES[solver]
        best[solver], tried[solver] = choose(inputs, d_o, solver, candidates)
        check(inputs, d_o, solver, *best[solver], args.spoil)
    torch.set_num_threads(args.threads)

    # The name of the solver; whose; the eager versions' chunk and group.
    versions = {
        "ours_direct": ("direct", None),
        "ours_chebyshev": ("chebyshev", None),
        "eager_chebyshev": ("chebyshev", best["chebyshev"]),
        # As the first issue words it: C = 64, all in one batch.
        "eager_chebyshev_batched": ("chebyshev", (64, 0)),
        "eager_direct": ("direct", best["direct"]),
    }

    def call(solver, chunking):
        if chunking is None:
            return lambda: run_ours(inputs, d_o, solver)
        return lambda: run_eager(inputs, d_o, solver, *chunking)

    work = {name: call(*version) for name, version in versions.items()}
    wall, _ = measure(work, 2 if args.quick else args.rounds, args.seconds)
    # One thread each, by its processor time: ratios that a busy machine cannot disturb much.
    torch.set_num_threads(1)
    _, one = measure(work, 1 if args.quick else 3, args.seconds)
    result = {
        "torch": torch.__version__,
        "threads": args.threads,
        "rounds": len(wall["ours_direct"]),
        "instruction_set": torch.ops.kalmanet.instruction_set(),
        "shape": {"B": 1, "T": T, "H": H, "K": K, "V": K},
        "memory": MEMORY,
        "tried_cpu_ms": {
            f"{solver} C={C} group={group or 'all'}": 1e3 * seconds
            for solver, times in tried.items()
            for (C, group), seconds in times.items()
        },
        "versions": {},
    }
    for name, (solver, chunking) in versions.items():
        operations = flops(T, H, K, K, solver)

        def over_ours(times, name=name):
            return [a / b for a, b in zip(times[name], times["ours_direct"])]

        result["versions"][name] = {
            "solver": solver,
            "chunk": chunking[0] if chunking else None,
            "group": chunking[1] if chunking else None,
            "gflop": 1e-9 * operations,
            "ms": 1e3 * statistics.median(wall[name]),
            "ms_min": 1e3 * min(wall[name]),
            "ms_max": 1e3 * max(wall[name]),
            "gflops": 1e-9 * operations / statistics.median(wall[name]),
            "over_ours": statistics.median(over_ours(wall)),
            "over_ours_range": [min(over_ours(wall)), max(over_ours(wall))],
            "one_ms": 1e3 * statistics.median(one[name]),
            "one_gflops": 1e-9 * operations / statistics.median(one[name]),
            "one_over_ours": statistics.median(over_ours(one)),
        }
    for name, r in result["versions"].items():
        print(
            f"{name:24} {r['ms']:8.1f} ms ({r['ms_min']:.1f} .. {r['ms_max']:.1f}), "
            f"{r['gflops']:6.1f} GFLOP/s, {r['over_ours']:.2f} times ours_direct; one thread "
            f"{r['one_ms']:.0f} ms, {r['one_gflops']:.1f} GFLOP/s, {r['one_over_ours']:.2f} times"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
