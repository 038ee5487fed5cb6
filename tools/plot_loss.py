#!/usr/bin/env python3
"""Draw the loss curve of a training run: plot_loss.py metrics.jsonl loss.png"""

import json
import math
import sys

import picture


def draw(pyplot, path):
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    valid = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), alpha=0.6, linewidth=1, label="training")
    if valid:
        axes.plot(*zip(*valid, strict=True), marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a byte)")
    bits = axes.secondary_yaxis(
        "right", functions=(lambda x: x / math.log(2), lambda x: x * math.log(2))
    )
    bits.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.exit(picture.run(draw))
