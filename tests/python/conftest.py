"""What the tests of the Python package share: which library it loads."""

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
        built = sorted(
            ROOT.glob("build/*/src/torch/libkalmanet_torch.so"), key=lambda p: p.stat().st_mtime
        )
        if not built:
            pytest.exit("no libkalmanet_torch.so; build the target kalmanet_torch first", 2)
        os.environ["KALMANET_TORCH_LIBRARY"] = str(built[-1])
    # For the processes that tests start.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small products: waiting for a second thread costs more than it gives, a
    hundredfold where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
