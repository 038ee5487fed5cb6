#!/usr/bin/env python3
"""One table and one picture of what benchmarks/run measured: report.py build/bench [--docs].

--docs also writes them into docs/performance.md, between its two marks.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: benchmarks/run --docs -->", "<!-- end of figures -->"


def read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def table(head, rows):
    """Markdown whose columns line up, so that it also reads well on a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines
    )


def verdict(good):
    return "yes" if good else "NO"


def case(kernels, name):
    for run in kernels["benchmarks"]:
        if run["name"].startswith(name + "/"):
            return run
    return None


def measured(kernels, prefix):
    """(rest of the name, case) of every timed case whose name starts so."""
    for run in kernels["benchmarks"]:
        name = run["name"].split("/iterations")[0]
        if name.startswith(prefix) and not run.get("error_occurred"):
            yield name[len(prefix) :], run


def sequence_rows(kernels):
    rows = []
    for prefix in ("forward/", "forward_backward/"):
        for isa, run in measured(kernels, prefix):
            rows.append(
                [
                    prefix.strip("/").replace("_", "+"),
                    isa,
                    f"{run['ms']:.0f} (best {run['ms_min']:.0f})",
                    f"{run['gflops']:.0f}",
                    f"{run['openblas_gflops']:.0f}",
                    f"{run['ratio']:.0%} ({run['ratio_min']:.0%} .. {run['ratio_max']:.0%})",
                    f"{run['one_thread_gflops']:.0f} / {run['one_thread_openblas_gflops']:.0f}"
                    f" = {run['one_thread_ratio']:.0%}",
                ]
            )
    return rows


def decode_rows(kernels):
    rows = []
    for rest, run in measured(kernels, "decode/"):
        K, H, isa = rest.split("/")
        rows.append(
            [
                K.split(":")[1],
                H.split(":")[1],
                isa,
                f"{run['us_per_head']:.1f}",
                f"{run['openblas_us']:.1f}",
                f"{run['ratio']:.2f} ({run['ratio_min']:.2f} .. {run['ratio_max']:.2f})",
            ]
        )
    return rows


def decode_text(kernels):
    """What was decoded, and what a state of few keys costs at most."""
    runs = [run for _, run in measured(kernels, "decode/")]
    text = "Decode, microseconds a token and head of processor time, one thread"
    if not runs:
        return text + ":"
    many, few = runs[0]["state_keys"], runs[0]["few_keys"]
    dearer = max(run["few_keys_over_ours"] for run in runs)
    return (
        f"{text}, from a state that {many:.0f} different keys have filled (one of only {few:.0f} "
        f"may be solved in float64, see numerics.md, and costs up to {dearer:.1f} times as much):"
    )


def lengths(run):
    return sorted(int(name[4:]) for name in run if name.startswith("us_T"))


def length_rows(run):
    return [
        [
            f"{T}",
            f"{run[f'us_T{T}']:.2f} ({run[f'us_min_T{T}']:.2f} .. {run[f'us_max_T{T}']:.2f})",
            f"{run[f'cpu_us_T{T}']:.2f}",
        ]
        for T in lengths(run)
    ]


def timed_by_clock(eager):
    """Whether PyTorch's threads were left alone enough for their time by the clock to mean much."""
    return eager["rounds"] >= 3 or eager["shape"]["T"] < 4096


def eager_rows(eager):
    settings = {
        "ours": f"operators, {eager['instruction_set']}",
        "eager": f"eager, C = {eager['eager_chunk']}, "
        f"{eager['eager_group'] or 'all'} chunk-heads at a time (fastest)",
        "eager_batched": "eager, C = 64, all chunk-heads in one batch",
    }
    rows = []
    for name, text in settings.items():
        r = eager[name]
        slower = "1"
        if name != "ours":
            low, high = eager[f"{name}_over_ours_range"]
            slower = f"{eager[f'{name}_over_ours']:.2f} ({low:.2f} .. {high:.2f})"
        rows.append([text, f"{r['ms']:.0f} (best {r['ms_min']:.0f})", f"{r['gflops']:.0f}", slower])
    return rows


def bars(kernels, eager):
    """The promises of this page and what was measured."""
    rows = []

    def add(what, bar, values, good):
        """The figure of all threads by the clock and of one thread by its processor time."""
        texts = ["-" if value is None else f"{value:.2f}" for value in values]
        met = all(good(value) for value in values if value is not None)
        rows.append([what, bar, *texts, verdict(met)])

    fastest = kernels["context"]["instruction_set"]
    forward = case(kernels, f"forward/{fastest}")
    if forward and "ratio" in forward:
        add(
            "forward, GFLOP/s over OpenBLAS's sgemm",
            ">= 0.50",
            [forward["ratio"], forward["one_thread_ratio"]],
            lambda value: value >= 0.5,
        )
    if eager:
        add(
            "forward+backward, times as fast as PyTorch eager",
            ">= 1.50",
            [
                eager["eager_over_ours"] if timed_by_clock(eager) else None,
                eager["one_thread"]["eager_over_ours"],
            ],
            lambda value: value >= 1.5,
        )
    spread = next((run for _, run in measured(kernels, "time_per_token")), None)
    if spread:
        add(
            "time a token, slowest length over fastest",
            "<= 1.15",
            [1 + spread["spread"], 1 + spread["cpu_spread"]],
            lambda value: value <= 1.15,
        )
    for rest, run in measured(kernels, "decode/"):
        if rest.endswith(fastest):
            K, H, _ = rest.split("/")
            good = verdict(run["ratio"] <= 2)
            what = f"decode over 31 sgemv, K = {K[2:]}, {H[2:]} heads"
            rows.append([what, "<= 2.00", "-", f"{run['ratio']:.2f}", good])
    return table(["what", "bar", "by the clock", "by processor time", "met"], rows)


