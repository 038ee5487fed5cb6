"""check_isa accepts an object file that keeps to itself and catches one that does not."""

import shutil
import subprocess

import pytest


@pytest.fixture(scope="module")
def isa(load_tool):
    return load_tool("check_isa")


TABLE = """
namespace kalmanet::cpu {{
struct Avx2 {{}};
{helper}
const int& kernels_avx2() {{ static int n = help<{argument}>(1); return n; }}
}}
"""
TEMPLATE = "template <class V> [[gnu::noinline]] int help(int a) { return a + 1; }"


def compiled(folder, text):
    source = folder / "avx2.cpp"
    source.write_text(text)
    target = folder / "isa" / "avx2.cpp.o"
    target.parent.mkdir()
    compiler = shutil.which("c++")
    assert compiler, "no C++ compiler; run tools/setup"
    subprocess.run([compiler, "-std=c++20", "-O1", "-c", source, "-o", target], check=True)
    return target


def test_templates_over_the_vector_type_pass(isa, tmp_path):
    file = compiled(tmp_path, TABLE.format(helper=TEMPLATE, argument="Avx2"))
    assert isa.check_object(file, "avx2") == []


def test_a_shared_helper_is_caught(isa, tmp_path):
    file = compiled(tmp_path, TABLE.format(helper=TEMPLATE, argument="int"))
    found = isa.check_object(file, "avx2")
    assert len(found) == 1, found
    assert "help<int>" in found[0]


def test_another_file_is_caught(isa, tmp_path):
    file = compiled(tmp_path, "int other() { return 1; }")
    assert any("kernels_avx2() is not there" in line for line in isa.check_object(file, "avx2"))
