"""check_exports accepts a library that shows what its headers declare, and catches what differs."""

import shutil
import subprocess

import pytest


@pytest.fixture(scope="module")
def exports(load_tool):
    return load_tool("check_exports")


C_HEADER = "/* KALMANET_API int kalmanet_comment(void); */\nKALMANET_API int kalmanet_two(void);\n"
HEADER = """
namespace kalmanet {
class KALMANET_API Thing { public: Thing(); };
KALMANET_API const char* name(int) noexcept;
}
"""
SOURCE = """
#define KALMANET_API __attribute__((visibility("default")))
extern "C" {
#include "c.h"
int kalmanet_two(void) { return 2; }
}
#include "cpp.hpp"
namespace kalmanet {
Thing::Thing() {}
const char* name(int) noexcept { return ""; }
}
"""


@pytest.fixture
def check(exports, tmp_path):
    (tmp_path / "c.h").write_text(C_HEADER)
    (tmp_path / "cpp.hpp").write_text(HEADER)

    def build_and_check(more=""):
        source, library = tmp_path / "all.cpp", tmp_path / "libkalmanet.so"
        source.write_text(SOURCE + more)
        compiler = shutil.which("c++")
        assert compiler, "no C++ compiler; run tools/setup"
        flags = ["-shared", "-fPIC", "-fvisibility=hidden"]
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        return exports.check(library, tmp_path)[0]

    return build_and_check


def test_what_is_declared_passes(check):
    assert check() == []


def test_a_stray_c_function_is_caught(check):
    found = check('extern "C" KALMANET_API int kalmanet_three(void) { return 3; }')
    assert len(found) == 1, found
    assert "exports kalmanet_three, which no header declares" in found[0]


def test_a_stray_template_is_caught(check):
    found = check("#include <vector>\ntemplate class std::vector<kalmanet::Thing>;")
    assert any("exports std::vector<kalmanet::Thing" in line for line in found), found


def test_an_inner_name_is_caught(check):
    found = check("namespace kalmanet::core { KALMANET_API int f() { return 0; } }")
    assert len(found) == 1, found
    assert "kalmanet::core::f()" in found[0]


def test_a_missing_function_is_caught(check, tmp_path):
    (tmp_path / "more.h").write_text("KALMANET_API int kalmanet_four(void);\n")
    found = check()
    assert len(found) == 1, found
    assert "lacks kalmanet_four, which a header declares" in found[0]
