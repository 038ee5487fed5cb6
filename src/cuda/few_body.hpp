// The body of the kernel of a few tokens at once (few_kernel.hpp has the formulas).
#pragma once

#include "cuda/few_states.hpp"

namespace kalmanet::cuda {

template <class Group>
struct FewBody : FewStates<Group> {
  using Base = FewStates<Group>;
  using Base::group, Base::shared, Base::job, Base::sequence, Base::head, Base::n, Base::h_to,
      Base::u_to, Base::total, Base::weights, Base::at, Base::square, Base::load_h, Base::store_h,
      Base::advance_h, Base::start_u, Base::store_u;
  using L = FewLayout;
  using Registers = FewRegisters;

  // ---- outputs

  // U_0^T m_t by sixteens of rows into shared.partial, |U_0|^2 by warps; in warp t the dots of m_t
  // with the keys into registers.sums.
  KALMANET_KERNEL void read_u() {
    wait_copies();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) {
        KALMANET_UNROLL
        for (int j = 0; j < 8; ++j) r.o[t][j] = 0;
      }
      float squares[4] = {};
      KALMANET_LOOP
      for (int i0 = 0; i0 < L::kRows; i0 += 4) {
        float u[4][2][4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          KALMANET_UNROLL
          for (int half = 0; half < 2; ++half)
            load4(shared.u + at(thread, i0 + i, half), u[i][half]);
        }
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          float m[4];
          load4(shared.m_rows[L::state_row(thread) + i0 + i], m);
          KALMANET_UNROLL
          for (int half = 0; half < 2; ++half) {
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              const float e = u[i][half][j];
              squares[j] += e * e;
              KALMANET_UNROLL
              for (int t = 0; t < L::kTokens; ++t) r.o[t][half * 4 + j] += m[t] * e;
            }
          }
        }
      }
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) {
        KALMANET_UNROLL
        for (int half = 0; half < 2; ++half) {
          store4(
              shared.partial[thread / 16][t] + L::half_column(thread, half),
              {r.o[t][half * 4], r.o[t][half * 4 + 1], r.o[t][half * 4 + 2], r.o[t][half * 4 + 3]});
        }
      }
      r.sum = (squares[0] + squares[1]) + (squares[2] + squares[3]);
      float m[4];
      load4(shared.m[thread / 32] + thread % 32 * 4, m);
      KALMANET_UNROLL
      for (int j = 0; j < L::kTokens; ++j) {
        float k[4];
        load4(shared.k[j] + thread % 32 * 4, k);
        r.sums[j] = (m[0] * k[0] + m[1] * k[1]) + (m[2] * k[2] + m[3] * k[3]);
      }
    });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    KALMANET_UNROLL
    for (int j = 0; j < L::kTokens; ++j) {
      group.template sum_lanes<32>([j](Registers& r) -> float& { return r.sums[j]; });
    }
    group.each([&](int thread, Registers& r) {
      if (thread % 32 == 0) shared.squares[2][0][thread / 32] = r.sum;
    });
  }
  // o of token t by warp t, stored, and whether its amplification is more than this arithmetic
  // bears. For |U_t| stands a bound: the norm of U_0 and of each outer product.
  KALMANET_KERNEL void put_outputs(int64_t t0) {
    group.barrier();
    group.each([&](int thread, Registers& r) {
      const int t = thread / 32, c = thread % 32 * 4;
      float weight[L::kTokens], o[4] = {};
      const float start = weights(kStepUDecay, t, weight);
      KALMANET_UNROLL
      for (int g = 0; g < L::kThreads / 16; ++g) {
        float part[4];
        load4(shared.partial[g][t] + c, part);
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) o[e] += part[e];
      }
      KALMANET_UNROLL
      for (int e = 0; e < 4; ++e) o[e] *= start;
      KALMANET_UNROLL
      for (int j = 0; j < L::kTokens; ++j) {
        float v[4];
        load4(shared.v[j] + c, v);
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) o[e] += weight[j] * r.sums[j] * v[e];
      }
      const int64_t begin = offset_of(job.o, sequence, t0 + t, head);
      KALMANET_UNROLL
      for (int e = 0; e < 4; ++e) {
        o[e] *= static_cast<float>(job.scale);
        if (t < n) store_element(job.o, begin + (c + e) * job.o.stride[3], o[e]);
      }
      r.sum = square(o);
    });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 != 0) return;
      const int t = thread / 32;
      float weight[L::kTokens];
      float norm = weights(kStepUDecay, t, weight) * sqrtf(total(2, 0));
      KALMANET_UNROLL
      for (int j = 0; j < L::kTokens; ++j) {
        norm += weight[j] * shared.key_norm[j] * shared.value_norm[j];
      }
      const double limit = largest_amplification(job.o.dtype) / 4;
      const double scaled =
          static_cast<double>(shared.scalar[kStepAlpha][t]) * job.scale * static_cast<double>(norm);
      const double o2 = static_cast<double>(r.sum);
      shared.ill[t] =
          t < n && o2 > 0.0 &&
          scaled * scaled * static_cast<double>(total(1, t)) > limit * limit * L::kDim * o2;
    });
    group.barrier();
  }
  KALMANET_KERNEL bool amplified() const {
    return (shared.ill[0] | shared.ill[1] | shared.ill[2] | shared.ill[3]) != 0;
  }

  KALMANET_KERNEL void find_results(int64_t row) {
    h_to = dense_state(job.h_final, row, head);
    u_to = dense_state(job.u_final, row, head);
  }

  // Returns whether the step kernel must do it instead. Written are then outputs, and of a draft
  // the states before its tokens.
  //
  // kLong: more tokens than fit at once, or accepted ones before tokens that are none: H is then
  // made again of its two parts. Else it need not wait in registers for what comes after the solve,
  // but is read once more.
  template <bool kLong>
  KALMANET_KERNEL bool run(int64_t row) {
    const float* const h_from = dense_state(job.h0, row, head);
    const float* const u_from = dense_state(job.u0, row, head);
    find_results(row);
    group.each([&](int thread, Registers&) {
      if (thread == 0) shared.row = row;
    });
    const int64_t accepted = accepted_of(job, sequence);
    KALMANET_LOOP
    for (int64_t t0 = 0; t0 < accepted; t0 += n) {
      n = static_cast<int>(accepted - t0 < L::kTokens ? accepted - t0 : L::kTokens);
      this->template fetch<true>(t0);
      if (t0 == 0) {
        load_h(h_from);
        start_u(u_from);
      }
      group.barrier();  // (the tokens before are done with)
      this->template take<true>();
      this->template advance<false>(kStepUDecay, shared.v, shared.u, nullptr);
      advance_h();
    }
    int64_t t0 = 0;
    KALMANET_LOOP
    do {
      new_part<kLong>();
      n = static_cast<int>(!kLong || job.T - t0 < L::kTokens ? job.T - t0 : L::kTokens);
      this->template fetch<false>(t0);
      if (t0 == 0) {
        if (accepted == 0) {
          load_h(h_from);
          start_u(u_from);
        }
        if (job.is_draft) {  // what the states become is known before the new tokens
          if (accepted > 0 || h_from != h_to) store_h();
          if (accepted > 0 || u_from != u_to) store_u();
        }
      }
      group.barrier();
      new_part<kLong>();
      this->template take<false>();
      this->split_h();
      new_part<kLong>();
      this->norms();
      new_part<kLong>();
      this->solve();
      new_part<kLong>();
      read_u();
      put_outputs(t0);
      if (amplified()) return true;
      t0 += n;
      if (t0 == job.T && job.is_draft) return false;
      if constexpr (kLong) {
        this->template advance<false>(kStepUDecay, shared.v, shared.u, nullptr);
        this->unsplit_h();
        advance_h();
      } else {
        find_results(shared.row);
        this->template advance<true>(kStepUDecay, shared.v, u_to,
                                     dense_state(job.h0, shared.row, head));
        if (h_to != nullptr) this->template advance<false>(kStepDecay, shared.k, h_to, nullptr);
      }
    } while (kLong && t0 < job.T);
    if constexpr (kLong) {
      find_results(shared.row);
      store_h();
      store_u();
    }
    return false;
  }
  // (Where the parts are in a loop, which the compiler would take all their addresses out of.)
  template <bool kLong>
  KALMANET_KERNEL void new_part() {
    if (kLong) group.new_part();
  }
};

// Whether a job needs FewBody::run<true>.
inline bool is_long(const GkaJob& job) {
  return job.T > FewLayout::kTokens || (!job.is_draft && job.accepted != nullptr);
}

// The work of block (sequence, head); returns whether it is left to run_step, with `resumed`.
template <bool kLong, class Group>
KALMANET_KERNEL bool run_few(Group& group, FewShared& shared, const GkaJob& job, int64_t sequence,
                             int64_t head) {
  const int64_t row = state_row(job, sequence);
  if (!has_states(job, row)) {
    answer_nothing(group, job, {sequence, 0, job.T, 0, 1, 1, 0}, head, row);
    return false;
  }
  FewBody<Group> body{{{group, shared, job, sequence, head}}};
  return body.template run<kLong>(row);
}

}  // namespace kalmanet::cuda
