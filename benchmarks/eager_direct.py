"""The direct solver in PyTorch eager: one Cholesky factor a chunk for all of its tokens.

Divided by e^{G_t}, token t's system is M_t + delta_t I with

    M_t = H_0 + mu I + Kt_t^T Kt_t,    Kt rows k_j e^{-G_j/2} (j <= t),    mu one number a chunk,

and with P = (H_0 + mu I)^{-1}, Y = P Kt^T and R R^T = I + Kt Y (R lower, so that its leading blocks
factor the leading blocks)

    M_t^{-1} b = P b - Y R^{-T} mask R^{-1} mask Y^T b        for all tokens of the chunk together.

What the shift differs, delta_t, is left to Chebyshev's iteration on (I + delta_t M_t^{-1}), whose
spectrum lies between 1 and mu_t / mu; mu is the geometric mean of the chunk's extremes, and the
number of steps follows from the largest ratio and the tolerance before any work.
"""

import math

import torch


def inner_steps(ratio, tolerance):
    """Steps of Chebyshev's iteration for a condition number `ratio` >= 1."""
    root = math.sqrt(ratio)
    rate = (root - 1) / (root + 1)
    return 0 if rate < 1e-12 else max(0, math.ceil(math.log(tolerance / 2) / math.log(rate)))


class DirectSolver:
    """x_t = (H_t + lambda_t I)^{-1} b_t for all tokens of all chunks; `first`: which chunks begin a
    sequence. They start from H_0 = 0, need several times the steps of the others and lose more
    digits, so they are a group of their own, and corrected once."""

    def __init__(self, k, kt, h0, mask, since, total, f, a, tolerance, group, chunks):
        self.k, self.kt, self.h0, self.mask = k, kt, h0, mask
        self.since, self.shift = since.unsqueeze(-1), (a * f).unsqueeze(-1)
        self.back = (-total).exp_().unsqueeze(-1)  # e^{-G_t}
        n, C, K = k.shape
        mu_t = self.shift * self.back
        low, high = mu_t.amin((1, 2)), mu_t.amax((1, 2))
        mu = (low * high).sqrt_()[:, None, None]
        p = h0.clone()
        p.diagonal(dim1=1, dim2=2).add_(mu[:, 0])
        p = torch.cholesky_inverse(torch.linalg.cholesky(p))
        kt_rows = k * (-0.5 * total).exp_().unsqueeze(-1)
        # P and Y side by side: one product gives P b and Y^T b.
        self.py = torch.empty(n, K, K + C, dtype=k.dtype)
        self.py[:, :, :K] = p
        y = torch.bmm(p, kt_rows.transpose(1, 2))
        self.py[:, :, K:] = y
        inner = torch.bmm(kt_rows, y)
        inner.diagonal(dim1=1, dim2=2).add_(1)
        r = torch.linalg.cholesky(inner)
        eye = torch.eye(C, dtype=k.dtype).expand(n, C, C)
        self.r_inverse = torch.linalg.solve_triangular(r, eye, upper=False)
        self.yt = y.transpose(1, 2).contiguous()
        # Chebyshev's constants a token: the interval between 1 and ratio.
        ratio = mu_t / mu
        self.delta = mu_t - mu
        middle, half = (1 + ratio) / 2, (1 - ratio).abs_() / 2
        self.step = 1 / middle
        self.rho2 = (half * self.step / 2).square_()
        # Work in groups of chunks: the first chunk of every head, then the others.
        chunk = torch.arange(n) % chunks
        largest = torch.sqrt(high / low)
        self.groups = []
        for which, corrected in ((chunk == 0, True), (chunk != 0, False)):
            index = which.nonzero().flatten()
            for part in index.split(group or max(1, n)):
                if part.numel() == 0:
                    continue
                steps = inner_steps(largest[part].max().item(), tolerance)
                # One run of chunks that follow each other is a view, not a copy.
                run = part[-1] - part[0] + 1 == part.numel()
                where = slice(part[0].item(), part[-1].item() + 1) if run else part
                self.groups.append((where, steps, corrected))

    def __call__(self, b):
        out = torch.empty_like(b)
        for where, steps, corrected in self.groups:
            x = self.solve(b[where], where, steps)
            if corrected:
                hx = torch.bmm(x, self.h0[where]).mul_(self.since[where])
                hx.baddbmm_(torch.bmm(x, self.kt[where]).mul_(self.mask[where]), self.k[where])
                residual = b[where] - hx - self.shift[where] * x
                x += self.solve(residual, where, steps)
            out[where] = x
        return out

    def solve(self, b, where, steps):
        py, yt, r_inverse = self.py[where], self.yt[where], self.r_inverse[where]
        delta, step, rho2 = self.delta[where], self.step[where], self.rho2[where]
        K = b.shape[2]

        def apply(c):
            """M_t^{-1} c for all tokens."""
            both = torch.bmm(c, py)
            dots = torch.bmm(both[:, :, K:].tril(), r_inverse.transpose(1, 2)).tril_()
            return torch.baddbmm(both[:, :, :K], torch.bmm(dots, r_inverse), yt, alpha=-1)

        b = b * self.back[where]
        rhs = apply(b)
        x, old, w = rhs * step, torch.zeros_like(rhs), 2.0
        for _ in range(steps):
            w = 1 / (1 - rho2 * w)
            # old <- w x - step w (x + delta M^{-1} x - rhs) - (w - 1) old
            error = apply(x * delta).add_(x).sub_(rhs)
            old.mul_(1 - w).addcmul_(w, x).addcmul_(step * w, error, value=-1)
            x, old = old, x
        return x
