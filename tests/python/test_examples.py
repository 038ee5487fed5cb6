"""The programs in examples/python run, and come out right."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from cases import ROOT


def run(name):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "python" / name],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def test_train_layer():
    losses = [float(n) for n in re.findall(r"loss ([\d.]+)", run("train_layer.py"))]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0], losses


def test_with_jax():
    needs("jax")
    import test_jax  # names the library

    losses = [float(n) for n in re.findall(r"loss ([\d.]+)", run("with_jax.py"))]
    assert test_jax.jax and losses[1] < 0.5 * losses[0], losses


def test_stream():
    needs("transformers")
    assert "the same text in one go: True" in run("stream.py")


def test_fine_tune():
    needs("transformers", "accelerate")
    line = re.search(r"^losses (.*)$", run("fine_tune.py"), re.MULTILINE)
    losses = [float(n) for n in line.group(1).split()]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0], losses
