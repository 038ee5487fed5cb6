"""check_docs passes pages that tell the truth and catches each kind of page that does not."""

import json

import pytest


@pytest.fixture(scope="module")
def docs(load_tool):
    return load_tool("check_docs")


TREE = {
    "Makefile": "test: build\n\tctest\nbuild:\n\ttrue\nbench:\n\ttrue\n",
    "CMakePresets.json": json.dumps({"configurePresets": [{"name": "release"}]}),
    "tools/setup": "#!/bin/sh\n",
    "docs/math.md": "# Math\n\n## The chunked form, in short\n",
    "examples/use.cpp": "int main() {}\n",
}
# Stands in for the command: two subcommands, one of them with a subcommand of its own.
COMMAND = """#!/bin/sh
case "$*" in
  "--help") echo "kalmanet [--version]" ;;
  "train --help") echo "kalmanet train [OPTIONS] --out TEXT --plot" ;;
  "experiment --help") echo "kalmanet experiment SUBCOMMAND" ;;
  "experiment recall --help") echo "kalmanet experiment recall [OPTIONS] --steps N" ;;
  *) exit 2 ;;
esac
"""
TRUE = """# kalmanet

See [the math](docs/math.md#the-chunked-form-in-short), [the web](https://example.org/x),
[below](#use).
`examples/use.cpp` and `docs/*.md` are in `examples/`.
Run `make test` or `make build bench`, `make demo_like=1`, `tools/setup`, `cmake --preset release`.

## Use

```sh
make test
build/release/apps/kalmanet train --out runs/a \\
  --plot
kalmanet experiment recall --steps 3
kalmanet train --out x | tee --log
kalmanet --version
```

<!-- quote: examples/use.cpp -->
```cpp
int main() {}
```
"""
LIES = {
    "dead link": ("[x](docs/none.md)", "link to docs/none.md: there is no such file"),
    "dead heading": ("[x](docs/math.md#none)", "docs/math.md#none: there is no such heading"),
    "dead heading here": ("[x](#none)", "#none: there is no such heading"),
    "make target": ("Run `make coffee`.", "make coffee: no such target"),
    "make target in a block": ("```sh\nmake test coffee\n```", "make coffee: no such target"),
    "tool": ("`tools/none`", "tools/none: no such file"),
    "path": ("See `src/none/x.cpp`.", "src/none/x.cpp: no such file"),
    "preset": ("`cmake --preset quick`", "--preset quick: no such preset"),
    "flag": ("`kalmanet train --colour red`", "kalmanet train has no --colour"),
    "flag that begins like another": ("`kalmanet train --plo`", "kalmanet train has no --plo"),
    "flag on the next line": (
        "```\nkalmanet train \\\n --colour\n```",
        "kalmanet train has no --colour",
    ),
    "flag of a subcommand": (
        "`kalmanet experiment recall --plot`",
        "kalmanet experiment recall has no --plot",
    ),
    "command": ("`kalmanet fly`", "kalmanet fly: no such command"),
    "quote": ("<!-- quote: examples/use.cpp -->\n```cpp\nint main() { }\n```", "the quote differs"),
    "quote of nothing": (
        "<!-- quote: examples/no.cpp -->\n```cpp\n```",
        "examples/no.cpp: no such file",
    ),
}


@pytest.fixture
def check(docs, tmp_path):
    for name, content in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    command = tmp_path / "kalmanet"
    command.write_text(COMMAND)
    command.chmod(0o755)

    def run(text):
        page = tmp_path / "README.md"
        page.write_text(text)
        checker = docs.Checker(tmp_path, str(command))
        checker.check_page(page)
        return checker.found

    return run


def test_the_truth_passes(check):
    assert check(TRUE) == []


@pytest.mark.parametrize("name", LIES)
def test_caught(check, name):
    text, message = LIES[name]
    found = check(TRUE + "\n" + text + "\n")
    assert len(found) == 1, found
    assert message in found[0]


def test_this_tree(docs, root):
    program = root / "build/release/apps/kalmanet"
    checker = docs.Checker(root, str(program) if program.exists() else None)
    for page in docs.pages(root):
        checker.check_page(page)
    assert checker.found == []
