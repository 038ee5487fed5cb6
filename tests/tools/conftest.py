"""The tools have no .py in their names; this imports them by path."""

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def load_tool():
    def load(name):
        loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "tools" / name))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(module)
        return module

    return load
