"""Beside PyTorch eager, a training step of the layer, and training of whole models."""

from report_text import bar, table


def timed_by_clock(eager):
    """Whether PyTorch's threads were left alone enough for their time by the clock to mean much."""
    return eager["rounds"] >= 3 or eager["shape"]["T"] < 4096


def eager_bars(eager):
    rows = []
    versions = eager["versions"]
    for peer, limit in (("eager_chebyshev", ">= 4"), ("eager_direct", ">= 2")):
        figures = []
        for field in ("ms", "one_ms"):
            ours = min(versions[name][field] for name in ("ours_direct", "ours_chebyshev"))
            figures.append(versions[peer][field] / ours)
        if not timed_by_clock(eager):
            figures[0] = None
        what = f"forward+backward, ours at its best over the best {peer.replace('_', ' ')}"
        rows.append(bar(what, limit, *figures))
    return rows


def bars(results):
    rows = eager_bars(results["eager"]) if results.get("eager") else []
    for case in results["layer"]["cases"] if results.get("layer") else ():
        if case["name"] == "direct, learned ridge":
            what = "training step of the layer over gated linear attention, direct, learned ridge"
            rows.append(bar(what, "<= 1.3", case["ratio"], case["one_ratio"]))
    return rows


def eager_section(eager):
    shape = eager["shape"]
    rows = []
    for name, v in eager["versions"].items():
        who, solver = name.split("_")[0], v["solver"]
        text = f"operators, {eager['instruction_set']}, {solver}"
        if who == "eager":
            how = f"C = {v['chunk']}, {v['group'] or 'all'} chunk-heads at a time"
            best = ", first issue's form" if name.endswith("batched") else ", fastest tried"
            text = f"eager, {solver}, {how}{best}"
        row = [text, f"{v['gflop']:.1f}"]
        if timed_by_clock(eager):
            low, high = v["over_ours_range"]
            row += [
                f"{v['ms']:.0f} (best {v['ms_min']:.0f})",
                f"{v['gflops']:.0f}",
                f"{v['over_ours']:.2f} ({low:.2f} .. {high:.2f})",
            ]
        else:
            row += ["-", "-", "-"]
        rows.append(
            [*row, f"{v['one_ms']:.0f}", f"{v['one_gflops']:.0f}", f"{v['one_over_ours']:.2f}"]
        )
    head = ["version", "GFLOP", "ms", "GFLOP/s", "times ours, direct (range)"]
    busy = (
        ""
        if timed_by_clock(eager)
        else " By the clock the machine was too busy: PyTorch's threads wait for each other after "
        "every operation."
    )
    return [
        f"Forward and backward beside PyTorch {eager['torch']} eager (T={shape['T']} "
        f"H={shape['H']} K={shape['K']} V={shape['V']}, memory {eager['memory']}, ridge "
        f"ratio 0.02, tolerance 1e-5).{busy}",
        table([*head, "1 thread: ms", "GFLOP/s", "times ours"], rows),
    ]


def layer_section(layer):
    rows = []
    for case in layer["cases"]:
        ours = case["name"] != "gated linear attention"
        rows.append(
            [
                f"GatedKalmaNet, {case['name']}" if ours else case["name"],
                f"{case['ms']:.0f} ({case['ms_min']:.0f} .. {case['ms_max']:.0f})",
                f"{case['ratio']:.2f} ({case['ratio_min']:.2f} .. {case['ratio_max']:.2f})",
                f"{case['one_ms']:.0f}",
                f"{case['one_ratio']:.2f}",
            ]
        )
    head = ["layer", "ms (range)", "times GLA (range)", "1 thread: ms", "times GLA"]
    return [
        f"A training step (forward and backward) of the layer, T={layer['T']}, D={layer['D']}, "
        f"{layer['H']} heads of {layer['K']}, batch 1, float32, beside a plain gated-linear-"
        "attention (GLA) layer of the same widths:",
        table(head, rows),
    ]


def speed_section(speed):
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
    return [
        f"Training, tokens/s (slowest .. fastest turn), {speed['threads']} threads, the "
        "4-layer model of width 128:",
        table(["context x batch", "GKA", "attention", "GKA / attention"], rows),
    ]


def sections(results):
    parts = []
    for name, section in (
        ("eager", eager_section),
        ("layer", layer_section),
        ("speed", speed_section),
    ):
        if results.get(name):
            parts += section(results[name])
    return parts
