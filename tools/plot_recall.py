#!/usr/bin/env python3
"""Draw recall.json of `kalmanet experiment recall`: accuracy and loss of every variant."""

import json
import sys


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: plot_recall.py recall.json recall.png", file=sys.stderr)
        return 2
    try:
        import matplotlib
    except ImportError:
        return 3  # the command says what to install
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(sys.argv[1], encoding="utf-8") as file:
        data = json.load(file)
    figure, (accuracy, loss) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in data["runs"]:
        steps = [point["step"] for point in run["curve"]]
        label = f"{run['description']} ({run['accuracy']:.3f})"
        accuracy.plot(steps, [point["accuracy"] for point in run["curve"]], label=label)
        loss.plot(steps, [point["loss"] for point in run["curve"]], label=run["description"])
    accuracy.set(xlabel="step", ylabel="accuracy at the asked keys", ylim=(0, 1.02))
    loss.set(xlabel="step", ylabel="loss (nats)")
    accuracy.legend(loc="lower right", fontsize=8)
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Associative recall: {data['pairs']} pairs, {data['layers']} layers of width "
        f"{data['width']}, {data['heads']} head(s)"
    )
    figure.savefig(sys.argv[2], dpi=130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
