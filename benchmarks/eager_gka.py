"""Gated KalmaNet, forward and backward, in PyTorch eager: the peer that make bench measures.

As fast as plain PyTorch operations were found to make it: every chunk of every head in one batch
(or in groups of chunks that fit the second-level cache), batched matrix products for all that is
quadratic, in-place updates, per-token coefficients folded into the matrices, implicit gradients
with the x_t of the forward. docs/math.md has the formulas and the letters. Chebyshev, or the
direct solver of eager_direct.py; scalar ridge ratio, one sequence length that the chunk divides, g
the same as gk.
"""

import torch
from eager_direct import DirectSolver


def chunked(t, C):
    """[B,T,H,D] or [B,T,H] -> [B*H*(T/C), C, D] or [.., C]: chunks of a head follow each other."""
    B, T, H = t.shape[:3]
    return t.transpose(1, 2).reshape(B * H * (T // C), C, *t.shape[3:])


def unchunked(t, B, H):
    n, C = t.shape[:2]
    T = n // (B * H) * C
    return t.reshape(B, H, T, *t.shape[2:]).transpose(1, 2)


def scan(start, decay, reverse=False):
    """The states that each chunk starts from (or, reversed, the carry that it ends with): start
    [heads, chunks, K, V] holds what each chunk adds, decay [heads, chunks]; in place."""
    order = range(start.shape[1])
    carry = torch.zeros_like(start[:, 0])
    for c in reversed(order) if reverse else order:
        following = torch.addcmul(start[:, c], carry, decay[:, c, None, None])
        start[:, c] = carry
        carry = following
    return carry


class ChebyshevSolver:
    """x_t = (H_t + lambda_t I)^{-1} b_t for all tokens of all chunks."""

    def __init__(self, k, kt, h0, mask, since, f, a, num_iter, group):
        self.k, self.kt, self.h0, self.a, self.num_iter = k, kt, h0, a, num_iter
        self.group = group or k.shape[0]
        # step_t = 2 / (2 lambda_t + f_t) is folded into the mask and the decay of H_0; step_t
        # lambda_t and rho are constants then.
        self.step = (1.0 / ((a + 0.5) * f)).unsqueeze(-1)
        self.mask = mask * self.step
        self.since = since.unsqueeze(-1) * self.step

    def __call__(self, b):
        out = torch.empty_like(b)
        for i in range(0, b.shape[0], self.group):
            s = slice(i, i + self.group)
            self.solve(b[s], s, out[s])
        return out

    def solve(self, b, s, out):
        """One group of chunks; the answer goes to `out`."""
        k, kt, h0, mask, since = self.k[s], self.kt[s], self.h0[s], self.mask[s], self.since[s]
        ridge = 2 * self.a / (2 * self.a + 1)  # step_t lambda_t
        rho2 = (0.5 / (2 * self.a + 1)) ** 2
        b = b * self.step[s]
        x, old = b.clone(), torch.zeros_like(b)
        hx, dots = torch.empty_like(b), torch.empty_like(mask)
        w = 2.0
        for _ in range(self.num_iter):
            w = 1.0 / (1.0 - rho2 * w)
            torch.bmm(x, kt, out=dots)
            dots.mul_(mask)
            torch.bmm(x, h0, out=hx)
            # old <- w x - w (A x + ridge x - b) - (w - 1) old
            old.baddbmm_(dots, k, beta=1.0 - w, alpha=-w)
            old.addcmul_(hx, since, value=-w)
            old.add_(x, alpha=w * (1.0 - ridge)).add_(b, alpha=w)
            x, old = old, x
        out.copy_(x)


def apply_h(x, k, kt, h0, mask, since):
    """H_t x_t for all tokens."""
    return torch.baddbmm(torch.bmm(x, h0).mul_(since), torch.bmm(x, kt).mul_(mask), k)


def forward(q, k, v, g, alpha, beta, a, solver, C, group):
    B, T, H, K = q.shape
    scale = K**-0.5
    n = T // C
    q, k, v, g, alpha, beta = (chunked(t, C) for t in (q, k, v, g, alpha, beta))
    k_in, v_in = k, v
    k, v = k * beta.unsqueeze(-1), v * beta.unsqueeze(-1)
    kt = k.transpose(1, 2)
    total = g.cumsum(1)
    mask = (total.unsqueeze(2) - total.unsqueeze(1)).tril_().exp_().tril_()
    since = total.exp()
    decay = since[:, -1].reshape(B * H, n)
    weighted = (k * mask[:, -1].unsqueeze(-1)).transpose(1, 2)
    h0, u0 = torch.bmm(weighted, k), torch.bmm(weighted, v)
    scan(h0.view(B * H, n, K, K), decay)
    scan(u0.view(B * H, n, K, -1), decay)
    gram = torch.bmm(k, kt)
    inside = (torch.bmm(mask, gram * gram) * mask).sum(2)
    cross = (mask * (torch.bmm(k, h0) * k).sum(2).unsqueeze(1)).sum(2)
    norm2 = h0.flatten(1).square().sum(1, keepdim=True)
    f = (since * since * norm2 + 2 * since * cross + inside).sqrt_()
    kind, accuracy = solver  # chebyshev: its steps; direct: the tolerance
    if kind == "direct":
        solver = DirectSolver(k, kt, h0, mask, since, total, f, a, accuracy, group, n)
    else:
        solver = ChebyshevSolver(k, kt, h0, mask, since, f, a, accuracy, group)
    x = solver(q)
    m = torch.lerp(q, x, alpha.unsqueeze(-1)).mul_(scale)  # scale included
    o = torch.bmm(m, u0).mul_(since.unsqueeze(-1))
    o.baddbmm_(torch.bmm(m, kt).mul_(mask), v)
    kept = (solver, q, k_in, v_in, k, v, kt, u0, alpha, beta, mask, since, decay, gram, f, x, m)
    return unchunked(o, B, H), kept


def backward(d_o, kept, a, B, H, C):
    (solver, q, k_in, v_in, k, v, kt, u0, alpha, beta, mask, since, decay, gram, f, x, m) = kept
    h0, K = solver.h0, k.shape[2]
    scale = K**-0.5
    n = decay.shape[1]
    d_o = chunked(d_o, C)
    after = since.unsqueeze(-1)  # e^{G_t}
    to_end = mask[:, -1].unsqueeze(-1)  # e^{G_C - G_t}
    mask_t = mask.transpose(1, 2)
    vt = v.transpose(1, 2)
    do_v = torch.bmm(d_o, vt).mul_(mask)
    dm = torch.bmm(d_o, u0.transpose(1, 2)).mul_(after).baddbmm_(do_v, k).mul_(scale)
    dalpha = (dm * (x - q)).sum(2)
    z = solver(dm * alpha.unsqueeze(-1))
    dq = z + dm * (1 - alpha).unsqueeze(-1)
    zx = (z * x).sum(2)
    w = zx * (a / f)  # per token

    # What a chunk adds to the carries: dE = sum e^{G_i} m_i do_i^T, and dD = -sum e^{G_i} z_i x_i^T
    # - sum_j (sum_i e^{G_i} w_i M_ij) k_j k_j^T - (sum e^{2 G_i} w_i) H_0
    e = torch.bmm((m * after).transpose(1, 2), d_o)
    sw = since * w
    d = torch.bmm((z * after).transpose(1, 2), x).neg_()
    d.baddbmm_((k * torch.bmm(sw.unsqueeze(1), mask).transpose(1, 2)).transpose(1, 2), k, alpha=-1)
    d.addcmul_(h0, (since * sw).sum(1)[:, None, None], value=-1)
    scan(e.view(B * H, n, K, -1), decay, reverse=True)
    scan(d.view(B * H, n, K, K), decay, reverse=True)

    # E_t v_t and E_t^T k_t
    ev = torch.bmm(v, e.transpose(1, 2)).mul_(to_end).baddbmm_(do_v.transpose(1, 2), m)
    dots = torch.bmm(m, kt).mul_(mask)
    dv = torch.bmm(k, e).mul_(to_end).baddbmm_(dots.transpose(1, 2), d_o)
    # (D_t + D_t^T) k_t
    both = d + d.transpose(1, 2)
    dk = torch.bmm(k, both).mul_(to_end)
    dk.baddbmm_(torch.bmm(x, kt).mul_(mask).transpose(1, 2), z, alpha=-1)
    dk.baddbmm_(torch.bmm(z, kt).mul_(mask).transpose(1, 2), x, alpha=-1)
    common = torch.bmm(mask_t, mask * w.unsqueeze(-1)).mul_(gram)
    hk = torch.bmm(k, h0)
    weights = torch.bmm(mask_t, (w * since).unsqueeze(-1))
    common = torch.baddbmm(hk.mul_(weights), common, k)
    dk.sub_(common, alpha=2)
    # <D_t, H_{t-1}> e^{gk_t} = the sum over i >= t of <C_i, H_i> - k_i^T D_i k_i, C_i what token i
    # adds to D; over a whole sequence, so no chunk needs an inner product of its own.
    hx = apply_h(x, k, kt, h0, mask, after)
    r = -(z * hx).sum(2) - w * f * f - 0.5 * (dk * k).sum(2)
    r += (m * dm).sum(2).div_(scale) - (ev * k).sum(2)
    dg = r.double().view(B * H, -1).flip(1).cumsum(1).flip(1).float().view(-1, C)
    dk += ev
    dbeta = (dk * k_in).sum(2) + (dv * v_in).sum(2)
    dk, dv = dk * beta.unsqueeze(-1), dv * beta.unsqueeze(-1)
    return tuple(unchunked(t, B, H) for t in (dq, dk, dv, dg, dalpha, dbeta))


class EagerGka(torch.autograd.Function):
    """o [B,T,H,V] of q, k [B,T,H,K], v [B,T,H,V] and g (of both states), alpha, beta [B,T,H].

    a: the ridge ratio; solver: ("chebyshev", steps) or ("direct", tolerance); C: chunk length;
    group: how many chunk-heads the solver takes at a time, 0: all."""

    @staticmethod
    def forward(ctx, q, k, v, g, alpha, beta, a, solver, C, group):
        o, ctx.kept = forward(q, k, v, g, alpha, beta, a, solver, C, group)
        ctx.settings = a, q.shape[0], q.shape[2], C
        return o

    @staticmethod
    def backward(ctx, d_o):
        a, B, H, C = ctx.settings
        return *backward(d_o, ctx.kept, a, B, H, C), None, None, None, None
