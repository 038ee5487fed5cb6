"""One version everywhere: the library's, the package's, the wheel's."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_one_version():
    def found(path, pattern):
        return re.search(pattern, (ROOT / path).read_text(), re.MULTILINE).group(1)

    versions = {
        "CMakeLists.txt": found("CMakeLists.txt", r"project\(kalmanet VERSION ([\d.]+)"),
        "pyproject.toml": found("pyproject.toml", r'^version = "(.*)"'),
        "__init__.py": found("python/kalmanet/__init__.py", r'^__version__ = "(.*)"'),
    }
    assert len(set(versions.values())) == 1, versions


def test_the_python_reference_is_what_the_docstrings_say():
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "python_reference", "--check"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
