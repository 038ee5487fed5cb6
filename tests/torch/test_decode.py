"""Decoding from a pool of states and with drafts, beside plain steps."""

import pytest
import torch
from operators import ops, problem

INT = torch.int32


def tokens(p, begin, end):
    return {n: t[:, begin:end] for n, t in p.items() if n not in ("h0", "u0")}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_draft_is_what_plain_steps_of_its_accepted_tokens_are(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("NOT TESTED: no GPU here")
    p = {n: t.float().to(device) for n, t in problem(T=9, K=20, V=12).items()}
    B = p["q"].shape[0]
    h, u = p["h0"].clone(), p["u0"].clone()
    want, _ = ops.gka_step(**tokens(p, 0, 6), h=h, u=u)  # tokens 0..5 are the right ones
    pool = [torch.full((5, *s.shape[1:]), 0.5, device=device) for s in (h, u)]
    slots = torch.tensor([3, 1], dtype=INT, device=device)[:B]
    for state, start in zip(pool, (p["h0"], p["u0"]), strict=True):
        state[slots.long()] = start
    before = [s.clone() for s in pool]
    first = tokens(p, 0, 4)
    o1, _ = ops.gka_step(**first, h=pool[0], u=pool[1], slots=slots, is_draft=True)
    assert all(torch.equal(a, b) for a, b in zip(pool, before, strict=True)), "a draft wrote states"
    draft = {f"draft_{n}": first[n] for n in ("k", "v", "g", "gk", "beta") if n in first}
    accepted = torch.tensor([2, 4], dtype=INT, device=device)[:B]
    more = {n: torch.cat([t[:1, 2:6], t[1:, 4:8]])[:, :2] for n, t in p.items() if t.shape[1] == 9}
    o2, _ = ops.gka_step(**more, h=pool[0], u=pool[1], slots=slots, accepted=accepted, **draft)
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(o1[0, :2], want[0, :2], **close)
    torch.testing.assert_close(o2[0], want[0, 2:4], **close)
    torch.testing.assert_close(o2[1], want[1, 4:6], **close)
    torch.testing.assert_close(pool[0][slots.long()][1], h[1], **close)
    assert torch.equal(pool[1][0], before[1][0]), "another slot was written"


def test_mistakes_are_named():
    p = {n: t.float() for n, t in problem(T=2, K=20, V=12).items()}
    step = {"h": p["h0"].clone(), "u": p["u0"].clone()} | tokens(p, 0, 2)
    with pytest.raises(RuntimeError, match="slots: .*int32"):
        ops.gka_step(**step, slots=torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match=r"slots\[1\] is 9; the pool has 2"):
        ops.gka_step(**step, slots=torch.tensor([0, 9], dtype=INT))
    with pytest.raises(RuntimeError, match="last_draft, which is absent"):
        ops.gka_step(**step, accepted=torch.tensor([0, 1], dtype=INT))
