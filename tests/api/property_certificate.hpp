// The residual of given solutions, computed anew: token by token in float64 from the inputs alone,
// by the definition (docs/math.md, section 1). It shares no code with kernels or oracles.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "support/problem.hpp"

namespace kalmanet::testing {

// |(H_t + lambda_t I) x_t - q_t| / |q_t| of every token and head of c.x, [B,T,H]; 0 where f_t or
// q_t is.
inline std::vector<double> recomputed_residuals(const Case<double>& c, double ridge_ratio) {
  const CaseSpec& s = c.spec;
  const int64_t K = s.K, H = s.H, T = s.T;
  const auto read = [](const Tensor<double>& tensor) { return tensor.values(); };
  const std::vector<double> q = read(c.q), k = read(c.k), gk = read(s.same_gate ? c.g : c.gk),
                            beta = read(c.beta), ridge = read(c.ridge_ratio), h0 = read(c.h0),
                            x = read(c.x);
  std::vector<double> residuals(static_cast<size_t>(s.B * T * H));
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  for (int64_t n = 0; n < s.num_sequences(); ++n) {
    const bool packed = !c.cu_seqlens.empty();
    const int64_t row = packed ? 0 : n;
    const int64_t begin = packed ? c.cu_seqlens[at(n)] : 0;
    const int64_t end = packed ? c.cu_seqlens[at(n + 1)] : T;
    for (int64_t head = 0; head < H; ++head) {
      std::vector<double> state(at(K * K));
      if (!h0.empty()) {
        for (int64_t i = 0; i < K * K; ++i) state[at(i)] = h0[at((n * H + head) * K * K + i)];
      }
      for (int64_t t = begin; t < end; ++t) {
        const int64_t token = row * T + t, one = token * H + head;
        const auto vector = [&](const std::vector<double>& all, int64_t heads) {
          return &all[at((token * heads + head / (H / heads)) * K)];
        };
        const double* key = vector(k, s.num_k_heads());
        const double* query = vector(q, s.num_q_heads());
        const double* solution = &x[at(one * K)];
        const double decay = gk.empty() ? 1.0 : std::exp(gk[at(one)]);
        const double b = beta.empty() ? 1.0 : beta[at(one)];
        double f2 = 0;
        for (int64_t i = 0; i < K; ++i) {
          for (int64_t j = 0; j < K; ++j) {
            double& e = state[at(i * K + j)];
            e = decay * e + b * key[i] * b * key[j];
            f2 += e * e;
          }
        }
        const double lambda = (ridge.empty() ? ridge_ratio : ridge[at(one)]) * std::sqrt(f2);
        double r2 = 0, q2 = 0;
        for (int64_t i = 0; i < K; ++i) {
          double r = lambda * solution[i] - query[i];
          for (int64_t j = 0; j < K; ++j) r += state[at(i * K + j)] * solution[j];
          r2 += r * r;
          q2 += query[i] * query[i];
        }
        const bool nothing = std::sqrt(f2) <= kVanishedNorm || q2 == 0;
        residuals[at(one)] = nothing ? 0 : std::sqrt(r2 / q2);
      }
    }
  }
  return residuals;
}

}  // namespace kalmanet::testing
