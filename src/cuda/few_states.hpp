// What a block of the kernel of a few tokens at once reads and writes: tokens and states.
#pragma once

#include "cuda/few_solve.hpp"

namespace kalmanet::cuda {

template <class Group>
struct FewStates : FewSolve<Group> {
  using Base = FewSolve<Group>;
  using Base::group, Base::shared, Base::job, Base::sequence, Base::head, Base::n, Base::weights;
  using L = FewLayout;
  using Registers = FewRegisters;
  float *h_to = nullptr, *u_to = nullptr;

  // ---- tokens: warp t has token t

  // Four numbers of 16 bits, dense and aligned.
  KALMANET_KERNEL static void load_four(const Array& a, int64_t at, uint32_t (&bits)[2]) {
    memcpy(bits, __builtin_assume_aligned(static_cast<const uint16_t*>(a.data) + at, 8), 8);
  }
  KALMANET_KERNEL void unpack_four(const uint32_t (&bits)[2], float (&x)[4]) const {
    KALMANET_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = from_bits(job.k.dtype, bits[i / 2] >> i % 2 * 16 & 0xffff);
  }
  KALMANET_KERNEL static float square(const float (&x)[4]) {
    return (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
  }

  // Tokens t0 .. t0 + n of the call, or of the last draft, on their way. (Of tokens that are not
  // there: zeros.)
  template <bool kDraft>
  KALMANET_KERNEL void fetch(int64_t t0) {
    const Array& k = kDraft ? job.draft_k : job.k;
    const Array& v = kDraft ? job.draft_v : job.v;
    const int64_t k_head = grouped(head, job.k_group), v_head = grouped(head, job.v_group);
    const int64_t q_head = grouped(head, job.q_group);
    group.each([&](int thread, Registers& r) {
      const int t = thread / 32, c = thread % 32 * 4;
      r.q_bits[0] = r.q_bits[1] = r.k_bits[0] = r.k_bits[1] = 0;
      r.v_bits[0] = r.v_bits[1] = r.scalar = 0;
      if (t < n) {
        load_four(k, offset_of(k, sequence, t0 + t, k_head) + c, r.k_bits);
        load_four(v, offset_of(v, sequence, t0 + t, v_head) + c, r.v_bits);
        if (!kDraft) load_four(job.q, offset_of(job.q, sequence, t0 + t, q_head) + c, r.q_bits);
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
      const int t = thread / 32, c = thread % 32 * 4;
      float x[4];
      unpack_four(r.q_bits, x);
      store4(shared.q[t] + c, x);
      r.sums[0] = square(x);
      unpack_four(r.k_bits, x);
      store4(shared.k[t] + c, x);
      r.sums[1] = square(x);
      unpack_four(r.v_bits, x);
      store4(shared.v[t] + c, x);
      r.sums[2] = square(x);
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
    KALMANET_UNROLL
    for (int i = 0; i < 3; ++i) {
      group.template sum_lanes<32>([i](Registers& r) -> float& { return r.sums[i]; });
    }
    group.each([&](int thread, Registers& r) {
      if (thread % 32 != 0) return;
      shared.query_norm[thread / 32] = sqrtf(r.sums[0]);
      shared.key_norm[thread / 32] = sqrtf(r.sums[1]);
      shared.value_norm[thread / 32] = sqrtf(r.sums[2]);
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      float k[L::kTokens];
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) k[t] = shared.k[t][thread];
      store4(shared.k_rows[thread], k);
    });
    if (!kDraft) this->split_keys();
    group.barrier();
  }

  // ---- H in float32, in registers

  KALMANET_KERNEL void load_h(const float* from) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int m = 0; m < L::kRowTiles; ++m) {
        KALMANET_UNROLL
        for (int tile = 0; tile < L::kTiles; ++tile) {
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            float (&h)[4] = r.raw[m][tile][i];
            if (from != nullptr) {
              load4(from + (L::row(thread, m) + i) * L::kDim + L::column(thread, tile), h);
            } else {
              h[0] = h[1] = h[2] = h[3] = 0;
            }
          }
        }
      }
    });
  }
  KALMANET_KERNEL void store_h() {
    if (h_to == nullptr) return;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int m = 0; m < L::kRowTiles; ++m) {
        KALMANET_UNROLL
        for (int tile = 0; tile < L::kTiles; ++tile) {
          KALMANET_UNROLL
          for (int i = 0; i < 2; ++i) {
            store4(h_to + (L::row(thread, m) + i) * L::kDim + L::column(thread, tile),
                   r.raw[m][tile][i]);
          }
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
        float row[L::kRowTiles][2];
        KALMANET_UNROLL
        for (int e = 0; e < 4; ++e) {
          row[e / 2][e % 2] = beta2 * shared.k[t][L::first_row(thread) + e];
        }
        KALMANET_UNROLL
        for (int tile = 0; tile < L::kTiles; ++tile) {
          float k[4];
          load4(shared.k[t] + L::column(thread, tile), k);
          KALMANET_UNROLL
          for (int e = 0; e < 4; ++e) {
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              float& h = r.raw[e / 2][tile][e % 2][j];
              h = decay * h + row[e / 2][e % 2] * k[j];
            }
          }
        }
      });
    }
  }

  // ---- a state in shared memory (U; H, once there is no need of it in registers): a thread works
  // on what it brought

  KALMANET_KERNEL static int at(int thread, int i, int half) {
    return (L::state_row(thread) + i) * L::kDim + L::half_column(thread, half);
  }
  // f(i, half) for each of its pieces of four.
  template <class F>
  KALMANET_KERNEL static void for_pieces(F&& f) {
    KALMANET_LOOP
    for (int i0 = 0; i0 < L::kRows; i0 += 4) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) f(i0 + i, 0), f(i0 + i, 1);
    }
  }
  KALMANET_KERNEL static void bring(float* to, const float* from) {
    if (from != nullptr) {
      copy16(to, from);
    } else {
      store4(to, {0, 0, 0, 0});
    }
  }
  KALMANET_KERNEL void start_u(const float* from) {
    group.each([&](int thread, Registers&) {
      for_pieces([&](int i, int half) {
        const int e = at(thread, i, half);
        bring(shared.u + e, from == nullptr ? nullptr : from + e);
      });
    });
  }
  KALMANET_KERNEL void store_u() {
    if (u_to == nullptr) return;
    wait_copies();
    group.each([&](int thread, Registers&) {
      for_pieces([&](int i, int half) {
        float u[4];
        load4(shared.u + at(thread, i, half), u);
        store4(u_to + at(thread, i, half), u);
      });
    });
  }
  // The state in shared memory past all tokens at work: by the decays of `which`, outer products
  // of keys and `right`. To `to`, which may be shared memory itself. kBrings: and `next` begun in
  // its place.
  template <bool kBrings>
  KALMANET_KERNEL void advance(StepScalar which, const float (&right)[L::kTokens][L::kDim],
                               float* to, const float* next) {
    wait_copies();
    group.each([&](int thread, Registers&) {
      float weight[L::kTokens], columns[L::kTokens][8];
      const float decay = weights(which, L::kTokens - 1, weight);
      KALMANET_UNROLL
      for (int t = 0; t < L::kTokens; ++t) {
        KALMANET_UNROLL
        for (int half = 0; half < 2; ++half) {
          float x[4];
          load4(right[t] + L::half_column(thread, half), x);
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) columns[t][half * 4 + j] = weight[t] * x[j];
        }
      }
      KALMANET_LOOP
      for (int i0 = 0; i0 < L::kRows; i0 += 4) {
        float s[4][2][4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          KALMANET_UNROLL
          for (int half = 0; half < 2; ++half)
            load4(shared.u + at(thread, i0 + i, half), s[i][half]);
        }
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          float k[4];
          load4(shared.k_rows[L::state_row(thread) + i0 + i], k);
          KALMANET_UNROLL
          for (int half = 0; half < 2; ++half) {
            KALMANET_UNROLL
            for (int j = 0; j < 4; ++j) {
              float& e = s[i][half][j];
              e = decay * e;
              KALMANET_UNROLL
              for (int t = 0; t < L::kTokens; ++t) e += k[t] * columns[t][half * 4 + j];
            }
            const int place = at(thread, i0 + i, half);
            if (to != nullptr) store4(to + place, s[i][half]);
            if (kBrings) bring(shared.u + place, next == nullptr ? nullptr : next + place);
          }
        }
      }
    });
  }
};

}  // namespace kalmanet::cuda
