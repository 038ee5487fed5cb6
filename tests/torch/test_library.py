"""The library itself: schemas, errors, forced instruction sets, memory."""

import math
import os
import re
from pathlib import Path

import pytest
import torch
from operators import ops, problem


def test_schemas_declare_what_is_written():
    step = torch.ops.kalmanet.gka_step.default._schema
    written = {a.name for a in step.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"h", "u"}
    conv = torch.ops.kalmanet.causal_conv_step.default._schema
    written = {a.name for a in conv.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"state"}
    layer = torch.ops.kalmanet.layer_step.default._schema
    written = {
        a.name for a in layer.arguments if a.alias_info is not None and a.alias_info.is_write
    }
    assert written == {"h", "u", "conv_q", "conv_k", "conv_v"}
    for name in (
        "gka_forward",
        "gka_backward",
        "causal_conv_forward",
        "causal_conv_backward",
        "gated_rms_norm_forward",
        "gated_rms_norm_backward",
        "unit_norm_forward",
        "unit_norm_backward",
    ):
        schema = getattr(torch.ops.kalmanet, name).default._schema
        assert not schema.is_mutable, name


def test_schemas_hold_when_run():
    p = problem(dtype=torch.float32)
    ops_and_args = [
        (ops.gka_forward.default, p),
        (ops.gka_backward.default, p | {"d_o": torch.ones(2, 7, 2, 3)}),
        (
            ops.gka_step.default,
            {n: t for n, t in p.items() if n not in ("h0", "u0")}
            | {"h": p["h0"].clone(), "u": p["u0"].clone()},
        ),
    ]
    for op, kwargs in ops_and_args:
        torch.library.opcheck(op, (), kwargs | {"backend": "reference"}, test_utils="test_schema")


