// How many operations a chunk takes, counted in one fixed way whatever the code does: by the
// chunked form with C = 64, a product of n x m by m x p as 2 n m p, and work that is linear in C K
// (masks, decays, vector updates) as nothing. A rate made with these counts can be compared between
// implementations and with a matrix product's.
#pragma once

#include <cstdint>

namespace kalmanet::bench {

inline constexpr double kCountedChunk = 64;

struct ChunkFlops {
  double C, K, V;

  // H_t y for all tokens: y^T H_0 (2 C K^2), the products k_j . y_t (2 C^2 K) and their sum over
  // the k_j (2 C^2 K).
  double operator_product() const { return 2 * C * K * K + 4 * C * C * K; }
  double chebyshev(double num_iter) const { return num_iter * operator_product(); }

  // H_C = e^{G_C} H_0 + K^T K and U_C likewise.
  double state_updates() const { return 2 * C * K * K + 2 * C * K * V; }
  double gram() const { return 2 * C * C * K; }
  // f_t: the mask's product with Gram o Gram (2 C^3) and k_j^T H_0 k_j (2 C K^2).
  double norms() const { return 2 * C * C * C + 2 * C * K * K; }
  // U_t^T m_t (or U_t d_o_t, the same with K and V exchanged): U_0 (2 C K V), then the dot products
  // (2 C^2 K) and their sum over the v_j (2 C^2 V).
  double read_out() const { return 2 * C * K * V + 2 * C * C * (K + V); }

  double forward(double num_iter) const {
    return chebyshev(num_iter) + state_updates() + gram() + norms() + read_out();
  }

  // Given the forward's x_t and nothing else of it:
  //   both states, Gram and f_t once more
  //   dm_t = scale U_t d_o_t                                  a read-out
  //   z_t: the solve                                          chebyshev(r)
  //   E_t v_t and E_t^T k_t with their carry                  two read-outs
  //   carry E: scale M^T d_O                                  2 C K V
  //   D_t k_t and D_t^T k_t: the dot products x_i . k_t and z_i . k_t, their sums over z_i and x_i
  //                                                           two operator products (carry
  //                                                           included)
  //   their common H_t / f_t term: the mask M^T diag(w) M (2 C^3), its sum over the k_j (2 C^2 K),
  //   H_0 k_t (2 C K^2)
  //   <z_t x_t^T, H_t> for the gates: H_t x_t                 an operator product
  //   carry D: Z^T X and K^T diag(.) K                        4 C K^2
  double backward(double num_iter) const {
    return state_updates() + gram() + norms() + read_out() + chebyshev(num_iter) + 2 * read_out() +
           2 * C * K * V + 2 * operator_product() + 2 * C * C * C + 2 * C * C * K + 2 * C * K * K +
           operator_product() + 4 * C * K * K;
  }
};

inline double sequence_chunks(int64_t T, int64_t H) {
  return static_cast<double>(T) * static_cast<double>(H) / kCountedChunk;
}
inline double forward_flops(int64_t T, int64_t H, int64_t K, int64_t V, int num_iter) {
  const ChunkFlops chunk{kCountedChunk, static_cast<double>(K), static_cast<double>(V)};
  return sequence_chunks(T, H) * chunk.forward(num_iter);
}
inline double backward_flops(int64_t T, int64_t H, int64_t K, int64_t V, int num_iter) {
  const ChunkFlops chunk{kCountedChunk, static_cast<double>(K), static_cast<double>(V)};
  return sequence_chunks(T, H) * chunk.backward(num_iter);
}

}  // namespace kalmanet::bench
