"""The command, a text and a finished run, for the tests of this folder."""

import sys
from pathlib import Path

import pytest

# Modules beside this one are imported by name (pytest's importlib mode adds no folder).
sys.path.insert(0, str(Path(__file__).parent))

from command import Command, find_command  # noqa: E402


@pytest.fixture(scope="session")
def kalmanet():
    command = Command()
    command.path = find_command()
    return command


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"line {i * 7919 % 1000} of a text about nothing.\n" for i in range(600))
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def run(kalmanet, text, tmp_path_factory):
    """A finished run of 30 steps; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    kalmanet.train(text, out, "--steps", 30, "--lr", 0.01, "--eval-every", 10)
    return out
