"""The figures of docs/performance.md say what report.py says, word for word but for the numbers."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels():
    """What kalmanet_bench writes, with made-up figures."""
    cases = {}
    for isa in ("avx512", "avx2", "baseline"):
        for kind in ("forward", "forward_backward"):
            names = ("ms", "ms_min", "gflops", "openblas_gflops", "ratio", "ratio_min", "ratio_max")
            one = ("one_thread_gflops", "one_thread_openblas_gflops", "one_thread_ratio")
            figures = dict.fromkeys(names + one, 1.5)
            cases[f"{kind}/{isa}"] = figures | {"label": "T=4096 H=4 K=128 V=128"}
    length = {"spread": 0.2, "cpu_spread": 0.01, "label": "H=2 K=128 V=128"}
    for T in (2**i for i in range(10, 18)):
        length |= {f"us_T{T}": 70, f"us_min_T{T}": 65, f"us_max_T{T}": 80, f"cpu_us_T{T}": 27}
    cases["time_per_token"] = length
    decoded = [(K, 4, "avx512") for K in (64, 128, 256)] + [(128, 16, "avx512")]
    for K, H, isa in [*decoded, (128, 4, "avx2"), (128, 4, "baseline")]:
        names = ("us_per_head", "openblas_us", "ratio", "ratio_min", "ratio_max")
        few = {"state_keys": 512, "few_keys": 64, "few_keys_over_ours": 1 + K / 400}
        cases[f"decode/K:{K}/H:{H}/{isa}"] = dict.fromkeys(names, 1.25) | few
    return {
        "context": {
            "load_avg": [0.5, 0.5, 0.5],
            "threads": "2",
            "instruction_set": "avx512",
            "openblas_core": "Cooperlake",
            "date": "2026-11-23T20:37:40+00:00",
        },
        "benchmarks": [{"name": f"{name}/iterations:3", **run} for name, run in cases.items()],
    }


def eager(rounds):
    """What eager_peer.py writes, likewise; with few rounds the machine was too busy."""
    one = ("ours_ms", "eager_ms", "ours_gflops", "eager_gflops", "eager_over_ours")
    version = {"ms": 500, "ms_min": 490, "gflops": 100}
    peers = ("eager", "eager_batched")
    return {
        "torch": "2.13.0+cpu",
        "instruction_set": "avx512",
        "rounds": rounds,
        "shape": {"T": 4096},
        "eager_chunk": 32,
        "eager_group": 0,
        "one_thread": dict.fromkeys(one, 1.75),
        **{name: version for name in ("ours", *peers)},
        **{f"{name}_over_ours": 1.75 for name in peers},
        **{f"{name}_over_ours_range": [1.5, 2] for name in peers},
    }


def speed():
    """What `kalmanet experiment speed --json` writes, likewise."""
    figures = {"batch": 2, "tokens_per_second": 9000, "slowest": 8000, "fastest": 9500}
    runs = [{"model": m, "context": c, **figures} for c in (64, 2048) for m in ("gka", "attention")]
    return {"threads": 2, "results": runs}


def wording(text):
    """The lines without what a measurement changes: numbers, verdicts, the width of columns."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r"\d+(\.\d+)?", "#", line)
        line = re.sub(r"\b(yes|NO)\b", "?", line)
        line = re.sub(r"\| -(?= )", "| #", re.sub(r"-{3,}", "---", line))
        line = re.sub(r" +", " ", line).strip()
        if line:
            lines.append(line)
    return lines


def test_the_page_has_only_what_the_report_writes(report, monkeypatch):
    page = (ROOT / "docs/performance.md").read_text()
    figures = page.split(report.BEGIN)[1].split(report.END)[0]
    monkeypatch.setattr(report, "processor", lambda: "AMD EPYC")
    written = set()
    for rounds in (1, 7):
        written |= set(wording(report.report(kernels(), eager(rounds), speed())))
    by_hand = [line for line in wording(figures) if line not in written]
    assert by_hand == [], "not in report.py; change it there, then: benchmarks/run --docs"


def test_a_page_is_written_between_its_marks(report, monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/performance.md"
    page.write_text(f"before\n\n{report.BEGIN}\n\nold figures\n\n{report.END}\n\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    text = report.report(kernels(), eager(7), speed())
    for _ in range(2):  # writing it again changes nothing
        report.write_docs(text, tmp_path / "no picture")
        assert page.read_text() == (f"before\n\n{report.BEGIN}\n\n{text}\n{report.END}\n\nafter\n")
    assert "512 different keys" in text and "only 64 may" in text and "up to 1.6 times" in text
    assert "| 64 x 2" in text and "Training, tokens/s" in text
