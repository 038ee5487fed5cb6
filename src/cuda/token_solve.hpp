// (H + lambda I) x = q for one token: Chebyshev's iteration in float32 or float64, and a Cholesky
// factorisation in float64.
#pragma once

#include "cuda/token_kernel.hpp"

namespace kalmanet::cuda {

// What a token's system is, the same in all threads.
struct TokenSystem {
  double f, lambda, ridge;
};

// Steps for a relative error `tolerance`: chebyshev_num_iter (docs/math.md, section 4), which the
// host cannot ask about a ratio that lies in the GPU's memory.
KALMANET_KERNEL int counted_steps(double ridge, double tolerance) {
  const double root = sqrt((1.0 + ridge) / ridge);
  const double r = (root - 1.0) / (root + 1.0);
  const double steps = ceil(log(tolerance / 2) / log(r));
  return steps >= 1.0 ? (steps < (1 << 20) ? static_cast<int>(steps) : 1 << 20) : 1;
}

// The registers of one precision.
template <class Registers>
KALMANET_KERNEL float (&x_of(Registers& r, float))[2] {
  return r.x;
}
template <class Registers>
KALMANET_KERNEL double (&x_of(Registers& r, double))[2] {
  return r.x64;
}
template <class Registers>
KALMANET_KERNEL float (&previous_of(Registers& r, float))[2] {
  return r.previous;
}
template <class Registers>
KALMANET_KERNEL double (&previous_of(Registers& r, double))[2] {
  return r.previous64;
}
template <class Registers>
KALMANET_KERNEL float (&product_of(Registers& r, float))[2] {
  return r.product;
}
template <class Registers>
KALMANET_KERNEL double (&product_of(Registers& r, double))[2] {
  return r.product64;
}

template <class Group, class S, int KP>
struct TokenSolver : TokenState<Group, S, KP> {
  using Base = TokenState<Group, S, KP>;
  using Base::group;
  using typename Base::Layout;
  using typename Base::Registers;

  template <class A>
  KALMANET_KERNEL A* vector(int i) {
    if constexpr (sizeof(A) == sizeof(S)) {
      return this->shared.x[i];
    } else {
      return this->shared.x64[i];
    }
  }

