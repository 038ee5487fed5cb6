// Which way a chunk is solved, decided from numbers known before any work: the cost model of the
// direct solver and of Chebyshev's iteration at the same accuracy (docs/performance.md, "The cost
// model").
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/chunk.hpp"
#include "cpu/direct.hpp"
#include "cpu/scratch_sizes.hpp"
#include "kalmanet/gka.hpp"

namespace kalmanet::cpu {

// Operations, in multiply-adds of the lane kernels for a chunk of kLanes tokens; sizes padded as
// the kernels see them. `keys`: those of the block, this chunk's included.
template <class Vec>
struct DirectCosts {
  double K;
  bool h_is_zero;
  // One M^{-1} b: two triangular solves with L, W twice, two with R.
  double application(double keys) const {
    return kLanes * ((h_is_zero ? 0.0 : K * K) + 2.0 * keys * K + keys * keys);
  }
  // W, the inner products, and the new rows of R.
  double append(double keys) const {
    return kLanes * ((h_is_zero ? 0.0 : 0.5 * K * K) + keys * K + 0.5 * keys * keys) +
           kBlockOverhead;
  }
  // L: K^3 / 6 multiply-adds, and a block's overhead for every kLanes rows.
  double factor() const { return h_is_zero ? 0.0 : K * K * K / 6 + kBlockOverhead * K / kLanes; }
  double chebyshev(int num_iter) const {
    return num_iter * (kLanes * ((h_is_zero ? 0.0 : K * K) + 2.0 * kLanes * K));
  }
  static constexpr double kBlockOverhead = 30000.0;  // the factors of 16 x 16 in float64
};

// The chunk's true shifts lambda_t e^{-G_t}, in the scale of its own start.
struct ShiftRange {
  double low = 0, high = 0;  // over tokens with a solution; 0 where there is none
  double slope = 0;          // of log(f_t e^{-G_t}), a token
  double ridge_low = 0, ridge_high = 0;
  double since_start = 1;  // e^{G} of the last token
  bool finite = true;
};

template <class Vec, class S>
ShiftRange shift_range(const Chunk<S>& c) {
  ShiftRange r;
  double first = 0.0, last = 0.0;
  int64_t first_t = 0, last_t = 0;
  for (int64_t t = 0; t < c.n; ++t) {
    if (!(c.norm[t] < 1e300)) r.finite = false;
    if (!(c.norm[t] > 0.0)) continue;
    const double since = c.h_decay->since_start64[t];
    r.since_start = since;
    const double shift = c.lambda[t] / since, norm = c.norm[t] / since;
    if (r.low == 0.0) {
      r.low = r.high = shift;
      r.ridge_low = r.ridge_high = c.ridge[t];
      first = norm;
      first_t = t;
    }
    r.low = shift < r.low ? shift : r.low;
    r.high = shift > r.high ? shift : r.high;
    r.ridge_low = c.ridge[t] < r.ridge_low ? c.ridge[t] : r.ridge_low;
    r.ridge_high = c.ridge[t] > r.ridge_high ? c.ridge[t] : r.ridge_high;
    last = norm;
    last_t = t;
  }
  if (last_t > first_t) {
    r.slope = std::log(last / first) / static_cast<double>(last_t - first_t);
    if (!(r.slope > 0.0)) r.slope = 0.0;
  }
  return r;
}

// Keys are scaled by e^{-G/2} and right-hand sides by e^{-G}: beyond this they leave float32.
inline constexpr double kSmallestDecay = 0x1p-40;

enum class ChunkWay { zero, chebyshev, continue_block, new_block };

struct ChunkPlan {
  ChunkWay way = ChunkWay::zero;
  int steps = 0;  // inner steps, or Chebyshev's
  double mu = 0;  // of a new block
};

// Chebyshev's steps for the chunk's smallest ridge ratio.
template <class Vec, class S>
int chebyshev_steps(const Chunk<S>& c, double tolerance) {
  double smallest = c.ridge[0];
  for (int64_t t = 1; t < c.n; ++t) smallest = c.ridge[t] < smallest ? c.ridge[t] : smallest;
  return counted_chebyshev_steps<Vec>(smallest, tolerance);
}

// `window_chunks`: chunks from this one to its window's end.
template <class Vec, class S>
ChunkPlan plan_direct(const Chunk<S>& c, const DirectBlock<Vec>& d, bool h_is_zero,
                      int64_t window_chunks, double tolerance) {
  ChunkPlan plan;
  const ShiftRange r = shift_range<Vec>(c);
  const int fallback = chebyshev_steps<Vec>(c, tolerance);
  if (!r.finite) {  // whatever comes out must not hide it
    plan.way = ChunkWay::chebyshev;
    plan.steps = 1;
    return plan;
  }
  if (r.low == 0.0) return plan;
  const DirectCosts<Vec> costs{static_cast<double>(c.Kp), h_is_zero};
  const double own = static_cast<double>(kLanes);
  // A new block for one, two, ... chunks: the shifts of later ones by extrapolation.
  double best = 0.0;
  double sum = 0.0;
  int64_t expected = 0;  // chunks that the cheapest block would have
  for (int64_t l = 1; l <= window_chunks && l <= d.capacity; ++l) {
    const double tail = r.slope * own * static_cast<double>(l - 1);
    const double high = r.high * std::exp(tail);
    const double ratio = std::sqrt(high / r.low);
    const int steps = direct_steps<Vec>(ratio, tolerance);
    sum = costs.factor();
    for (int64_t i = 1; i <= l; ++i) {
      const double keys = own * static_cast<double>(i);
      sum += costs.append(keys) + (1 + steps) * costs.application(keys);
    }
    sum /= static_cast<double>(l);
    if (l == 1 || sum < best) {
      best = sum;
      plan.mu = std::sqrt(high * r.low);
      expected = l;
    }
  }
  plan.way = ChunkWay::new_block;
  // The active block, whose shift stands.
  if (d.active && d.chunks < d.capacity && d.decay * r.since_start > kSmallestDecay) {
    const double low = r.low / d.decay, high = r.high / d.decay;
    double ratio = high / d.mu > d.mu / low ? high / d.mu : d.mu / low;
    ratio = ratio > 1.0 ? ratio : 1.0;
    const double keys = own * static_cast<double>(d.chunks + 1);
    const int steps = direct_steps<Vec>(ratio, tolerance);
    const double cost = costs.append(keys) + (1 + steps) * costs.application(keys);
    if (cost <= best) {
      best = cost;
      plan.way = ChunkWay::continue_block;
      plan.steps = steps;
    }
  }
  if (plan.way == ChunkWay::new_block) {
    const double ratio = r.high / plan.mu > plan.mu / r.low ? r.high / plan.mu : plan.mu / r.low;
    plan.steps = direct_steps<Vec>(ratio, tolerance);
    if (expected > 1 && r.ridge_low == r.ridge_high) {
      // With one ratio for all tokens shifts mostly grow: as large a mu as these steps allow for
      // the smallest of them leaves the most room for the chunks to come.
      const double largest = r.low * widest_ratio<Vec>(plan.steps, tolerance);
      plan.mu = largest > plan.mu ? largest : plan.mu;
    }
  }
  const bool overflows = plan.way == ChunkWay::new_block && r.since_start < kSmallestDecay;
  if (overflows || costs.chebyshev(fallback) < best) {
    plan.way = ChunkWay::chebyshev;
    plan.steps = fallback;
  }
  return plan;
}

}  // namespace kalmanet::cpu
