"""tools/profile reads what perf prints."""

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = """
# Overhead  Symbol
    40.50%  [.] kalmanet::cpu::rank_update<kalmanet::cpu::Avx512, float>
    20.25%  [.] kalmanet::cpu::rank_update<kalmanet::cpu::Avx512, float>(float*, long)
    10.00%  [.] kalmanet::cpu::append_rows<kalmanet::cpu::Baseline>
     0.40%  [k] clear_page_rep
     0.30%  [.] __memset_avx512_unaligned
"""


@pytest.fixture(scope="module")
def profile():
    loader = importlib.machinery.SourceFileLoader("profile_tool", str(ROOT / "tools/profile"))
    spec = importlib.util.spec_from_loader("profile_tool", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_instances_of_a_function_are_one_line(profile):
    found = profile.shares(REPORT)
    assert found["rank_update<float>"] == 60.75
    assert found["append_rows"] == 10.0 and found["clear_page_rep"] == 0.4


def test_small_shares_are_summed_and_large_ones_sorted(profile):
    by_pass = {"forward": profile.shares(REPORT), "forward_backward": {"append_rows": 90.0}}
    said = {name: f"direct {name} on avx512: 2.50 us a token, 9 calls" for name in by_pass}
    lines = profile.solver_table("direct", said, by_pass).splitlines()
    assert lines[0] == "direct on avx512, 2.50 us a token; 2.50 us a token:"
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[4:]]
    assert cells == [
        ["`append_rows`", "10.0", "90.0"],
        ["`rank_update<float>`", "60.8", "0.0"],
        ["all else", "0.7", "0.0"],
    ]
