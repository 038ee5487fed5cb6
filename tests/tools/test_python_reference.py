"""docs/python-reference.md is what the docstrings say, and the tool notices when it is not."""

import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("python_reference")


def test_the_page_is_up_to_date(tool):
    assert tool.PAGE.read_text() == tool.page(), "run tools/python_reference"


def test_every_public_name_is_on_it(tool, root):
    sys.path.insert(0, str(root / "python"))
    text = tool.PAGE.read_text()
    for name in (
        "chunk_gka",
        "fused_recurrent_gka",
        "naive_recurrent_gka",
        "GatedKalmaNet",
        "load",
    ):
        assert f"### {name}\n" in text, name
    for said in ("[B,T,H,K]", "float32", "Raises:", "H_t = e^{gk_t} H_{t-1}", "log decays"):
        assert said in text, f"{said}: shapes, dtypes, errors, equation, units"


def test_a_changed_docstring_is_noticed(tool, tmp_path, monkeypatch):
    now = tool.page()
    stale = tmp_path / "python-reference.md"
    stale.write_text(now.replace("linear in T", "quadratic in T", 1))
    monkeypatch.setattr(tool, "page", lambda: now)
    monkeypatch.setattr(tool, "PAGE", stale)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["python_reference", "--check"])
    with pytest.raises(SystemExit, match="is not what the docstrings say"):
        tool.main()


def test_it_runs_as_a_program(root):
    done = subprocess.run([sys.executable, root / "tools/python_reference", "--check"])
    assert done.returncode == 0
