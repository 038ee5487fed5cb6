// The Kalman-filter recursion.
#include "reference/kalman_filter.hpp"

namespace kalmanet::reference {

std::vector<double> kalman_filter(const std::vector<double>& q, const std::vector<double>& k,
                                  const std::vector<double>& v, double lambda, int64_t T, int64_t K,
                                  int64_t V) {
  std::vector<double> P(K * K, 0.0), S(V * K, 0.0), Pk(K), o(T * V, 0.0);
  for (int64_t i = 0; i < K; ++i) P[i * K + i] = 1 / lambda;
  for (int64_t t = 0; t < T; ++t) {
    const double *kt = &k[t * K], *vt = &v[t * V], *qt = &q[t * K];
    double kPk = 0;
    for (int64_t i = 0; i < K; ++i) {
      Pk[i] = 0;
      for (int64_t j = 0; j < K; ++j) Pk[i] += P[i * K + j] * kt[j];
      kPk += kt[i] * Pk[i];
    }
    for (int64_t r = 0; r < V; ++r) {
      double innovation = vt[r];
      for (int64_t i = 0; i < K; ++i) innovation -= S[r * K + i] * kt[i];
      for (int64_t i = 0; i < K; ++i) S[r * K + i] += innovation * Pk[i] / (1 + kPk);
      for (int64_t i = 0; i < K; ++i) o[t * V + r] += S[r * K + i] * qt[i];
    }
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < K; ++j) P[i * K + j] -= Pk[i] * Pk[j] / (1 + kPk);
    }
  }
  return o;
}

}  // namespace kalmanet::reference
