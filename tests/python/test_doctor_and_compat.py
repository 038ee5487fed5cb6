"""python -m kalmanet.doctor; the module paths of flash-linear-attention; the cost of importing."""

import os
import subprocess
import sys

import pytest

TORCH_FREE = {name: os.environ[name] for name in os.environ if name != "KALMANET_ISA"}


def python(code, **env):
    return subprocess.run(
        [sys.executable, *code], env=TORCH_FREE | env, capture_output=True, text=True
    )


def test_the_doctor():
    run = python(["-m", "kalmanet.doctor"], KALMANET_ISA="baseline")
    assert run.returncode == 0, run.stdout + run.stderr
    for line in ("kalmanet  ", "PyTorch  ", "instruction set  baseline", "cpu: ", "reference: "):
        assert line in run.stdout, f"{line!r} missing:\n{run.stdout}"
    assert run.stdout.splitlines()[-1] == "all well"


def test_the_doctor_without_a_library():
    run = python(["-m", "kalmanet.doctor"], KALMANET_TORCH_LIBRARY="/nowhere")
    assert run.returncode == 1 and run.stdout.splitlines()[-1].startswith("FAILED  "), run.stdout
    assert "/nowhere, which is no file" in run.stdout


def test_the_doctor_notices_a_wrong_answer():
    code = (
        "import kalmanet.ops, kalmanet.doctor, sys\n"
        "right = kalmanet.ops.chunk_gka\n"
        "kalmanet.ops.chunk_gka = lambda *a, **k: (right(*a, **k)[0] * 1.001, None)\n"
        "sys.exit(kalmanet.doctor.main())"
    )
    run = python(["-c", code])
    assert run.returncode == 1 and "larger than float32 explains" in run.stdout, run.stdout


USE = """
import kalmanet.compat.fla as compat
from fla.ops.gka import chunk_gka, fused_recurrent_gka, naive_recurrent_gka
from fla.layers.gka import GatedKalmaNet
from fla.layers import GatedKalmaNet as Same
import kalmanet.ops, kalmanet
assert Same is GatedKalmaNet
"""
OURS = """
assert chunk_gka is kalmanet.ops.chunk_gka and issubclass(GatedKalmaNet, kalmanet.GatedKalmaNet)
assert GatedKalmaNet(hidden_size=8, head_dim=4, num_heads=2).options.qk_norm == "fla"
"""
PACKAGES = {
    "absent": ({}, OURS, "flash-linear-attention is not installed"),
    "too old": (
        {"fla/__init__.py": "", "fla/ops/__init__.py": "old = 1", "fla/layers/__init__.py": ""},
        OURS + "import fla.ops; assert fla.ops.old == 1",
        "the installed flash-linear-attention has no Gated KalmaNet",
    ),
    "broken": (
        {"fla/__init__.py": "import triton_of_another_machine"},
        OURS,
        "the installed flash-linear-attention does not import",
    ),
    "has its own": (
        {
            "fla/__init__.py": "",
            "fla/ops/__init__.py": "",
            "fla/ops/gka.py": "chunk_gka = fused_recurrent_gka = naive_recurrent_gka = 'theirs'",
            "fla/layers/__init__.py": "from .gka import GatedKalmaNet",
            "fla/layers/gka.py": "class GatedKalmaNet: pass",
        },
        "assert chunk_gka == 'theirs'",
        "flash-linear-attention has its own fla.ops.gka: nothing was changed",
    ),
}


@pytest.mark.parametrize("case", PACKAGES)
def test_the_paths_of_flash_linear_attention(case, tmp_path):
    files, check, message = PACKAGES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), TORCH_FREE.get("PYTHONPATH", "")])
    run = python(["-c", USE + check], PYTHONPATH=path)
    assert run.returncode == 0, run.stderr
    assert f"kalmanet.compat.fla: {message}" in run.stderr


def test_importing_costs_little_and_brings_nothing_heavy():
    code = (
        "import torch, time, sys\n"
        "before = set(sys.modules); begun = time.perf_counter()\n"
        "import kalmanet, kalmanet.ops; kalmanet.GatedKalmaNet\n"
        "print(time.perf_counter() - begun)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'jax', 'safetensors', 'torch._dynamo'}, new\n"
    )
    # The quickest of a few: what other programs take from this one is not the package's.
    seconds = []
    while not seconds or (min(seconds) >= 0.15 and len(seconds) < 8):
        run = python(["-c", code])
        assert run.returncode == 0, run.stderr
        seconds.append(float(run.stdout))
    assert min(seconds) < 0.15, f"{seconds} s"
