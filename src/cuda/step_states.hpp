// What a block of the step kernel reads and writes: states and tokens.
#pragma once

#include "cuda/step_kernel.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

template <class Group>
struct StepStates : StepProducts<Group> {
  using Base = StepProducts<Group>;
  using Base::group, Base::shared;
  using L = StepLayout;
  using Registers = StepRegisters;

  struct Scalars {
    float decay, u_decay, alpha, beta2, ridge;
  };

  const GkaJob& job;
  int64_t sequence, head;
  float *h_to = nullptr, *u_to = nullptr;
  Scalars now = {};

  // ---- states

  KALMANET_KERNEL void start_u(const float* from) {
    group.each([&](int thread, Registers&) {
      const int at = L::u_begin(thread);
      KALMANET_LOOP
      for (int i = 0; i < L::kUSteps; ++i) {
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
      const int at = L::u_begin(thread);
      KALMANET_LOOP
      for (int i = 0; i < L::kUSteps; ++i) {
        float u[4];
        load4(shared.u + at + i * L::kDim, u);
        store4(u_to + at + i * L::kDim, u);
      }
    });
  }
  KALMANET_KERNEL void load_h(const float* from) {
    group.each([&](int thread, Registers& r) {
      const int at = L::row(thread) * L::kDim;
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        KALMANET_UNROLL
        for (int i = 0; i < L::kRows; ++i) {
          if (from != nullptr) {
            load4(from + at + L::column(thread, p) + i * L::kDim, r.h[p][i]);
          } else {
            r.h[p][i][0] = r.h[p][i][1] = r.h[p][i][2] = r.h[p][i][3] = 0;
          }
        }
      }
    });
  }
  KALMANET_KERNEL void store_h() {
    if (h_to == nullptr) return;
    group.each([&](int thread, Registers& r) {
      const int at = L::row(thread) * L::kDim;
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        KALMANET_UNROLL
        for (int i = 0; i < L::kRows; ++i) {
          store4(h_to + at + L::column(thread, p) + i * L::kDim, r.h[p][i]);
        }
      }
    });
  }

  // ---- tokens

  // Token t of the call, or of the last draft, on its way.
  template <bool kDraft>
  KALMANET_KERNEL void fetch(int64_t t) {
    const Array& k = kDraft ? job.draft_k : job.k;
    const Array& v = kDraft ? job.draft_v : job.v;
    const int64_t k_at = offset_of(k, sequence, t, grouped(head, job.k_group));
    const int64_t v_at = offset_of(v, sequence, t, grouped(head, job.v_group));
    const int64_t q_at = kDraft ? 0 : offset_of(job.q, sequence, t, grouped(head, job.q_group));
    group.each([&](int thread, Registers& r) {
      const int i = thread % L::kDim;
      r.second = 0;
      if (thread < L::kDim) {
        r.first = load_bits(k, k_at + i * k.stride[3]);
        if (!kDraft) r.second = load_bits(job.q, q_at + i * job.q.stride[3]);
      } else {
        r.first = load_bits(v, v_at + i * v.stride[3]);
      }
      const int which = thread - L::kDim;
      if (which >= 0 && which < kStepScalars) {
        const Array& a = job.scalars[kDraft ? 1 : 0][which];
        r.scalar = a.data == nullptr ? 0u : load_bits(a, offset_of(a, sequence, t, head));
      }
    });
  }
  // Into shared memory.
  template <bool kDraft>
  KALMANET_KERNEL void put_token() {
    group.each([&](int thread, Registers& r) {
      const float first = from_bits(job.k.dtype, r.first);  // (k, q and v have one dtype)
      if (thread < L::kDim) {
        shared.k[thread] = first;
        shared.x[0][L::place(thread)] = from_bits(job.k.dtype, r.second);
      } else {
        shared.v[thread - L::kDim] = first;
      }
      const int which = thread - L::kDim;
      if (which >= 0 && which < kStepScalars) {
        const Array& a = job.scalars[kDraft ? 1 : 0][which];
        shared.scalar[which] =
            a.data == nullptr ? absent_scalar(job, which) : from_bits(a.dtype, r.scalar);
      }
    });
  }
  KALMANET_KERNEL void read_scalars() {
    now.decay = exp_of(shared.scalar[kStepDecay]);
    now.u_decay = exp_of(shared.scalar[kStepUDecay]);
    now.beta2 = shared.scalar[kStepBeta] * shared.scalar[kStepBeta];
    now.alpha = shared.scalar[kStepAlpha];
    now.ridge = shared.scalar[kStepRidge];
    // A ratio that is not positive has no answer, and must not look as if it had one.
    if (!(now.ridge > 0.0f)) now.ridge = NAN;
  }
  template <bool kDraft>
  KALMANET_KERNEL void take() {
    put_token<kDraft>();
    group.barrier();
    read_scalars();
  }

  // A thread's rows of beta^2 k.
  KALMANET_KERNEL void weighted_rows(int thread, float (&row)[L::kRows]) const {
    load4(shared.k + L::row(thread), row);
    KALMANET_UNROLL
    for (int i = 0; i < L::kRows; ++i) row[i] *= now.beta2;
  }
  // A thread's columns of beta^2 v.
  KALMANET_KERNEL void weighted_values(int thread, float (&v)[4]) const {
    load4(shared.v + thread % 32 * 4, v);
    KALMANET_UNROLL
    for (int j = 0; j < 4; ++j) v[j] *= now.beta2;
  }
};

}  // namespace kalmanet::cuda
