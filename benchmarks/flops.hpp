// How many operations a chunk takes, counted in one fixed way whatever the code does: by the
// chunked form with C = 64, a product of n x m by m x p as 2 n m p, and work that is linear in C K
// (masks, decays, vector updates) as nothing. A rate made with these counts can be compared between
// implementations and with a matrix product's.
#pragma once

#include <cstdint>

namespace kalmanet::bench {

inline constexpr double kCountedChunk = 64;
inline constexpr double kCountedInnerSteps = 4;

struct ChunkFlops {
  double C, K, V;

  // H_t y for all tokens: y^T H_0 (2 C K^2), the products k_j . y_t (2 C^2 K) and their sum over
  // the k_j (2 C^2 K).
  double operator_product() const { return 2 * C * K * K + 4 * C * C * K; }
  // A step of conjugate gradients costs the same product.
  double chebyshev(double num_iter) const { return num_iter * operator_product(); }

  // The direct solver with P = (H_0 + mu I)^{-1} and Y = P Kt^T formed once a chunk:
  //   P (K^3: a Cholesky factor K^3 / 3, its inverse 2 K^3 / 3), Y (2 C K^2), Kt Y (2 C^2 K), the
  //   C x C factor and its inverse (2 C^3 / 3)
  //   M_t^{-1} b = P b - Y R^{-T} mask R^{-1} mask Y^T b for all tokens, once and once more for
  //   each inner step: P b (2 C K^2), Y^T b and the sum over Y (4 C^2 K), two products by triangles
  //   (2 C^3)
  // The inner steps that an answer needs depend on memory, ridge and how chunks are cut; four are
  // counted everywhere, what memories of 256 tokens and more need at C = 64.
  double direct(double inner_steps) const {
    return K * K * K + 2 * C * K * K + 2 * C * C * K + 2 * C * C * C / 3 +
           (1 + inner_steps) * (2 * C * K * K + 4 * C * C * K + 2 * C * C * C);
  }

  // H_C = e^{G_C} H_0 + K^T K and U_C likewise.
  double state_updates() const { return 2 * C * K * K + 2 * C * K * V; }
  double gram() const { return 2 * C * C * K; }
  // f_t: the mask's product with Gram o Gram (2 C^3) and k_j^T H_0 k_j (2 C K^2).
  double norms() const { return 2 * C * C * C + 2 * C * K * K; }
  // U_t^T m_t (or U_t d_o_t, the same with K and V exchanged): U_0 (2 C K V), then the dot products
  // (2 C^2 K) and their sum over the v_j (2 C^2 V).
  double read_out() const { return 2 * C * K * V + 2 * C * C * (K + V); }

  // `solve`: the operations of the solver, one of the above.
  double forward(double solve) const {
    return solve + state_updates() + gram() + norms() + read_out();
  }

  // Given the forward's x_t and nothing else of it:
  //   both states, Gram and f_t once more
  //   dm_t = scale U_t d_o_t                                  a read-out
  //   z_t: the solve                                          `solve`
  //   E_t v_t and E_t^T k_t with their carry                  two read-outs
  //   carry E: scale M^T d_O                                  2 C K V
  //   D_t k_t and D_t^T k_t: the dot products x_i . k_t and z_i . k_t, their sums over z_i and x_i
  //                                                           two operator products (carry
  //                                                           included)
  //   their common H_t / f_t term: the mask M^T diag(w) M (2 C^3), its sum over the k_j (2 C^2 K),
  //   H_0 k_t (2 C K^2)
  //   <z_t x_t^T, H_t> for the gates: H_t x_t                 an operator product
  //   carry D: Z^T X and K^T diag(.) K                        4 C K^2
  double backward(double solve) const {
    return state_updates() + gram() + norms() + read_out() + solve + 2 * read_out() +
           2 * C * K * V + 2 * operator_product() + 2 * C * C * C + 2 * C * C * K + 2 * C * K * K +
           operator_product() + 4 * C * K * K;
  }
};

}  // namespace kalmanet::bench
