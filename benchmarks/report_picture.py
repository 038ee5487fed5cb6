"""The picture of the report: time a token over the length, and what a token costs by solver."""

import sys

from report_sequences import SOLVERS
from report_text import lengths, only, variants

COLORS = {"chebyshev(30)": "#2a78d6", "direct": "#eb6834"}
SURFACE, INK, MUTED, GRID = "#fcfcfb", "#0b0b0b", "#52514e", "#e4e3df"


def style(axes):
    axes.set_facecolor(SURFACE)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def draw_lengths(axes, run):
    style(axes)
    for solver in SOLVERS:
        us = lengths(run, solver, "cpu_us")
        axes.plot(list(us), list(us.values()), marker="o", linewidth=2, color=COLORS[solver])
        last = list(us)[-1]
        axes.annotate(
            solver, (last, us[last]), (0, 8), textcoords="offset points", ha="right", color=INK
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(us), [f"{T // 1024}k" for T in us])
    axes.minorticks_off()
    axes.set_ylim(bottom=0, top=1.25 * axes.get_ylim()[1])
    axes.set_xlabel("tokens in the sequence", color=MUTED)
    axes.set_title(f"Microseconds a token, forward, {run['label']}", color=INK, fontsize=10)


def draw_solvers(axes, kernels):
    """Microseconds a token and head on one thread, bar by bar."""
    style(axes)
    bars = []
    for pass_name in ("forward", "forward_backward"):
        run = only(kernels, f"sequence/solvers/memory:256/{pass_name}")
        tokens = 1
        for part in (run["label"] if run else "").split():
            name, value = part.split("=")
            tokens *= int(value) if name in "TH" else 1
        for solver in SOLVERS:
            if run and solver in variants(run):
                bars.append((pass_name, solver, 1e3 * variants(run)[solver]["one_ms"] / tokens))
    for i, (_, solver, us) in enumerate(bars):
        x = i + (0.6 if i >= 2 else 0)
        axes.bar(x, us, width=0.9, color=COLORS[solver], edgecolor=SURFACE, linewidth=1.5)
        axes.annotate(
            f"{us:.1f}", (x, us), (0, 3), textcoords="offset points", ha="center", color=INK
        )
    ticks = [i + (0.6 if i >= 2 else 0) for i in range(len(bars))]
    words = {"forward": "forward", "forward_backward": "forward\n+ backward"}
    names = [f"{solver}\n{words[pass_name]}" for pass_name, solver, _ in bars]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_ylim(top=1.1 * axes.get_ylim()[1])
    axes.set_title("Microseconds a token and head, one thread", color=INK, fontsize=10)


def draw(kernels, path):
    """Writes the picture; False where there is nothing to draw or nothing to draw with."""
    run = only(kernels, "lengths/forward")
    if run is None:
        return False
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed; run: make setup", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), layout="constrained", facecolor=SURFACE
    )
    draw_lengths(left, run)
    draw_solvers(right, kernels)
    figure.suptitle("K = V = 128, float32, memory 256, by processor time", color=MUTED, fontsize=9)
    figure.savefig(path, dpi=130)
    return True