ERRORS = {
    "k with another head dim": ({"k": lambda p: p["k"][..., :4]}, {}, "k: "),
    "q of three dimensions": ({"q": lambda p: p["q"][0]}, {}, "q: "),
    "five dimensions of h0": ({"h0": lambda p: p["h0"][None]}, {}, "h0: .*5 dimensions"),
    "v of another length": ({"v": lambda p: p["v"][:, :6]}, {}, "v: "),
    "heads that do not divide": (
        {"k": lambda p: p["k"].repeat(1, 1, 2, 1)[:, :, :3]},
        {},
        "heads",
    ),
    "gate of another shape": ({"g": lambda p: p["g"][:, :6]}, {}, "g: "),
    "integer q": ({"q": lambda p: p["q"].long()}, {}, "q: .*dtype Long"),
    "mixed dtypes": ({"v": lambda p: p["v"].double()}, {}, "v: .*float64"),
    "state of another shape": ({"h0": lambda p: p["h0"][:1]}, {}, "h0: "),
    "head dim too large": (
        {"q": lambda p: torch.zeros(2, 7, 2, 300), "k": lambda p: torch.zeros(2, 7, 2, 300)},
        {},
        "q: .*300",
    ),
    "zero ridge": ({"ridge": lambda p: p["ridge"] * 0}, {}, "ridge"),
    "NaN in the ridge": ({"ridge": lambda p: p["ridge"] * math.nan}, {}, "ridge"),
    "negative ridge_ratio": ({"ridge": None}, {"ridge_ratio": -1.0}, "ridge_ratio: "),
    "negative num_iter": ({}, {"num_iter": -1}, "num_iter: .*-1"),
    "num_iter beyond int": ({}, {"num_iter": 2**40}, "num_iter: "),
    "unknown solver": ({}, {"solver": "newton"}, 'solver: .*"newton"'),
    "unknown backend": ({}, {"backend": "tpu"}, 'backend: .*"tpu"'),
    "chunk_size too large": ({}, {"chunk_size": 1000}, "chunk_size: "),
    "cu_seqlens of int32": (
        {},
        {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)},
        "cu_seqlens: .*int64",
    ),
    "cu_seqlens with a batch": ({}, {"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens|B"),
    "one offset": ({}, {"cu_seqlens": torch.tensor([0])}, "cu_seqlens: .*at least 2"),
    "cu_seqlens matrix": ({}, {"cu_seqlens": torch.tensor([[0, 7]])}, "cu_seqlens: .*1 dim"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    change, options, message = ERRORS[case]
    p = problem(dtype=torch.float32)
    p |= {name: make(p) if make else None for name, make in change.items()}
    with pytest.raises(RuntimeError) as caught:
        ops.gka_forward(**p, **{"backend": "reference", **options})
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("offsets", [[1, 9], [0, 5], [0, 9, 4, 9], [0, -1, 9]])
def test_bad_offsets(offsets):
    p = problem(B=1, T=9, N=len(offsets) - 1, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        ops.gka_forward(**p, cu_seqlens=torch.tensor(offsets), backend="reference")
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        ops.causal_conv_forward(
            torch.zeros(1, 9, 4), torch.zeros(4, 4), cu_seqlens=torch.tensor(offsets)
        )


def test_errors_of_conv_and_norm():
    x, weight = torch.zeros(2, 3, 4), torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match="weight: .*2 dimensions"):
        ops.causal_conv_forward(x, weight[None])
    with pytest.raises(RuntimeError, match="weight"):
        ops.causal_conv_forward(x, weight[:3])
    with pytest.raises(RuntimeError, match="x"):
        ops.causal_conv_forward(x.double(), weight)
    with pytest.raises(RuntimeError, match="state"):
        ops.causal_conv_step(x[:, 0], weight, torch.zeros(1, 4, 4))
    with pytest.raises(RuntimeError, match="o: .*2 dimensions"):
        ops.gated_rms_norm_forward(x, None, torch.ones(4))
    with pytest.raises(RuntimeError, match="gate"):
        ops.gated_rms_norm_forward(x[0], x[0, :2], torch.ones(4))
    with pytest.raises(RuntimeError, match="x: .*2 dimensions"):
        ops.unit_norm_forward(x)
    with pytest.raises(RuntimeError, match='kind: is "l1"; allowed are "official" and "fla"'):
        ops.unit_norm_forward(x[0], kind="l1")
    with pytest.raises(RuntimeError, match="eps: got 0"):
        ops.unit_norm_backward(x[0], x[0], eps=0.0)


def test_backend_can_be_asked_and_forced():
    info = ops.backend_info()
    assert "cpu:" in info and "reference:" in info
    assert ops.instruction_set() in ("baseline", "avx2", "avx512")
    before = ops.instruction_set()
    try:
        ops.set_instruction_set("baseline")
        assert ops.instruction_set() == "baseline"
    finally:
        ops.set_instruction_set("")
    assert ops.instruction_set() == before
    with pytest.raises(RuntimeError, match="instruction_set: .*sse9"):
        ops.set_instruction_set("sse9")


def test_calls_leave_no_memory_behind():
    """Every way that arguments are passed, called often; 32 bytes lost a call would be 256 KiB.

    Not the operators that return a string: LibTorch 2.13 keeps 46 bytes of each, and nobody asks
    for the instruction set in a loop.
    """
    p = problem(B=1, T=1, H=1, K=2, V=2, heads=(1, 1, 1), dtype=torch.float32)
    inputs = {n: t for n, t in p.items() if n not in ("h0", "u0")}
    h, u = p["h0"].clone(), p["u0"].clone()
    d_o = torch.ones(1, 1, 1, 2)
    x, weight, state = torch.ones(1, 1, 2), torch.ones(2, 2), torch.zeros(1, 2, 2)
    row, cu = torch.ones(1, 2), torch.tensor([0, 1])
    calls = {
        "gka_forward": lambda: ops.gka_forward(**p, cu_seqlens=cu, scale=0.5, num_iter=1),
        "gka_backward": lambda: ops.gka_backward(**p, cu_seqlens=cu, d_o=d_o, num_iter=1),
        "gka_step": lambda: ops.gka_step(**inputs, h=h, u=u, cu_seqlens=cu, num_iter=1),
        "causal_conv_forward": lambda: ops.causal_conv_forward(x, weight, state, cu),
        "causal_conv_backward": lambda: ops.causal_conv_backward(x, x, weight, state, cu),
        "causal_conv_step": lambda: ops.causal_conv_step(row, weight, state),
        "gated_rms_norm_forward": lambda: ops.gated_rms_norm_forward(row, row, row[0]),
        "gated_rms_norm_backward": lambda: ops.gated_rms_norm_backward(row, row, row, row[0]),
        "unit_norm_forward": lambda: ops.unit_norm_forward(row, kind="fla"),
        "unit_norm_backward": lambda: ops.unit_norm_backward(row, row, kind="official"),
    }

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, call in calls.items():
            for _ in range(2000):
                call()
            before = resident()
            for _ in range(8000):
                call()
            grown = resident() - before
            assert grown < 160 * 1024, f"{name}: {grown / 8000:.0f} bytes a call"
    finally:
        torch.set_num_threads(before_threads)
