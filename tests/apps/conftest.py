"""The command, a text and a finished run, for the tests of this folder."""

import shutil
import sys
from pathlib import Path

import pytest

# Modules beside this one are imported by name (pytest's importlib mode adds no folder).
sys.path.insert(0, str(Path(__file__).parent))

from command import REPORTS, Command, find_command, take_reports  # noqa: E402


def pytest_unconfigure():
    shutil.rmtree(REPORTS, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_report_of_a_sanitizer():
    """Whoever started the command, and whatever became of its output and exit code."""
    yield
    reports = take_reports()
    if reports:
        pytest.fail(f"reported by a sanitizer:\n{reports}")


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
