"""Every mistake is a ValueError whose message names the argument, what was expected, what came."""

import os
import re
import subprocess
import sys

import pytest
import torch
from cases import DEVICE, problem
from kalmanet.ops import (
    chunk_gka,
    fused_recurrent_gka,
    gka,
    naive_recurrent_gka,
    naive_recurrent_gka_chebyshev,
)

Z = torch.zeros
PUBLISHED = {
    "k": (
        {"k": Z(2, 7, 2, 4)},
        "k: must have q's shape [2, 7, 2, 5] ([B,T,H,K]), got [2, 7, 2, 4]",
    ),
    "v": (
        {"v": Z(2, 6, 2, 3)},
        "v: must be [B,T,H,V] with q's B, T and H [2, 7, 2], got [2, 6, 2, 3]",
    ),
    "g": ({"g": Z(2, 7, 1)}, "g: must be [B,T,H] = [2, 7, 2], got [2, 7, 1]"),
    "gk": ({"gk": Z(2, 6, 2)}, "gk: must be [B,T,H] = [2, 7, 2], got [2, 6, 2]"),
    "alpha": ({"alpha": Z(2, 7, 3)}, "alpha: must be [B,T,H] = [2, 7, 2], got [2, 7, 3]"),
    "alpha, a number a token": (
        {"alpha": Z(2, 7)},
        "alpha: must have the 3 dimensions [B,T,H], got [2, 7]",
    ),
    "k of three dimensions": ({"k": Z(7, 2, 5)}, "k: must have the 4 dimensions [B,T,H,K], got"),
    "v of three dimensions": ({"v": Z(7, 2, 3)}, "v: must have the 4 dimensions [B,T,H,V], got"),
    "V": ({"v": Z(2, 7, 2, 257)}, "v: has a head dim (last size) of 257; allowed are 1 to 256"),
    "q of three dimensions": ({"q": Z(7, 2, 5)}, "q: must have the 4 dimensions [B,T,H,K], got"),
    "a list": ({"q": [1.0]}, "q: must be a tensor [B,T,H,K], got list"),
    "integers": ({"v": Z(2, 7, 2, 3).long()}, "v: has dtype torch.int64; allowed are float32"),
    "head dim": (
        {"q": Z(2, 7, 2, 300), "k": Z(2, 7, 2, 300)},
        "q: has a head dim (last size) of 300; allowed are 1 to 256",
    ),
    "h_kk": (
        {"initial_state": (Z(2, 2, 5, 4), Z(2, 2, 5, 3))},
        "initial_state (h_kk): must be [N,H,K,K] = [2, 2, 5, 5], got [2, 2, 5, 4]",
    ),
    "h_kv": (
        {"initial_state": (Z(2, 2, 5, 5), Z(1, 2, 5, 3))},
        "initial_state (h_kv): must be [N,H,K,V] = [2, 2, 5, 3], got [1, 2, 5, 3]",
    ),
    "half a state": (
        {"initial_state": Z(2, 2, 5, 5)},
        "initial_state: must be a tuple (h_kk [N,H,K,K], h_kv [N,H,K,V]), got Tensor",
    ),
    "ridge_ratio 0": ({"ridge_ratio": 0}, "ridge_ratio: is 0; it must be a positive number"),
    "ridge_ratio shape": (
        {"ridge_ratio": Z(2, 7, 1) + 1},
        "ridge_ratio: must be a number or a tensor [B,T,H] = [2, 7, 2], got [2, 7, 1]",
    ),
}
OURS = {
    "num_iter 0": ({"num_iter": 0}, "num_iter: is 0; it must be >= 1"),
    "num_iter -1": ({"num_iter": -1}, "num_iter: is -1; it must be >= 1"),
    "num_iter text": ({"num_iter": "many"}, "num_iter: is 'many'; it must be a whole number >= 1"),
    "solver": (
        {"solver": "newton"},
        'solver: is \'newton\'; allowed are "chebyshev", "direct", "cg", "auto"',
    ),
    "tolerance": ({"tolerance": 2.0}, "tolerance: is 2.0; it must be >= 0 and < 1"),
    "cu_seqlens with a batch": (
        {"cu_seqlens": torch.tensor([0, 7])},
        "cu_seqlens: needs B == 1 (all sequences packed into one row), got B = 2",
    ),
    "cu_seqlens of floats": (
        {"cu_seqlens": Z(3)},
        "cu_seqlens: must be int64 [N+1], from 0 to T, got [3] of torch.float32",
    ),
    "states beside packed sequences": (
        {n: Z(1, 7, 2, d) for n, d in (("q", 5), ("k", 5), ("v", 3))}
        | {n: None for n in ("g", "gk", "alpha")}
        | {
            "cu_seqlens": torch.tensor([0, 3, 7]),
            "initial_state": (Z(1, 2, 5, 5), Z(1, 2, 5, 3)),
        },
        "initial_state (h_kk): must be [N,H,K,K] = [2, 2, 5, 5], got [1, 2, 5, 5]",
    ),
    "one offset": ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens: needs at least 2 offsets"),
}