def speed_rows(speed):
    rows = []
    for context in dict.fromkeys(r["context"] for r in speed["results"]):
        by_name = {r["model"]: r for r in speed["results"] if r["context"] == context}
        gka, attention = by_name["gka"], by_name["attention"]
        rows.append([f"{context} x {gka['batch']}"])
        for r in (gka, attention):
            rows[-1].append(
                f"{r['tokens_per_second']:.0f} ({r['slowest']:.0f} .. {r['fastest']:.0f})"
            )
        rows[-1].append(f"{gka['tokens_per_second'] / attention['tokens_per_second']:.2f}")
    return rows


def report(kernels, eager, speed):
    context = kernels["context"]
    load = context["load_avg"][0]
    parts = [
        f"{processor()}, {context['threads']} threads, {context['instruction_set']}; "
        f"OpenBLAS's kernels: {context['openblas_core']}"
        + (f"; PyTorch {eager['torch']}" if eager else "")
        + f". {context['date'][:10]}; processes that wanted a core when it began: {load:.1f}.",
        bars(kernels, eager),
        f"{case(kernels, 'forward')['label']}, chebyshev(30), GFLOP/s; OpenBLAS is its square "
        "matrix product. The last column is one thread each, by its processor time: ours / "
        "OpenBLAS.",
        table(
            ["pass", "code", "ms", "ours", "OpenBLAS", "ratio (range)", "one thread"],
            sequence_rows(kernels),
        ),
    ]
    if eager:
        one = eager["one_thread"]
        parts += [
            f"Forward and backward of the same problem beside PyTorch {eager['torch']} eager. On "
            f"one thread each, by its processor time: {one['ours_ms']:.0f} and "
            f"{one['eager_ms']:.0f} ms, {one['ours_gflops']:.0f} and {one['eager_gflops']:.0f} "
            f"GFLOP/s, {one['eager_over_ours']:.2f} times.",
            table(["version", "ms", "GFLOP/s", "times ours (range)"], eager_rows(eager))
            if timed_by_clock(eager)
            else "By the clock the machine was too busy: PyTorch's threads wait for each other "
            "after every operation. Run it again on an idle machine.",
        ]
    spread = next((run for _, run in measured(kernels, "time_per_token")), None)
    if spread:
        parts += [
            f"Microseconds a token ({spread['label']}); the longest takes "
            f"{1 + spread['spread']:.2f} times the shortest, by processor time "
            f"{1 + spread['cpu_spread']:.2f}:",
            table(["T", "us a token (range)", "processor time"], length_rows(spread)),
        ]
    parts += [
        decode_text(kernels),
        table(
            ["K = V", "heads", "code", "ours", "31 sgemv", "ratio (range)"], decode_rows(kernels)
        ),
    ]
    if speed:
        parts += [
            f"Training, tokens/s (slowest .. fastest turn), {speed['threads']} threads, the "
            "4-layer model of width 128:",
            table(["context x batch", "GKA", "attention", "GKA / attention"], speed_rows(speed)),
        ]
    return "\n\n".join(parts) + "\n"


def draw(kernels, path):
    run = next((run for _, run in measured(kernels, "time_per_token")), None)
    if run is None:
        return False
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed; run: make setup", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    T = lengths(run)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(T, [run[f"us_T{t}"] for t in T], marker="o", label="median")
    axes.fill_between(
        T,
        [run[f"us_min_T{t}"] for t in T],
        [run[f"us_max_T{t}"] for t in T],
        alpha=0.2,
        label="fastest .. slowest round",
    )
    axes.plot(T, [run[f"cpu_us_T{t}"] for t in T], marker=".", label="processor time, all threads")
    axes.set_xscale("log", base=2)
    axes.set_xticks(T, [f"{t // 1024}k" for t in T])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens in the sequence", ylabel="microseconds a token")
    axes.set_title(f"forward, chebyshev(30), {run['label']}, float32", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return True


def write_docs(text, picture):
    page = ROOT / "docs/performance.md"
    old = page.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        sys.exit(f"report: {page} has no line {BEGIN} or {END}")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    new = page.with_suffix(".new")
    new.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
    os.replace(new, page)
    if picture.is_file():
        shutil.copyfile(picture, ROOT / "docs/time_per_token.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    kernels = read(args.folder / "kernels.json")
    if kernels is None:
        sys.exit(f"report: no {args.folder / 'kernels.json'}; run: make bench")
    text = report(kernels, read(args.folder / "eager.json"), read(args.folder / "speed.json"))
    (args.folder / "report.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    picture = args.folder / "time_per_token.png"
    if draw(kernels, picture):
        print(f"picture: {picture}")
    if args.docs:
        write_docs(text, picture)


if __name__ == "__main__":
    main()
