"""tools/setup without the right to install says what to run; with it, it installs what is missing.

The system's commands are replaced by small ones that record how they were called.
"""

import os
import shutil
import subprocess

import pytest


@pytest.fixture
def setup(root, tmp_path):
    """Runs a copy of tools/setup in an empty folder: setup(user id, installed packages)."""
    tools = tmp_path / "tools"
    shutil.copytree(root / "tools/requirements", tools / "requirements")
    shutil.copy(root / "tools/setup", tools / "setup")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()

    def command(name, body):
        path = bin_folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def run(user, installed, *arguments, python="exit 1"):
        listed = " ".join(installed)
        command("id", f"echo {user}")
        command("sudo", "exit 1")
        command("apt-get", f'echo "apt-get $*" >> {tmp_path}/calls')
        command(
            "dpkg-query",
            f'for last; do :; done; case " {listed} " in *" $last "*) echo "install ok installed";;'
            " *) exit 1;; esac",
        )
        command("fake-python", python)
        environment = dict(os.environ, PATH=f"{bin_folder}:/usr/bin:/bin", PYTHON="fake-python")
        done = subprocess.run(
            ["bash", tools / "setup", *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        calls = tmp_path / "calls"
        return done, calls.read_text() if calls.exists() else ""

    return run


def packages(root):
    lines = (root / "tools/requirements/debian.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_without_root_it_prints_the_line_to_run(setup, root):
    have, lack = packages(root)[:-2], packages(root)[-2:]
    done, calls = setup(1000, [*have, "python3-venv"])
    assert done.returncode == 1
    wanted = f"apt-get install -y --no-install-recommends {' '.join(lack)}'"
    assert wanted in done.stderr
    assert "only root can install them" in done.stderr
    assert calls == ""


def test_root_installs_what_is_missing_and_nothing_else(setup, root):
    have, lack = packages(root)[2:], packages(root)[:2]
    done, calls = setup(0, have)
    assert "apt-get update" in calls
    # fake-python has no venv module either
    assert f"apt-get install -y --no-install-recommends {' '.join(lack)} python3-venv" in calls
    assert all(name not in calls.split() for name in have)
    assert done.returncode == 1  # and then stops: fake-python is none
    assert "Python >= 3.11" in done.stderr


def test_an_unknown_argument_is_refused(setup):
    done, calls = setup(0, [], "--gpu")
    assert done.returncode == 1
    assert "unknown argument '--gpu'; allowed: --cpu, --cuda, --help" in done.stderr
    assert calls == ""


def test_help(setup):
    done, _ = setup(1000, [], "--help")
    assert done.returncode == 0
    assert "tools/setup --cuda" in done.stdout
