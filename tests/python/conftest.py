"""What the tests of the Python package share: which library it loads, and the device they run on.

`pytest tests/python --device cuda` runs them on the GPU; without one all are skipped, saying
so. Tests of what only the CPU has carry the marker `cpu_only`.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Modules beside this one are imported by name (pytest's importlib mode adds no folder).
sys.path.insert(0, str(Path(__file__).parent))

# KALMANET_TEST_INSTALLED=1 tests an installed wheel instead of python/ and the newest build.
if os.environ.get("KALMANET_TEST_INSTALLED") != "1":
    sys.path.insert(0, str(ROOT / "python"))
    if "KALMANET_TORCH_LIBRARY" not in os.environ:
        # (One built with a sanitizer ends a process that has not loaded the sanitizer first.)
        built = sorted(
            (
                path
                for path in ROOT.glob("build/*/src/torch/libkalmanet_torch.so")
                if "san" not in path.relative_to(ROOT).parts[1]
            ),
            key=lambda path: path.stat().st_mtime,
        )
        if not built:
            pytest.exit("no libkalmanet_torch.so; build the target kalmanet_torch first", 2)
        os.environ["KALMANET_TORCH_LIBRARY"] = str(built[-1])
    # For the processes that tests start.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )


# Files about what only the CPU has.
CPU_ONLY = {
    "test_both_ways.py": "folders are the same on every device",
    "test_distributed.py": "gloo",
    "test_doctor_and_compat.py": "it asks for the CPU's instruction sets",
    "test_examples.py": "programs for any machine",
    "test_jax.py": "XLA's functions of the CPU",
}


@pytest.fixture(scope="session", autouse=True)
def own_compiler_cache(tmp_path_factory):
    """Inductor keeps compiled graphs from process to process, by a key that does not know what our
    operators return: what another version of them left there would be taken for this one's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda: where tests/python computes")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_only(why): not run with --device cuda")
    # cases.py reads it, and so do the processes that tests start.
    os.environ["KALMANET_TEST_DEVICE"] = config.getoption("--device", default="cpu")


def missing():
    """Why --device cuda cannot be tested here, or None."""
    import torch

    if not torch.cuda.is_available():
        return f"NOT TESTED: PyTorch {torch.__version__} finds no GPU here"
    import kalmanet

    reason = kalmanet.backends()["cuda"]
    return None if reason.available else f"NOT TESTED: {reason.detail}"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device", default="cpu") == "cpu":
        return
    here = [i for i in items if Path(i.path).parent == Path(__file__).parent]
    reason = missing() if here else None
    for item in here:
        marker = item.get_closest_marker("cpu_only")
        only = CPU_ONLY.get(Path(item.path).name) or (marker and marker.args[0])
        why = reason or (only and f"the CPU alone: {only}")
        if why:
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--device", default="cpu") != "cpu" and missing():
        terminalreporter.write_line(f"tests/python --device cuda: {missing()}", red=True)


@pytest.fixture(autouse=True)
def on_the_device(request, monkeypatch):
    """With --device cuda, the tensors that a test's own module makes are on the GPU. The package
    sees the real `torch`: where it forgets a device, tests fail."""
    import cases

    if cases.DEVICE != "cpu":
        import plain

        for module in (request.module, cases, plain):
            if hasattr(module, "torch"):
                monkeypatch.setattr(module, "torch", cases.TorchOnDevice())


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small products: waiting for a second thread costs more than it gives, a
    hundredfold where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
