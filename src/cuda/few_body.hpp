// The body of the kernel of a few tokens at once (few_kernel.hpp has the formulas).
#pragma once

#include "cuda/few_solve.hpp"

namespace kalmanet::cuda {

template <class Group>
struct FewBody : FewSolve<Group> {
  using Base = FewSolve<Group>;
  using Base::group, Base::shared, Base::job, Base::sequence, Base::head, Base::n, Base::scale;
  using L = FewLayout;
  using Registers = FewRegisters;
  float *h_to = nullptr, *u_to = nullptr;

  // ---- tokens

  // Four numbers of 16 bits, dense and aligned.
  KALMANET_KERNEL static void load_four(const Array& a, int64_t at, uint32_t (&bits)[2]) {
    memcpy(bits, __builtin_assume_aligned(static_cast<const uint16_t*>(a.data) + at, 8), 8);
  }
  KALMANET_KERNEL void unpack_four(const uint32_t (&bits)[2], float (&x)[4]) const {
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = from_bits(job.k.dtype, bits[i / 2] >> i % 2 * 16 & 0xffff);
  }

  // Tokens t0 .. t0 + n of the call, or of the last draft, on their way: warps 0 to 3 bring q and v
  // of a token each, 4 to 7 its k. (Of tokens that are not there: zeros.)
  template <bool kDraft>
  KALMANET_KERNEL void fetch(int64_t t0) {
    const Array& k = kDraft ? job.draft_k : job.k;
    const Array& v = kDraft ? job.draft_v : job.v;
    const int64_t k_head = grouped(head, job.k_group), v_head = grouped(head, job.v_group);
    const int64_t q_head = grouped(head, job.q_group);
    group.each([&](int thread, Registers& r) {
      const int t = thread / 32 % 4, c = thread % 32 * 4;
      r.first[0] = r.first[1] = r.second[0] = r.second[1] = r.scalar = 0;
      if (t < n) {
        if (thread >= 128) {
          load_four(k, offset_of(k, sequence, t0 + t, k_head) + c, r.first);
        } else {
          load_four(v, offset_of(v, sequence, t0 + t, v_head) + c, r.second);
          if (!kDraft) load_four(job.q, offset_of(job.q, sequence, t0 + t, q_head) + c, r.first);
        }
      }
      if (thread < 4 * kStepScalars && thread % 4 < n) {
        const Array& a = job.scalars[kDraft ? 1 : 0][thread / 4];
        if (a.data != nullptr) {
          r.scalar = load_bits(a, offset_of(a, sequence, t0 + thread % 4, head));
        }
      }
    });
  }
  // Into shared memory. Ends with a barrier.
  template <bool kDraft>
  KALMANET_KERNEL void take() {
    group.each([&](int thread, Registers& r) {
      const int t = thread / 32 % 4, c = thread % 32 * 4;
      float x[4];
      unpack_four(r.first, x);
      store4((thread >= 128 ? shared.k : shared.q)[t] + c, x);
      r.sum = (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
      if (thread >= 4 * kStepScalars) return;
      const Array& a = job.scalars[kDraft ? 1 : 0][thread / 4];
      const int which = thread / 4;
      float scalar = a.data == nullptr ? absent_scalar(job, which) : from_bits(a.dtype, r.scalar);
      if (which <= kStepUDecay) scalar = exp_of(scalar);
      if (which == kStepBeta) scalar *= scalar;
      if (which == kStepRidge) {
        shared.steps[thread % 4] = thread % 4 >= n ? 0
                                   : job.num_iter != 0
                                       ? job.num_iter
                                       : counted_steps(static_cast<double>(scalar), job.tolerance);
        // A ratio that is not positive has no answer, and must not look as if it had one.
        if (!(scalar > 0.0f)) scalar = NAN;
      }
      shared.scalar[which][thread % 4] = scalar;
    });
    group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
    group.each([&](int thread, Registers& r) {
      if (thread % 32 != 0) return;
      (thread < 128 ? shared.query_norm : shared.key_norm)[thread / 32 % 4] = sqrtf(r.sum);
    });
    group.barrier();
    group.each([&](int thread, Registers& r) {
      const int t = thread / 32 % 4, c = thread % 32 * 4;
      if (thread >= 128) return;
      float v[4];
      unpack_four(r.second, v);
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) v[i] *= shared.scalar[kStepBeta][t];
      store4(shared.v[t] + c, v);
    });
    this->split_keys();
    group.barrier();
  }

