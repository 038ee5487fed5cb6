"""DDP and FSDP2 over gloo, two processes, against one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import relative
from distributed_run import Whole, data, steps


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind, tmp_path):
    module = Whole()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    want = steps(module, data(), torch.optim.SGD(module.parameters(), lr=0.5))
    script = Path(__file__).with_name("distributed_run.py")
    result = tmp_path / "result"
    runs = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", tmp_path / "meeting", kind, result],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(errors)
    got = torch.load(result)
    assert relative(got["losses"], want) <= 1e-5
    for name, p in module.named_parameters():
        moved = (p - before[name]).norm()
        assert moved > 0, name
        error = ((got["weights"][name] - p).norm() / moved).item()
        assert error <= 1e-4, f"{kind}: {name} is off by {error:.1e} of what it moved"
