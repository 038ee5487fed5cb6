#!/usr/bin/env python3
"""The Python layer beside the C++ layer, turn by turn in one process, from the same weights.

    benchmarks/python_layer.py [--build build/release] [--quick] [--tokens 512 1024 2048]
        [--width 1024 2048] [--solver chebyshev direct] [--threads 1] [--rounds 15]
        [--default-malloc] [--out FILE]

Both layers are called from Python (libkalmanet_layer_class.so makes the C++ one a class of it), so
that they share process, allocator, thread pool and clock. Nothing is timed before outputs and
gradients agree bit for bit. A figure is the median, over rounds, of one layer's seconds over the
other's next to it; which of the two goes first changes each round. Seconds are the process's own
(other programs on the machine slow the clock, these hardly); with --threads above 1, the clock's.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEED = 20261124


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release")
    parser.add_argument("--quick", action="store_true", help="does it run? its figures say nothing")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--solver", nargs="+", default=["chebyshev", "direct"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--default-malloc", action="store_true", help="freed memory is not kept")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.width, arguments.rounds = [64], [128], 2
    return arguments


def pair(torch, kalmanet, D, solver):
    """A Python layer and a C++ layer, D wide, heads of 128, on the same memory: where weights
    happen to lie is worth 2% of a product."""
    K = min(128, D // 2)
    H = D // K
    torch.manual_seed(SEED)
    mine = kalmanet.GatedKalmaNet(hidden_size=D, head_dim=K, num_heads=H, solver=solver)
    theirs = torch.classes.kalmanet_bench.Layer(D, H, H, K, solver, False)
    named = theirs.parameters()
    for name, parameter in mine.named_parameters():
        named[name].data = parameter.data
    assert sorted(named) == sorted(dict(mine.named_parameters()))
    return mine, theirs, named


def must_agree(torch, mine, theirs, named, x, dy):
    """Bit for bit: both do the same operations."""
    results = []
    for forward, parameters in (
        (lambda x: mine(x)[0], dict(mine.named_parameters())),
        (theirs.forward, named),
    ):
        x.grad = None
        y = forward(x)
        names = sorted(parameters)
        grads = torch.autograd.grad(y, [x, *(parameters[n] for n in names)], dy)
        results.append(dict(zip(["y", "dx", *("d " + n for n in names)], [y, *grads])))
    for name, want in results[1].items():
        if not torch.equal(results[0][name], want):
            sys.exit(
                f"python_layer: refused to time a wrong answer: {name} differs by "
                f"{(results[0][name] - want).abs().max().item():.1e} at most"
            )


def measure(torch, forward, parameters, x, dy, backward, clock):
    """Seconds of one call."""
    x.grad = None
    for p in parameters:
        p.grad = None
    begun = clock()
    if backward:
        forward(x).backward(dy)
    else:
        with torch.no_grad():
            forward(x)
    return clock() - begun


def compare(torch, layers, x, dy, backward, arguments):
    """Medians of both layers' seconds, and of their ratios turn by turn."""
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    for each in layers.values():  # memory is had once
        measure(torch, *each, x, dy, backward, clock)
    seconds = {name: [] for name in layers}
    for turn in range(arguments.rounds):
        for name in list(layers)[:: 1 if turn % 2 else -1]:
            seconds[name].append(measure(torch, *layers[name], x, dy, backward, clock))
    ratios = sorted(a / b for a, b in zip(seconds["python"], seconds["c++"]))
    return {
        **{name: statistics.median(s) for name, s in seconds.items()},
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def line(row):
    what = "forward+backward" if row["backward"] else "forward"
    low, high = row["quartiles"]
    return (
        f"D {row['D']:4}  T {row['T']:4}  {row['solver']:9}  {what:16}"
        f"  Python {1e3 * row['python']:8.2f} ms  C++ {1e3 * row['c++']:8.2f} ms"
        f"  ratio {row['ratio']:.3f} ({low:.3f} to {high:.3f})"
    )


def keep_freed_memory():
    """As the other benchmarks of layers do: glibc would give freed tensors back to the system; when
    depends on the order of the frees, and 2 MB of fresh pages cost half a millisecond."""
    libc = ctypes.CDLL(None)
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(option, 1 << 30)


def main():
    arguments = parse()
    if not arguments.default_malloc:
        keep_freed_memory()
    # Before torch and kalmanet: both read it when they are imported.
    library = arguments.build / "src" / "torch" / "libkalmanet_torch.so"
    os.environ["KALMANET_TORCH_LIBRARY"] = str(library.resolve())
    sys.path.insert(0, str(ROOT / "python"))
    import kalmanet
    import torch

    torch.classes.load_library(str(arguments.build / "benchmarks" / "libkalmanet_layer_class.so"))
    torch.set_num_threads(arguments.threads)
    rows = []
    for D in arguments.width:
        for solver in arguments.solver:
            mine, theirs, named = pair(torch, kalmanet, D, solver)
            layers = {
                "python": (lambda x, mine=mine: mine(x)[0], list(mine.parameters())),
                "c++": (theirs.forward, list(named.values())),
            }
            for T in arguments.tokens:
                x, dy = torch.randn(1, T, D, requires_grad=True), torch.randn(1, T, D)
                must_agree(torch, mine, theirs, named, x, dy)
                for backward in (False, True):
                    row = {
                        "D": D, "T": T, "solver": solver, "backward": backward,
                        "threads": arguments.threads,
                        **compare(torch, layers, x, dy, backward, arguments),
                    }  # fmt: skip
                    rows.append(row)
                    print(line(row), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