  // ---- H in float32

  KALMANET_KERNEL void load_h(const float* from) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (from != nullptr) {
            load4(from + (L::row(thread) + i) * L::kDim + L::column(thread, tile), r.raw[tile][i]);
          } else {
            r.raw[tile][i][0] = r.raw[tile][i][1] = r.raw[tile][i][2] = r.raw[tile][i][3] = 0;
          }
        }
      }
    });
  }
  KALMANET_KERNEL void store_h() {
    if (h_to == nullptr) return;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < L::kTiles; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 2; ++i) {
          store4(h_to + (L::row(thread) + i) * L::kDim + L::column(thread, tile), r.raw[tile][i]);
        }
      }
    });
  }
  // Past the tokens at work.
  KALMANET_KERNEL void advance_h() {
    KALMANET_LOOP
    for (int t = 0; t < n; ++t) {
      group.each([&](int thread, Registers& r) {
        const float decay = shared.scalar[kStepDecay][t], beta2 = shared.scalar[kStepBeta][t];
        const float row[2] = {beta2 * shared.k[t][L::row(thread)],
                              beta2 * shared.k[t][L::row(thread) + 1]};
        KALMANET_UNROLL
        for (int tile = 0; tile < L::kTiles; ++tile) {
          float k[4];
          load4(shared.k[t] + L::column(thread, tile), k);
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              r.raw[tile][i][j] = decay * r.raw[tile][i][j] + row[i] * k[j];
            }
          }
        }
      });
    }
  }

  // ---- U in shared memory; a thread works on what it copied

  KALMANET_KERNEL void start_u(const float* from) {
    group.each([&](int thread, Registers&) {
      const int at = StepLayout::u_begin(thread);
      KALMANET_LOOP
      for (int i = 0; i < StepLayout::kUSteps; ++i) {
        float* const to = shared.u + at + i * L::kDim;
        if (from != nullptr) {
          copy16(to, from + at + i * L::kDim);
        } else {
          store4(to, {0, 0, 0, 0});
        }
      }
    });
  }
  KALMANET_KERNEL void store_u() {
    if (u_to == nullptr) return;
    wait_copies();
    group.each([&](int thread, Registers&) {
      const int at = StepLayout::u_begin(thread);
      KALMANET_LOOP
      for (int i = 0; i < StepLayout::kUSteps; ++i) {
        float u[4];
        load4(shared.u + at + i * L::kDim, u);
        store4(u_to + at + i * L::kDim, u);
      }
    });
  }
  // U past the tokens at work; kOutputs: and o = scale U_t^T m_t, stored, |U_t|^2 and |o_t|^2.
  template <bool kOutputs>
  KALMANET_KERNEL void advance_u(int64_t t0) {
    wait_copies();
    group.each([&](int thread, Registers& r) {
      const int column = thread % 32 * 4;
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) {
        r.sums[t] = 0;
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) r.o[t][j] = 0;
      }
      KALMANET_LOOP
      for (int i0 = 0; i0 < StepLayout::kUSteps; i0 += 4) {
        const int row = thread / 32 * StepLayout::kUSteps + i0;
        float u[4][4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) load4(shared.u + (row + i) * L::kDim + column, u[i]);
        KALMANET_UNROLL
        for (int t = 0; t < L::kTokens; ++t) {
          if (t >= n) break;
          float m[4] = {}, k[4], v[4];
          if constexpr (kOutputs) load4(shared.m[t] + row, m);
          load4(shared.k[t] + row, k);
          load4(shared.v[t] + column, v);
          const float decay = shared.scalar[kStepUDecay][t];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              u[i][j] = decay * u[i][j] + k[i] * v[j];
              if constexpr (kOutputs) {
                r.o[t][j] += m[i] * u[i][j];
                r.sums[t] += u[i][j] * u[i][j];
              }
            }
          }
        }
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) store4(shared.u + (row + i) * L::kDim + column, u[i]);
      }
      if constexpr (kOutputs) {
        KALMANET_UNROLL
        for (int t = 0; t < L::kTokens; ++t) {
          store4(shared.partial[thread / 32][t] + column, r.o[t]);
        }
      }
    });
    if constexpr (kOutputs) store_outputs(t0);
  }

  // Of the parts that advance_u left. Ends with a barrier.
  KALMANET_KERNEL void store_outputs(int64_t t0) {
    this->put_squares(2);
    group.barrier();
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) r.sums[t] = 0;
      KALMANET_UNROLL
      for (int half = 0; half < 2; ++half) {  // tokens 0 and 1, or 2 and 3
        const int t = 2 * half + thread / L::kDim, c = thread % L::kDim;
        if (t >= n) continue;
        float o = 0;
        KALMANET_UNROLL
        for (int w = 0; w < 8; ++w) o += shared.partial[w][t][c];
        o *= static_cast<float>(job.scale);
        store_element(job.o, offset_of(job.o, sequence, t0 + t, head) + c * job.o.stride[3], o);
        const float square = o * o;
        r.sums[2 * half] = thread < L::kDim ? square : 0.0f;
        r.sums[2 * half + 1] = thread < L::kDim ? 0.0f : square;
      }
    });
    this->put_squares(3);
    group.barrier();
  }

  // Whether a token's amplification is more than this arithmetic bears.
  KALMANET_KERNEL bool amplified() const {
    const double limit = largest_amplification(job.o.dtype) / 4;
    bool ill = false;
    KALMANET_LOOP
    for (int t = 0; t < n; ++t) {
      const double weight = static_cast<double>(shared.scalar[kStepAlpha][t]) * job.scale;
      const double scaled = weight * weight * static_cast<double>(this->total(1, t)) *
                            static_cast<double>(this->total(2, t));
      const double o2 = static_cast<double>(this->total(3, t));
      if (o2 > 0.0 && scaled > limit * limit * L::kDim * o2) ill = true;
    }
    return ill;
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
    h_to = dense_state(job.h_final, row, head);
    u_to = dense_state(job.u_final, row, head);
    const int64_t accepted = accepted_of(job, sequence);
    load_h(h_from);
    KALMANET_LOOP
    for (int64_t t0 = 0; t0 < accepted; t0 += n) {
      n = static_cast<int>(accepted - t0 < L::kTokens ? accepted - t0 : L::kTokens);
      fetch<true>(t0);
      if (t0 == 0) start_u(u_from);
      group.barrier();  // (the tokens before are done with)
      take<true>();
      advance_u<false>(0);
      advance_h();
    }
    int64_t t0 = 0;
    KALMANET_LOOP
    do {
      n = static_cast<int>(!kLong || job.T - t0 < L::kTokens ? job.T - t0 : L::kTokens);
      fetch<false>(t0);
      if (t0 == 0) {
        if (accepted == 0) start_u(u_from);
        if (job.is_draft) {  // what the states become is known before the new tokens
          if (accepted > 0 || h_from != h_to) store_h();
          if (accepted > 0 || u_from != u_to) store_u();
        }
      }
      group.barrier();
      take<false>();
      this->split_h();
      this->norms();
      this->solve();
      advance_u<true>(t0);
      if (amplified()) return true;
      t0 += n;
      if (t0 == job.T && job.is_draft) return false;
      if constexpr (kLong) {
        this->unsplit_h();
      } else {
        load_h(h_from);
      }
      advance_h();
    } while (kLong && t0 < job.T);
    store_h();
    store_u();
    return false;
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
  FewBody<Group> body{{group, shared, job, sequence, head}};
  return body.template run<kLong>(row);
}

}  // namespace kalmanet::cuda
