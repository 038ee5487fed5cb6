// The direct solver for the tokens of a block: up to kBlockChunks chunks that share the factors of
// one matrix (docs/math.md, "The direct solver").
//
// Token t's system, divided by e^{G_t} (G_t from the block's start), is (M_t + delta_t I) x_t = b_t
//
//   M_t = H_0 + mu I + sum_{j<=t} kt_j kt_j^T     kt_j = e^{-G_j/2} k_j     b_t = e^{-G_t} q_t
//   delta_t = lambda_t e^{-G_t} - mu
//
// With L L^T = H_0 + mu I, W = L^{-1} Kt^T and R R^T = I + W^T W (the leading block of R serves
// every token), M_t^{-1} b = L^{-T} (Z - W R^{-T} mask R^{-1} mask W^T Z) for Z = L^{-1} b, mask
// keeping the rows j <= t. The shift delta_t is taken in by Chebyshev's iteration on I + delta_t
// M_t^{-1}, whose eigenvalues lie between 1 and rho_t = 1 + delta_t / mu: with rho_t near 1 it
// takes two or three steps.
//
// The keys are appended chunk by chunk; so are the rows of R. Tokens stay in their lanes.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/block_cholesky.hpp"
#include "cpu/chebyshev.hpp"
#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"
#include "cpu/scratch_sizes.hpp"

