"""What the package says of the devices that it can use, and of those that it cannot."""

import collections
import os
import subprocess
import sys

import kalmanet
import pytest
import torch
from cases import DEVICE, ROOT, SEED, problem, relative
from kalmanet.ops import chunk_gka
from torch.utils._python_dispatch import TorchDispatchMode


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


class Operators(TorchDispatchMode):
    """Counts this package's operators."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.counts[name] += name.startswith("kalmanet::")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("T", [1, 3])
def test_a_step_is_one_operator_between_the_projections(T):
    """On the CPU and on the GPU; and it gives what the whole sequence does."""
    torch.manual_seed(SEED)
    layer = kalmanet.GatedKalmaNet(hidden_size=24, head_dim=8, num_heads=3, device=DEVICE)
    x = torch.randn(2, 11 + T, 24)
    with torch.no_grad():
        want = layer(x)[0][:, 11:]
        state = layer(x[:, :11], use_cache=True)[2]
        with Operators() as ran:
            got = layer(x[:, 11:], past_key_values=state, use_cache=True)[0]
    assert +ran.counts == {"kalmanet::layer_step": 1}
    assert relative(got, want) <= 2e-5


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
