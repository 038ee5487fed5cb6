"""cmake/TorchPackage.cmake says what to do where there is no PyTorch, or one that is too old."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def configure(root, tmp_path):
    def run(python, version=None):
        if version:
            package = tmp_path / "torch"
            package.mkdir()
            (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
            (package / "version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
        done = subprocess.run(
            ["cmake", f"-DKALMANET_PYTHON={python}", "-P", root / "cmake/TorchPackage.cmake"],
            capture_output=True,
            text=True,
            env=dict(os.environ, PYTHONPATH=str(tmp_path)),
        )
        assert done.returncode != 0
        return " ".join(done.stderr.split())  # CMake breaks lines as it likes

    return run


def test_python_without_torch(configure, tmp_path):
    # A Python whose own packages are left out, whatever the machine has.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    error = configure(bare)
    assert "it has no package named torch" in error
    assert "Run tools/setup" in error


def test_no_python(configure):
    error = configure("/nowhere/python")
    assert "No PyTorch for KALMANET_PYTHON=/nowhere/python" in error
    assert "-DKALMANET_TORCH=OFF" in error


def test_torch_that_is_too_old(configure):
    error = configure(sys.executable, "2.9.1+cpu")
    assert "has PyTorch 2.9.1+cpu; at least 2.11 is needed" in error


def test_a_broken_torch(configure):
    error = configure(sys.executable, "2.12.0")
    assert "libc10.so is missing: this PyTorch is incomplete" in error