namespace kalmanet::cpu {

template <class Vec>
struct DirectBlock {
  using Elem = typename Vec::Elem;
  int64_t K = 0, Kp = 0;
  int64_t capacity = 0;   // chunks
  BlockCholesky<Elem> l;  // of H_0 + mu I
  BlockCholesky<Elem> r;  // of I + W^T W, a row a token
  Elem* w_lanes;          // [chunk][Kp][t]: W
  Elem* w_rows;           // [token][Kp]
  Elem* s;                // [token, or row of H_0][t]
  Elem* applied;          // lanes [Kp][t]: Z
  Elem* start;            // lanes: M^{-1} b
  Elem* correction[2];    // lanes: what is added to x
  bool active = false;
  bool h_is_zero = false;  // L = sqrt(mu) I, and l is not used
  double mu = 0;
  double decay = 1;         // e^{G} from the block's start to the current chunk's
  int64_t chunks = 0;       // appended
  double shift[kLanes];     // delta_t of the current chunk
  double gain[kLanes];      // e^{-G_t}, 0 for what has no solution (f_t = 0) or is no token
  double ratio = 1;         // largest of rho_t and 1 / rho_t over the current chunk
  double cancellation = 0;  // largest kt_j^T (H_0 + mu I)^{-1} kt_j so far
};

template <class Vec, class S>
void carve_direct(DirectBlock<Vec>& d, int64_t K, int64_t capacity, Arena<S>& arena) {
  using Elem = typename Vec::Elem;
  constexpr int64_t kEach = sizeof(Elem) / sizeof(S);
  const auto take = [&](int64_t n) { return reinterpret_cast<Elem*>(arena.take(kEach * n)); };
  const int64_t tokens = capacity * kLanes;
  d.K = K;
  d.Kp = padded(K);
  d.capacity = capacity;
  const int64_t rows = d.Kp > tokens ? d.Kp : tokens;
  const auto take_factor = [&](int64_t size) {
    Elem* const at = take(block_cholesky_elems(size));
    return BlockCholesky<Elem>{at, at + size * size, size};
  };
  d.l = take_factor(d.Kp);
  d.r = take_factor(tokens);
  d.w_lanes = take(tokens * d.Kp);
  d.w_rows = take(tokens * d.Kp);
  d.s = take(rows * kLanes);
  d.applied = take(d.Kp * kLanes);
  d.start = take(d.Kp * kLanes);
  for (Elem*& p : d.correction) p = take(d.Kp * kLanes);
  d.active = false;
}

// L for the state before the next chunk. mu > 0.
template <class Vec, class S>
void start_block(DirectBlock<Vec>& d, const S* h, bool h_is_zero, double mu) {
  using Elem = typename Vec::Elem;
  d.active = true;
  d.h_is_zero = h_is_zero;
  d.mu = mu;
  d.decay = 1.0;
  d.chunks = 0;
  d.cancellation = 0.0;
  if (h_is_zero) return;
  for (int64_t from = 0; from < d.Kp; from += kLanes) {
    for (int64_t c = 0; c < from + kLanes; ++c) {
      for (int64_t t = 0; t < kLanes; ++t)
        d.s[c * kLanes + t] = static_cast<Elem>(h[c * d.Kp + from + t]);
    }
    for (int64_t t = 0; t < kLanes; ++t) {
      Elem& diagonal = d.s[(from + t) * kLanes + t];
      diagonal = static_cast<Elem>(static_cast<double>(diagonal) + mu);
    }
    append_rows<Vec>(d.l, from, d.s);
  }
}

// y = L^{-1} b, lanes [Kp][t].
template <class Vec, class B>
void apply_l(const DirectBlock<Vec>& d, const B* b, typename Vec::Elem* y) {
  if (!d.h_is_zero) return solve_lower<Vec>(d.l, d.Kp, b, y);
  const typename Vec::Reg scale = Vec::set1(static_cast<typename Vec::Elem>(1.0 / std::sqrt(d.mu)));
  for (int64_t at = 0; at < d.Kp * kLanes; at += Vec::kWidth) {
    Vec::store(y + at, Vec::mul(scale, load_as<Vec>(b + at)));
  }
}

// L^{-T} y in place, each register also handed to epilogue(at, lane, register).
template <class Vec, class Epilogue>
KALMANET_INLINE void apply_lt(const DirectBlock<Vec>& d, typename Vec::Elem* y,
                              Epilogue&& epilogue) {
  if (!d.h_is_zero) return solve_upper<Vec>(d.l, d.Kp, y, y, epilogue);
  const typename Vec::Reg scale = Vec::set1(static_cast<typename Vec::Elem>(1.0 / std::sqrt(d.mu)));
  for (int64_t at = 0; at < d.Kp * kLanes; at += Vec::kWidth) {
    epilogue(at, static_cast<int>(at % kLanes), Vec::mul(scale, Vec::load(y + at)));
  }
}

// S[token][t] = W^T Z for the first `tokens` of the block.
template <class Vec>
void multiply_by_keys(const DirectBlock<Vec>& d, int64_t tokens, const typename Vec::Elem* z,
                      typename Vec::Elem* s) {
  using T = Tile<Vec>;
  for (int64_t n = 0; n < tokens; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(d.w_lanes + (n / kLanes) * d.Kp * kLanes + n % kLanes, kLanes, d.K, z);
    tile.store(s + n * kLanes);
  }
}

// Takes in the keys of chunk c.
template <class Vec, class S>
void append_chunk(DirectBlock<Vec>& d, const Chunk<S>& c) {
  using Elem = typename Vec::Elem;
  alignas(64) Elem scale[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) {
    const double since = d.decay * c.h_decay->since_start64[t];
    scale[t] = t < c.n ? static_cast<Elem>(1.0 / std::sqrt(since)) : Elem{0};
  }
  const int64_t from = d.chunks * kLanes, tokens = from + kLanes;
  Elem* const w = d.w_lanes + d.chunks * d.Kp * kLanes;
  apply_l<Vec>(d, c.k_lanes, w);
  for (int64_t at = 0; at < d.Kp * kLanes; at += Vec::kWidth) {
    Vec::store(w + at, Vec::mul(Vec::load(scale + at % kLanes), Vec::load(w + at)));
  }
  lanes_to_rows<Vec>(w, d.Kp, d.w_rows + from * d.Kp);
  multiply_by_keys<Vec>(d, tokens, w, d.s);
  for (int64_t t = 0; t < kLanes; ++t) {
    Elem& diagonal = d.s[(from + t) * kLanes + t];
    const double w2 = diagonal;
    if (w2 > d.cancellation) d.cancellation = w2;
    diagonal += 1;
  }
  append_rows<Vec>(d.r, from, d.s);
  ++d.chunks;
}

// The chunk's shifts in the block's scale, after its keys are in. A token without a solution takes
// part with the block's own shift and a right-hand side of zero.
template <class Vec, class S>
void load_shifts(DirectBlock<Vec>& d, const Chunk<S>& c) {
  d.ratio = 1.0;
  for (int64_t t = 0; t < kLanes; ++t) {
    d.shift[t] = d.gain[t] = 0.0;
    if (t >= c.n || c.norm[t] == 0.0) continue;
    const double since = d.decay * c.h_decay->since_start64[t];
    const double shift = c.lambda[t] / since;
    d.gain[t] = 1.0 / since;
    d.shift[t] = shift - d.mu;
    const double rho = shift > d.mu ? shift / d.mu : d.mu / shift;
    d.ratio = rho > d.ratio ? rho : d.ratio;
  }
}

// epilogue(at, lane, register of M_t^{-1} b_t) for every register of lanes [Kp][t].
template <class Vec, class B, class Epilogue>
KALMANET_INLINE void apply_inverse(const DirectBlock<Vec>& d, const B* b, Epilogue&& epilogue) {
  using Reg = typename Vec::Reg;
  using T = Tile<Vec>;
  const int64_t tokens = d.chunks * kLanes, own = tokens - kLanes;
  apply_l<Vec>(d, b, d.applied);
  multiply_by_keys<Vec>(d, tokens, d.applied, d.s);
  // R is lower triangular: what R^{-1} makes of rows j > t reaches rows j > t only, so that one
  // mask does. A chunk's tokens see all keys of the chunks before it.
  solve_lower<Vec>(d.r, tokens, d.s, d.s);
  for (int64_t j = 1; j < kLanes; ++j) {
    for (int64_t t = 0; t < j; ++t) d.s[(own + j) * kLanes + t] = 0;
  }
  solve_upper<Vec>(d.r, tokens, d.s, d.s, [](int64_t, int, Reg) {});
  for (int64_t n = 0; n < d.Kp; n += T::kRows) {
    T tile;
    tile.clear();
    tile.accumulate(d.w_rows + n, d.Kp, tokens, d.s);
    tile.each([&](int64_t offset, int, Reg acc) {
      const int64_t at = n * kLanes + offset;
      Vec::store(d.applied + at, Vec::sub(Vec::load(d.applied + at), acc));
    });
  }
  apply_lt<Vec>(d, d.applied, epilogue);
}

// Steps after the first application of M^{-1} that shifts within a factor `ratio` of mu take:
// the error after r of them is at most 2 R^{r+1}, R = (sqrt(ratio) - 1) / (sqrt(ratio) + 1).
inline constexpr int kMostSteps = 1 << 20;
template <class Vec>
int direct_steps(double ratio, double tolerance) {
  const double root = std::sqrt(ratio);
  const double r = (root - 1.0) / (root + 1.0);
  if (r <= 0.0) return 0;
  const double steps = std::ceil(std::log(tolerance / 2) / std::log(r)) - 1.0;
  // A ratio beyond counting must look dear, not overflow an int and look cheap: the shifts of a
  // block's later chunks are extrapolated, and may be anything.
  if (!(r < 1.0) || !(steps < kMostSteps)) return kMostSteps;
  return steps > 0.0 ? static_cast<int>(steps) : 0;
}

// The largest ratio for which direct_steps says `steps`, but for rounding.
template <class Vec>
double widest_ratio(int steps, double tolerance) {
  const double r = std::pow(tolerance / 2, 1.0 / (steps + 1));
  const double root = (1.0 + r) / (1.0 - r);
  return root * root * (1.0 - 1e-9);
}

// (I + delta_t M_t^{-1}) x_t = M_t^{-1} b_t for every token of the chunk that append_chunk and
// load_shifts took last. b, x, other: [Kp][t]; returns which of x and other holds the solution.
template <class Vec, class B>
typename Vec::Elem* iterate_direct(const DirectBlock<Vec>& d, const B* b, int steps,
                                   typename Vec::Elem* x, typename Vec::Elem* other) {
  using Reg = typename Vec::Reg;
  using Elem = typename Vec::Elem;
  alignas(64) Elem gain[kLanes], delta[kLanes], step[kLanes], momentum[kLanes], weight[kLanes];
  double rho2[kLanes], first[kLanes], w[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) {
    const double end = 1.0 + d.shift[t] / d.mu;  // the other end of the interval, rho_t
    const double centre = 0.5 * (1.0 + end), half = 0.5 * (end - 1.0);
    first[t] = 1.0 / centre;
    rho2[t] = 0.25 * (half / centre) * (half / centre);
    w[t] = 2.0;
    gain[t] = static_cast<Elem>(d.gain[t]);
    step[t] = static_cast<Elem>(first[t]);
    delta[t] = static_cast<Elem>(d.shift[t]);
  }
  apply_inverse<Vec>(d, b, [&](int64_t at, int lane, Reg mb) {
    const Reg y = Vec::mul(Vec::load(gain + lane), mb);
    Vec::store(d.start + at, y);
    Vec::store(x + at, Vec::mul(Vec::load(step + lane), y));
    Vec::store(other + at, Vec::zero());
  });
  for (int i = 0; i < steps; ++i) {
    for (int64_t t = 0; t < kLanes; ++t) {
      w[t] = 1.0 / (1.0 - rho2[t] * w[t]);
      momentum[t] = static_cast<Elem>(w[t] - 1.0);
      weight[t] = static_cast<Elem>(first[t] * w[t]);
    }
    apply_inverse<Vec>(d, x, [&](int64_t at, int lane, Reg mx) {
      const Reg xt = Vec::load(x + at);
      const Reg residual =
          Vec::sub(Vec::fma(Vec::load(delta + lane), mx, xt), Vec::load(d.start + at));
      const Reg change = Vec::sub(xt, Vec::load(other + at));
      const Reg moved = Vec::fma(Vec::load(momentum + lane), change, xt);
      Vec::store(other + at, Vec::fnma(Vec::load(weight + lane), residual, moved));
    });
    Elem* next = other;
    other = x;
    x = next;
  }
  return x;
}

// Whether a float32 solution needs correcting by its residual. M_t^{-1} b takes what the block's
// keys have already explained off a larger (H_0 + mu I)^{-1} b: along a key k_j that is
// k_j^T (H_0 + mu I)^{-1} k_j times larger than what remains, and so is the rounding error of x
// along it, where U reads x and where the gradient of k_j is a small difference. The residual,
// which is one of H_t, restores it; its own solution need not have more than two digits. Eight
// times is three bits: with 1 instead, forward and backward took 7% longer at ridge 0.02 and
// memory 256, and the table of docs/numerics.md section 9 was hardly better for it.
// A correction leaves kCorrectionTolerance of what it corrects, so a larger factor takes another:
// 86,000 was met in a chunk whose decay empties the memory, at ridge 0.001, where one correction
// left dk of a head wrong by 4e-2.
inline constexpr double kLargestCancellation = 8.0;
inline constexpr double kCorrectionTolerance = 0.01;

// solution += an approximate solution for its residual. residual: room, lanes [Kp][t].
template <class Vec, class B, class S>
void correct(const DirectBlock<Vec>& d, const Chunk<S>& c, const S* h, bool h_is_zero, const B* b,
             typename Vec::Elem* solution, typename Vec::Elem* residual) {
  using Reg = typename Vec::Reg;
  using Elem = typename Vec::Elem;
  alignas(64) Elem lambda[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) lambda[t] = static_cast<Elem>(c.lambda[t]);
  apply_h<Vec>(c, h, h_is_zero, solution, [&](int64_t at, int lane, Reg hx) {
    const Reg ax = Vec::fma(Vec::load(lambda + lane), Vec::load(solution + at), hx);
    Vec::store(residual + at, Vec::sub(load_as<Vec>(b + at), ax));
  });
  const Elem* change =
      iterate_direct<Vec>(d, residual, direct_steps<Vec>(d.ratio, kCorrectionTolerance),
                          d.correction[0], d.correction[1]);
  for (int64_t at = 0; at < d.Kp * kLanes; at += Vec::kWidth) {
    Vec::store(solution + at, Vec::add(Vec::load(solution + at), Vec::load(change + at)));
  }
}

// Solves (H_t + lambda_t I) x_t = b_t for every token of the chunk, as above.
template <class Vec, class B, class S>
typename Vec::Elem* solve_direct(const DirectBlock<Vec>& d, const Chunk<S>& c, const S* h,
                                 bool h_is_zero, const B* b, int steps, typename Vec::Elem* x,
                                 typename Vec::Elem* other, bool corrected) {
  using Elem = typename Vec::Elem;
  Elem* const solution = iterate_direct<Vec>(d, b, steps, x, other);
  if (!corrected || !kHasWider<Vec>) return solution;
  Elem* const residual = solution == x ? other : x;
  for (double left = d.cancellation; left > kLargestCancellation; left *= kCorrectionTolerance) {
    correct<Vec>(d, c, h, h_is_zero, b, solution, residual);
  }
  return solution;
}

}  // namespace kalmanet::cpu
