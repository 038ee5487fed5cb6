#!/usr/bin/env python3
"""Draw accuracy and loss of every variant: plot_recall.py recall.json recall.png

recall.json comes from `kalmanet experiment recall`.
"""

import json
import sys

import picture


def draw(pyplot, path):
    with open(path, encoding="utf-8") as file:
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
    return figure


if __name__ == "__main__":
    sys.exit(picture.run(draw))
