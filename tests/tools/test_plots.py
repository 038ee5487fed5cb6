"""The plot scripts draw what the command writes, and say by their exit code why they cannot."""

import json
import subprocess
import sys

import pytest

LOSSES = [{"step": s, "loss": 5.0 / s} for s in (1, 2, 3)] + [{"step": 3, "valid_loss": 2.0}]
RECALL = {
    "pairs": 4,
    "layers": 2,
    "width": 32,
    "heads": 1,
    "runs": [
        {
            "description": "GKA",
            "accuracy": 0.5,
            "curve": [{"step": s, "accuracy": s / 4, "loss": 7.0 / s} for s in (1, 2)],
        }
    ],
}
SCRIPTS = {
    "plot_loss.py": "\n".join(map(json.dumps, LOSSES)),
    "plot_recall.py": json.dumps(RECALL),
}


@pytest.fixture(params=SCRIPTS)
def plot(request, root, tmp_path):
    data, picture = tmp_path / "data", tmp_path / "picture.png"
    data.write_text(SCRIPTS[request.param])

    def run(*arguments, python=(sys.executable,)):
        command = [*python, root / "tools" / request.param, *(arguments or (data, picture))]
        return subprocess.run(command, capture_output=True, text=True, timeout=120), picture

    return run


def test_a_picture(plot):
    pytest.importorskip("matplotlib")
    done, picture = plot()
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(plot, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done, picture = plot(python=("env", f"PYTHONPATH={tmp_path}", sys.executable))
    assert done.returncode == 3, done.stderr
    assert not picture.exists()


def test_usage(plot):
    done, _ = plot("only one")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: plot_")