  // x of the right-hand side q (in shared memory) into registers and (in S) shared.x[0].
  template <class A, class Q>
  KALMANET_KERNEL void chebyshev(const TokenSystem& system, int num_iter, const Q* q) {
    const A lambda = static_cast<A>(system.lambda), f = static_cast<A>(system.f);
    const A step = divide(A{2}, A{2} * lambda + f);
    const A rho = divide(A{0.5}, A{2} * static_cast<A>(system.ridge) + A{1});
    A w = 2;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = Layout::row(thread, i);
        const A x = step * static_cast<A>(q[row]);
        x_of(r, A())[i] = x;
        previous_of(r, A())[i] = 0;
      }
      Base::put_rows(thread, x_of(r, A())[0], x_of(r, A())[1], vector<A>(0));
    });
    group.barrier();
    for (int k = 0; k < num_iter; ++k) {
      w = divide(A{1}, A{1} - rho * rho * w);
      const A gain = step * w, momentum = w - A{1};
      A* const next = vector<A>(1 - k % 2);
      this->template multiply<A>(vector<A>(k % 2),
                                 [](Registers& r) -> A(&)[2] { return product_of(r, A()); });
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int row = Layout::row(thread, i);
          const A x = x_of(r, A())[i];
          const A residual = lambda * x + product_of(r, A())[i] - static_cast<A>(q[row]);
          const A moved = momentum * (x - previous_of(r, A())[i]) + x - gain * residual;
          previous_of(r, A())[i] = x;
          x_of(r, A())[i] = moved;
        }
        Base::put_rows(thread, x_of(r, A())[0], x_of(r, A())[1], next);
      });
      group.barrier();
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const S x = static_cast<S>(x_of(r, A())[i]);
        if constexpr (sizeof(A) != sizeof(S)) r.x[i] = x;
      }
      Base::put_rows(thread, x_of(r, A())[0], x_of(r, A())[1], this->shared.x[0]);
    });
    group.barrier();
  }

  KALMANET_KERNEL double* second_row() {
    return this->factor + static_cast<int64_t>(KP) * (KP + 1) / 2 + KP;
  }

  // The same by A = L D L^T in float64, column by column: one barrier each, because columns stay
  // unscaled (c_ij = l_ij d_j). q rides along as one more row, which makes of it D^{-1}-weighted
  // forward substitution for nothing; and so does `other` (if not null) as a second one, whose
  // solution stays in the second row.
  KALMANET_KERNEL void direct(const TokenSystem& system, int K, const double* other = nullptr) {
    double* const c = this->factor;
    const auto at = [](int i, int j) { return static_cast<int64_t>(i) * (i + 1) / 2 + j; };
    double* const y = second_row() - KP;
    const int last = other != nullptr ? K + 1 : K;
    this->for_each([&](Registers& r, int thread, int e, int row, int column) {
      if (column <= row && row < K) {
        c[at(row, column)] =
            static_cast<double>(this->get(r, thread, e)) + (row == column ? system.lambda : 0.0);
      }
    });
    group.each([&](int thread, Registers&) {
      if (thread < K) y[thread] = this->shared.q[thread];
      if (thread < K && other != nullptr) y[KP + thread] = other[thread];
    });
    group.barrier();
    for (int j = 0; j < K; ++j) {
      const double inverse = 1.0 / c[at(j, j)];
      group.each([&](int thread, Registers&) {
        // Rows j+1..K (from K on: right-hand sides), 8 threads a row.
        for (int i = j + 1 + thread / 8; i <= last; i += Layout::kThreads / 8) {
          double* const row = i >= K ? y + (i - K) * KP : c + at(i, 0);
          const double l = row[j] * inverse;
          const int end = i >= K ? K - 1 : i;
          for (int k = j + 1 + thread % 8; k <= end; k += 8) row[k] -= l * c[at(k, j)];
        }
      });
      group.barrier();
    }
    for (int j = K - 1; j >= 0; --j) {
      const double x = y[j] / c[at(j, j)];
      const double x2 = other != nullptr ? y[KP + j] / c[at(j, j)] : 0.0;
      group.each([&](int thread, Registers&) {
        if (thread >= j) return;
        y[thread] -= c[at(j, thread)] * x;
        if (other != nullptr) y[KP + thread] -= c[at(j, thread)] * x2;
      });
      group.barrier();
    }
    if (other != nullptr) {
      group.each([&](int thread, Registers&) {
        if (thread < K) y[KP + thread] /= c[at(thread, thread)];
      });
    }
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = Layout::row(thread, i);
        r.x64[i] = row < K ? y[row] / c[at(row, row)] : 0.0;
        r.x[i] = static_cast<S>(r.x64[i]);
      }
      Base::put_rows(thread, r.x64[0], r.x64[1], this->shared.x[0]);
    });
    group.barrier();
  }

  // |(H + lambda) x - q|^2 and |q|^2 of the x in shared.x[0], in float64.
  KALMANET_KERNEL void residual(const TokenSystem& system, double* r2, double* q2) {
    group.each([&](int thread, Registers&) {
      if (thread < KP) this->shared.x64[0][thread] = this->shared.x[0][thread];
    });
    group.barrier();
    this->template multiply<double>(this->shared.x64[0],
                                    [](Registers& r) -> double (&)[2] { return r.product64; });
    group.each([&](int thread, Registers& r) {
      r.sum = r.sum2 = 0.0;
      if (thread % 4 != 0) return;
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = Layout::row(thread, i);
        const double q = this->shared.q[row];
        const double e = r.product64[i] + system.lambda * this->shared.x64[0][row] - q;
        r.sum += e * e;
        r.sum2 += q * q;
      }
    });
    this->sum_block(r2, q2);
  }
};

}  // namespace kalmanet::cuda
