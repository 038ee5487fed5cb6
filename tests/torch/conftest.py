"""What the tests of this folder share."""

import sys
from pathlib import Path

import pytest

# Modules beside this one are imported by name (pytest's importlib mode adds no folder).
sys.path.insert(0, str(Path(__file__).parent))

from operators import available  # noqa: E402


@pytest.fixture(autouse=True)
def require_backend(request):
    backend = (
        request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    )
    if backend is not None and not available(backend):
        pytest.fail(f"the {backend} backend does not compute float32 GKA in this build")
