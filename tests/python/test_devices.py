"""What the package says of the devices that it can use, and of those that it cannot."""

import os
import subprocess
import sys

import kalmanet
import pytest
import torch
from cases import DEVICE, ROOT, problem
from kalmanet.ops import chunk_gka


def test_backends():
    found = kalmanet.backends()
    assert set(found) == {"cpu", "reference", "cuda"}
    assert found["cpu"].available and "instruction sets" in found["cpu"].detail
    assert found["cuda"].available == (DEVICE == "cuda") or DEVICE == "cpu"
    assert found["cuda"].detail and "not available" not in found["cuda"].detail
    if not torch.cuda.is_available():
        assert not found["cuda"].available


def test_a_device_without_kernels():
    p = {n: t.to("meta") for n, t in problem(dtype=torch.float32).items()}
    assert chunk_gka(**p)[0].device.type == "meta"  # shapes without data


@pytest.mark.cpu_only("a machine without a GPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_suite_says_loudly_that_it_tested_no_gpu():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/python/test_errors.py", "--device", "cuda"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "tests/python --device cuda: NOT TESTED: " in run.stdout, run.stdout
    assert "passed" not in run.stdout.splitlines()[-1], run.stdout
