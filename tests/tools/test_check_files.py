"""check_files passes sound files and catches each kind of finding."""

import pytest


@pytest.fixture(scope="module")
def files(load_tool):
    return load_tool("check_files")


GOOD = {
    "a.hpp": "// What it is for.\n#pragma once\n",
    "b.py": '"""What it is for."""\n',
    "tool": '#!/usr/bin/env python3\n"""What it is for."""\n',
    "script": "#!/usr/bin/env bash\n# What it is for.\n",
    "CMakeLists.txt": "add_subdirectory(x)\n",
    "notes.md": "no rule for prose \t\n",
    "long_enough.cpp": "// For the limit.\n" + "int a;\n" * 449,
    "__init__.py": "",
}
BAD = {
    "too long": ("a.cpp", "// For the limit.\n" + "int a;\n" * 450, "451 lines; at most 450"),
    "no comment": ("a.hpp", "#pragma once\n", "the first line is a comment"),
    "script without comment": ("s", "#!/bin/bash\nset -e\n", "the first line is a comment"),
    "python without docstring": ("a.py", "import os\n", "the first line is a comment"),
    "trailing space": ("a.cpp", "// x \n", "a.cpp:1: white space"),
    "tab": ("a.cpp", "// x\n\tint a;\n", "a.cpp:2: a tab"),
    "no final newline": ("a.cpp", "// x", "no newline"),
}


def findings(files, folder, contents):
    for name, text in contents.items():
        (folder / name).write_text(text)
    return [line for name in files.tracked(folder) for line in files.check_file(folder, name)]


def test_good_files_pass(files, tmp_path):
    assert findings(files, tmp_path, GOOD) == []


@pytest.mark.parametrize("name", BAD)
def test_caught(files, tmp_path, name):
    file, text, message = BAD[name]
    found = findings(files, tmp_path, GOOD | {file: text})
    assert len(found) == 1, found
    assert message in found[0]
