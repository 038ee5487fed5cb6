"""How the tests run the built command; KALMANET_COMMAND names another than the newest build.

That may be a build under the sanitizers: whatever they report fails the test.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120
# Threads that wait for each other by spinning crawl where other tests share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a sanitizer finds ends the program with a code that it never uses itself. AddressSanitizer's
# reports go to files of this folder, so that no test can overlook them (UndefinedBehaviorSanitizer
# only writes to standard error beside it). PyTorch's own leaks are not ours to report.
REPORTS = Path(tempfile.mkdtemp(prefix="kalmanet-reports-"))
REPORTED = 99
for name, more in {
    "ASAN_OPTIONS": "detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1"
    f":log_path={REPORTS}/asan",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}.items():
    os.environ[name] = f"{os.environ.get(name, '')}:{more}:exitcode={REPORTED}"

# A model that trains in a second.
TINY_MODEL = ["--layers", "2", "--width", "16", "--heads", "2", "--num-iter", "10"]
TINY_RUN = [
    "--batch",
    "2",
    "--context",
    "16",
    "--warmup",
    "3",
    "--threads",
    "1",
    "--log-every",
    "1",
]


def find_command():
    named = os.environ.get("KALMANET_COMMAND")
    if named:
        return Path(named)
    built = sorted(ROOT.glob("build/*/apps/kalmanet"), key=lambda p: p.stat().st_mtime)
    if not built:
        pytest.exit("no build/*/apps/kalmanet; build the target kalmanet first", 2)
    return built[-1]


def take_reports():
    """All that the sanitizers have reported since the last call."""
    text = ""
    for path in sorted(REPORTS.iterdir()):
        text += path.read_text(errors="replace")
        path.unlink()
    return text


class Command:
    """The command, and what its tests need to do with it."""

    path = None

    def __call__(self, *arguments, code=0, stdin="", **keywords):
        """Runs it to its end; fails the test unless it exits with `code`."""
        done = subprocess.run(
            [self.path, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            **keywords,
        )
        shown = " ".join(map(str, arguments))
        assert done.returncode == code, (
            f"kalmanet {shown}: exit code {done.returncode} instead of {code}\n"
            f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        )
        for word in ("Sanitizer", "runtime error:", "ASan runtime"):
            assert word not in done.stderr, f"kalmanet {shown}: a sanitizer says\n{done.stderr}"
        return done

    def start(self, *arguments, **keywords):
        """Starts it without waiting."""
        return subprocess.Popen(
            [self.path, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **keywords,
        )

    def train(self, text, out, *more, code=0, **keywords):
        return self(
            "train",
            "--text",
            text,
            "--out",
            out,
            *TINY_MODEL,
            *TINY_RUN,
            *more,
            code=code,
            **keywords,
        )


def checkpoint_steps(run):
    folder = Path(run) / "checkpoints"
    names = [p.name for p in folder.glob("step-*")] if folder.is_dir() else []
    return sorted(int(n[5:]) for n in names if n[5:].isdigit())


def wait_for_step(run, step, process, seconds=TIMEOUT):
    """Until a checkpoint of `step` or later is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        steps = checkpoint_steps(run)
        if steps and steps[-1] >= step:
            return steps[-1]
        if process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f"ended with {process.returncode} before step {step}\n{out}\n{err}")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    pytest.fail(f"no checkpoint of step {step} after {seconds} s")


def metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
