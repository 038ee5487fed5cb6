// Conjugate gradients for all tokens of a chunk together, for comparison with the other solvers:
//   x = 0, r = p = b;  num_iter times:  l = r.r / p.(A p);  x += l p;  r -= l A p;
//                                       p = r + (r'.r' / r.r) p
// with A = H_t + lambda_t I. A token whose residual has vanished stays where it is.
#pragma once

#include <cstdint>

#include "cpu/chebyshev.hpp"
#include "cpu/chunk.hpp"
#include "cpu/lanes.hpp"

namespace kalmanet::cpu {

// b, x, r, p, ap: lanes [Kp][t]; x receives the solution.
template <class Vec, class B, class S>
void conjugate_gradients(const Chunk<S>& c, const S* h, bool h_is_zero, const B* b, int num_iter,
                         typename Vec::Elem* x, typename Vec::Elem* r, typename Vec::Elem* p,
                         typename Vec::Elem* ap) {
  using Elem = typename Vec::Elem;
  using Reg = typename Vec::Reg;
  alignas(64) Elem lambda[kLanes], length[kLanes], back[kLanes];
  for (int64_t t = 0; t < kLanes; ++t) lambda[t] = static_cast<Elem>(c.lambda[t]);
  for (int64_t i = 0; i < c.Kp * kLanes; ++i) {
    x[i] = 0;
    // No solution where f_t counts as zero.
    r[i] = p[i] = c.lambda[i % kLanes] == 0.0 ? Elem{0} : static_cast<Elem>(b[i]);
  }
  double rr[kLanes], pap[kLanes], next[kLanes];
  lanes_dot<Vec>(r, r, c.Kp, rr);
  for (int iteration = 0; iteration < num_iter; ++iteration) {
    apply_h<Vec>(c, h, h_is_zero, p, [&](int64_t at, int lane, Reg hp) {
      Vec::store(ap + at, Vec::fma(Vec::load(lambda + lane), Vec::load(p + at), hp));
    });
    lanes_dot<Vec>(p, ap, c.Kp, pap);
    for (int64_t t = 0; t < kLanes; ++t) {
      length[t] = pap[t] == 0.0 ? Elem{0} : static_cast<Elem>(rr[t] / pap[t]);
    }
    for (int64_t i = 0; i < c.Kp; ++i) {
      for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
        const int64_t at = i * kLanes + lane;
        const Reg l = Vec::load(length + lane);
        Vec::store(x + at, Vec::fma(l, Vec::load(p + at), Vec::load(x + at)));
        Vec::store(r + at, Vec::fnma(l, Vec::load(ap + at), Vec::load(r + at)));
      }
    }
    lanes_dot<Vec>(r, r, c.Kp, next);
    for (int64_t t = 0; t < kLanes; ++t) {
      back[t] = rr[t] == 0.0 ? Elem{0} : static_cast<Elem>(next[t] / rr[t]);
      rr[t] = next[t];
    }
    for (int64_t i = 0; i < c.Kp; ++i) {
      for (int64_t lane = 0; lane < kLanes; lane += Vec::kWidth) {
        const int64_t at = i * kLanes + lane;
        Vec::store(p + at, Vec::fma(Vec::load(back + lane), Vec::load(p + at), Vec::load(r + at)));
      }
    }
  }
}

}  // namespace kalmanet::cpu
