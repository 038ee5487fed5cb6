"""check_layers passes this tree and catches each kind of violation planted in a small one."""

import pytest


@pytest.fixture(scope="module")
def layers(load_tool):
    return load_tool("check_layers")


HOUSE = {
    "include/kalmanet/gka.hpp": "#include <cstdint>\n",
    "src/core/problem.hpp": '#include "kalmanet/gka.hpp"\n',
    "src/reference/exact.hpp": '#include "core/problem.hpp"\n',
    "src/cpu/forward.hpp": '#include "core/problem.hpp"\n#include <sched.h>\n',
    "src/cpu/isa/avx2.cpp": "#include <immintrin.h>\n",
    "src/api/gka.cpp": '#include "cpu/forward.hpp"\n#include "reference/exact.hpp"\n',
    "src/torch/schema.cpp": '#include <torch/csrc/stable/library.h>\n#include "kalmanet/gka.hpp"\n',
    "src/layers/ops.hpp": "#include <torch/torch.h>\n",
    "src/models/model.hpp": '#include "layers/ops.hpp"\n#include <nlohmann/json.hpp>\n',
    "src/train/trainer.hpp": '#include "models/model.hpp"\n',
    "apps/main.cpp": '#include "train/trainer.hpp"\n#include <CLI/CLI.hpp>\n',
    "tests/support/expect.hpp": "#include <gtest/gtest.h>\n",
    "tests/cpu/forward_test.cpp": '#include "reference/exact.hpp"\n#include "support/expect.hpp"\n',
    "examples/first_use.cpp": '#include "kalmanet/gka.hpp"\n',
    "python/kalmanet/__init__.py": "import torch\nfrom .layer import Layer\n",
    "python/kalmanet/ops/__init__.py": "from .gka import chunk\n",
    "python/kalmanet/ops/gka.py": "from . import _check\nfrom .. import _registration\n",
    "python/kalmanet/layer.py": "from .ops.gka import chunk\n",
    "python/kalmanet/models/model.py": "import transformers\nfrom ..layer import Layer\n",
}

# What is planted: (file, its content, what the violation must say).
VIOLATIONS = {
    "an operator that knows the layer": (
        "python/kalmanet/ops/bad.py",
        "import torch\nfrom ..layer import Layer\n",
        "python/kalmanet/ops/bad.py:2: the arrow ops -> layer points the wrong way",
    ),
    "the layer that knows the models, by name alone": (
        "python/kalmanet/layer.py",
        "from . import models\n",
        "the arrow layer -> models points the wrong way",
    ),
    "Transformers outside the models": (
        "python/kalmanet/state.py",
        "def f():\n    from transformers import Cache\n",
        "only python/kalmanet/models imports Transformers",
    ),
    "a room of the package that nobody knows": (
        "python/kalmanet/extra.py",
        "import torch\n",
        "python/kalmanet/extra.py:1: no room of the package",
    ),
    "core includes a room on its right": (
        "src/core/bad.hpp",
        '#include "cpu/forward.hpp"\n',
        "src/core/bad.hpp:1: includes cpu/forward.hpp: the arrow core -> cpu points the wrong way",
    ),
    "siblings": (
        "src/reference/bad.cpp",
        '#include "cpu/forward.hpp"\n',
        "the arrow reference -> cpu",
    ),
    "the public header includes the inside": (
        "include/kalmanet/bad.hpp",
        '#include "core/problem.hpp"\n',
        "the arrow include -> core",
    ),
    "relative path": ("src/core/bad.hpp", '#include "../cpu/forward.hpp"\n', "core -> cpu"),
    "angle brackets": ("src/core/bad.hpp", "#include <cpu/forward.hpp>\n", "core -> cpu"),
    "odd spelling": (
        "src/core/bad.hpp",
        '\n  #  include "cpu/forward.hpp"\n',
        "src/core/bad.hpp:2:",
    ),
    "PyTorch below torch": (
        "src/cpu/bad.cpp",
        "#include <ATen/ATen.h>\n",
        "nothing below src/torch includes PyTorch",
    ),
    "PyTorch in a test below torch": (
        "tests/core/bad_test.cpp",
        "#include <torch/torch.h>\n",
        "nothing below src/torch includes PyTorch",
    ),
    "more than the stable ABI": (
        "src/torch/bad.cpp",
        "#include <torch/library.h>\n",
        "only torch/csrc/stable and torch/headeronly",
    ),
    "the torch room reaches behind the public interface": (
        "src/torch/bad.cpp",
        '#include "core/problem.hpp"\n',
        "torch uses the library through include/kalmanet, not src/core",
    ),
    "so does a room further right": (
        "src/train/bad.cpp",
        '#include "cpu/forward.hpp"\n',
        "train uses the library through include/kalmanet, not src/cpu",
    ),
    "jax too": ("src/jax/bad.cpp", '#include "layers/ops.hpp"\n', "include/kalmanet only"),
    "a third-party library in the core": (
        "src/core/bad.cpp",
        "#include <nlohmann/json.hpp>\n",
        "C++ standard library only",
    ),
    "intrinsics outside isa": ("src/cpu/bad.cpp", "#include <immintrin.h>\n", "src/cpu/isa"),
    "train and serve are apart": (
        "src/serve/bad.cpp",
        '#include "train/trainer.hpp"\n',
        "the arrow serve -> train",
    ),
    "models include the trainer": (
        "src/models/bad.cpp",
        '#include "train/trainer.hpp"\n',
        "the arrow models -> train",
    ),
    "the library includes a test": (
        "src/core/bad.cpp",
        '#include "support/expect.hpp"\n',
        "nothing of tests/",
    ),
    "a test of the core includes the api": (
        "tests/core/bad_test.cpp",
        '#include "api/secret.hpp"\n',
        "not found",
    ),
    "a test goes right": ("tests/core/bad_test.cpp", '#include "cpu/forward.hpp"\n', "core -> cpu"),
    "unknown room": ("src/attic/bad.cpp", "#include <vector>\n", "attic is no room"),
    "python package imports a tool": (
        "python/kalmanet/state.py",
        "from tools import x\n",
        "imports tools",
    ),
    "jax outside its folder": (
        "python/kalmanet/state.py",
        "import jax.numpy\n",
        "only python/kalmanet/jax",
    ),
}


def plant(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_this_tree(layers, root):
    found, files = layers.check(root)
    assert found == []
    assert files > 50


def test_a_sound_house_passes(layers, tmp_path):
    plant(tmp_path, HOUSE)
    assert layers.check(tmp_path) == ([], len(HOUSE))


@pytest.mark.parametrize("name", VIOLATIONS)
def test_caught(layers, tmp_path, name):
    file, content, message = VIOLATIONS[name]
    plant(tmp_path, HOUSE | {file: content})
    found, _ = layers.check(tmp_path)
    assert len(found) == 1, found
    assert message in found[0]
    assert found[0].startswith(file)


def test_commented_out_includes_do_not_count(layers, tmp_path):
    text = '// #include "api/gka.hpp"\n/*\n#include <torch/torch.h>\n*/\n'
    plant(tmp_path, HOUSE | {"src/core/ok.cpp": text})
    assert layers.check(tmp_path)[0] == []