def arguments():
    return problem(T=7, K=5, V=3, dtype=torch.float32)


@pytest.mark.parametrize(
    "f", [chunk_gka, fused_recurrent_gka, naive_recurrent_gka, naive_recurrent_gka_chebyshev]
)
@pytest.mark.parametrize("case", PUBLISHED)
def test_published_errors(f, case):
    change, message = PUBLISHED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        f(**arguments() | change)


@pytest.mark.parametrize("f", [chunk_gka, fused_recurrent_gka])
@pytest.mark.parametrize("case", OURS)
def test_our_errors(f, case):
    change, message = OURS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        f(**arguments() | change)


def test_only_chunked():
    with pytest.raises(ValueError, match='arithmetic: is .* allowed are "standard", "bfloat16"'):
        chunk_gka(**arguments(), arithmetic="int8")
    with pytest.raises(ValueError, match="chunk_size: is 1000; allowed are 1 to 256"):
        chunk_gka(**arguments(), chunk_size=1000)
    with pytest.raises(ValueError, match='num_iter: is "auto", which the naive functions'):
        naive_recurrent_gka_chebyshev(**arguments(), num_iter="auto")
    with pytest.raises(ValueError, match="num_iter: is 0; it must be >= 1"):
        naive_recurrent_gka_chebyshev(**arguments(), num_iter=0)


def test_what_only_the_library_can_see():
    p = arguments()
    if DEVICE == "cpu":  # a GPU's numbers are not looked at from the host
        with pytest.raises(RuntimeError, match="ridge"):
            chunk_gka(**p, ridge_ratio=torch.full((2, 7, 2), -1.0))
    packed = {n: t[:1] for n, t in p.items()}
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        chunk_gka(**packed, cu_seqlens=torch.tensor([0, 9]))
    p["k"] = p["k"].repeat(1, 1, 2, 1)[:, :, :3]
    with pytest.raises(RuntimeError, match="heads"):
        gka(**p)


def test_devices():
    p = arguments()
    with pytest.raises(ValueError, match=f"g: is on meta, but q is on {p['q'].device}"):
        chunk_gka(**p | {"g": p["g"].to("meta")})


@pytest.mark.parametrize(
    "value, message",
    [
        ("/nowhere/lib.so", "KALMANET_TORCH_LIBRARY names /nowhere/lib.so, which is no file"),
        (__file__, "does not load into PyTorch"),
    ],
)
def test_a_library_that_is_not_there(value, message):
    run = subprocess.run(
        [sys.executable, "-c", "import kalmanet.ops"],
        env=os.environ | {"KALMANET_TORCH_LIBRARY": value},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and message in run.stderr, run.stderr
