// The Kalman filter that the layer generalises: recursive ridge regression with a constant ridge
// and no forgetting.
#pragma once

#include <cstdint>
#include <vector>

namespace kalmanet::reference {

// S_t = argmin_S lambda |S|_F^2 + sum_{i<=t} |S k_i - v_i|^2, by the recursion (S [V, K] the mean,
// P [K, K] the covariance):
//   P_0 = I / lambda, S_0 = 0
//   gain_t = P_{t-1} k_t / (1 + k_t^T P_{t-1} k_t)
//   S_t = S_{t-1} + (v_t - S_{t-1} k_t) gain_t^T
//   P_t = P_{t-1} - gain_t (P_{t-1} k_t)^T
// Returns o_t = S_t q_t, [T, V], for q, k [T, K] and v [T, V]. Equal to the layer with g = gk = 0,
// alpha = 1, scale = 1 and a_t = lambda / f_t.
std::vector<double> kalman_filter(const std::vector<double>& q, const std::vector<double>& k,
                                  const std::vector<double>& v, double lambda, int64_t T, int64_t K,
                                  int64_t V);

}  // namespace kalmanet::reference
