// The body of the step kernel: states in, the last draft's accepted tokens, the call's tokens, out.
#pragma once

#include "cuda/step_states.hpp"
#include "cuda/token_body.hpp"

namespace kalmanet::cuda {

template <class Group>
struct StepBody : StepStates<Group> {
  using Base = StepStates<Group>;
  using Base::group, Base::shared, Base::job, Base::sequence, Base::head, Base::h_to, Base::u_to,
      Base::now;
  using Base::load_h, Base::store_h, Base::start_u, Base::store_u;
  using L = StepLayout;
  using Registers = StepRegisters;

  // Both states past a token of the last draft.
  KALMANET_KERNEL void advance() {
    group.each([&](int thread, Registers& r) {
      float row[L::kRows];
      this->weighted_rows(thread, row);
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        float k[4];
        load4(shared.k + L::column(thread, p), k);
        KALMANET_UNROLL
        for (int i = 0; i < L::kRows; ++i) {
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) {
            r.h[p][i][j] = fused(now.decay, r.h[p][i][j], row[i] * k[j]);
          }
        }
      }
    });
    wait_copies();
    group.each([&](int thread, Registers&) {
      float v[4];
      this->weighted_values(thread, v);
      KALMANET_LOOP
      for (int i = 0; i < L::kUSteps; ++i) {
        float* const at = shared.u + L::u_begin(thread) + i * L::kDim;
        const float k = shared.k[thread / 32 * L::kUSteps + i];
        float u[4];
        load4(at, u);
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) u[j] = fused(now.u_decay, u[j], k * v[j]);
        store4(at, u);
      }
    });
    group.barrier();
  }

  // H past a token, each piece `used` once it is; registers.product <- H q on the way. After a
  // barrier norm() is |H|_F, 0 where it has vanished.
  template <class Used>
  KALMANET_KERNEL void update_h(Used&& used) {
    group.each([&](int thread, Registers& r) {
      float row[L::kRows], squares[4] = {};
      this->weighted_rows(thread, row);
      KALMANET_UNROLL
      for (int i = 0; i < L::kRows; ++i) r.sum[i] = 0;
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        float k[4], q[4];
        load4(shared.k + L::column(thread, p), k);
        L::load_piece(L::at_byte(shared.x[0], L::read_byte(thread)), p, q);
        KALMANET_UNROLL
        for (int i = 0; i < L::kRows; ++i) {
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) {
            const float h = fused(now.decay, r.h[p][i][j], row[i] * k[j]);
            r.h[p][i][j] = h;
            squares[j] += h * h;
            r.sum[i] += h * q[j];
          }
        }
        used(thread, r, p);
      }
      r.squares = (squares[0] + squares[1]) + (squares[2] + squares[3]);
      r.q = shared.x[0][L::place(L::own_row(thread))];
    });
    this->put_squares(0, [](Registers& r) -> float& { return r.squares; });
    this->add_sums();
  }
  KALMANET_KERNEL float norm() const {
    const float f2 = this->total(0);
    constexpr float kVanished = static_cast<float>(kVanishedNorm * kVanishedNorm);
    return f2 <= kVanished ? 0.0f : sqrtf(f2);
  }

  // One of the pieces of H where it belongs.
  KALMANET_KERNEL void store_piece(int p) {
    group.each([&](int thread, Registers& r) {
      float* const to = h_to + L::row(thread) * L::kDim + L::column(thread, p);
      KALMANET_UNROLL
      for (int i = 0; i < L::kRows; ++i) store4(to + i * L::kDim, r.h[p][i]);
    });
  }

  // x into registers: Chebyshev's iteration from the product H q on. m = q + alpha (x - q) into
  // shared memory; then put_solution_squares: |x|^2 into squares[1].
  //
  // What a step needs beside its product is made while that is on its way. So is H stored, a piece
  // each of the first four steps: all at once would hold up the loads of x for a thousand cycles.
  struct Iteration {
    float lambda, step, rho2, w;
  };
  // A step up to the next x, which lies where the last but one did.
  KALMANET_KERNEL void finish_step(const Iteration& it) {
    const float gain = it.step * it.w;
    group.each([&](int, Registers& r) {
      r.previous = r.x;
      r.x = r.carried - gain * (r.rest + r.product);
      *L::at_byte(shared.x[0], r.own_byte) = r.x;
      r.own_byte = kept(r.own_byte ^ L::kTurn);
    });
  }
  KALMANET_KERNEL void begin_step(Iteration& it) {
    group.barrier();
    it.w = reciprocal(1.0f - it.rho2 * it.w);
    group.each([&](int, Registers& r) {
      r.rest = it.lambda * r.x - r.q;
      r.carried = (it.w - 1.0f) * (r.x - r.previous) + r.x;
    });
    this->multiply();
  }
  // kStores: H stored, a piece each of the first steps.
  template <bool kStores>
  KALMANET_KERNEL void solve(float f, int num_iter, bool store) {
    Iteration it;
    it.lambda = now.ridge * f;
    it.step = f == 0.0f ? 0.0f : divide(2.0f, 2.0f * it.lambda + f);  // (then x stays 0)
    const float rho = divide(0.5f, 2.0f * now.ridge + 1.0f);
    it.rho2 = rho * rho;
    it.w = reciprocal(1.0f - 2.0f * it.rho2);
    if (kStores && num_iter <= L::kPieces) {
      if (store) store_h();
      store = false;
    }
    group.each([&](int thread, Registers& r) {
      r.own_byte = kept(L::own_byte(thread) ^ L::kTurn);
      r.read_byte = kept(L::read_byte(thread) ^ L::kTurn);
      r.x = it.step * r.q;
      r.product *= it.step;
      r.rest = it.lambda * r.x - r.q;
      r.carried = it.w * r.x;  // (of a step before it there was none)
    });
    int left = num_iter - 1;
    if (kStores && store) {
      KALMANET_UNROLL
      for (int p = 0; p < L::kPieces; ++p) {
        finish_step(it);
        begin_step(it);
        store_piece(p);
      }
      left -= L::kPieces;
    }
    KALMANET_LOOP
    for (;;) {
      finish_step(it);
      if (left-- == 0) break;
      begin_step(it);
    }
    group.each([&](int thread, Registers& r) {
      if (thread % 2 == 0) shared.m[L::own_row(thread)] = now.alpha * (r.x - r.q) + r.q;
      r.squares = thread % 2 == 0 ? r.x * r.x : 0.0f;
    });
  }
  KALMANET_KERNEL void put_solution_squares() {
    this->put_squares(1, [](Registers& r) -> float& { return r.squares; });
  }

  // The same in float64; m into x64[0].
  KALMANET_KERNEL void solve64(float f, int num_iter) {
    const double ridge = static_cast<double>(now.ridge), norm = static_cast<double>(f);
    const double lambda = ridge * norm, step = 2.0 / (2.0 * lambda + norm);
    const double rho = 0.5 / (2.0 * ridge + 1.0);
    double w = 2;
    group.each([&](int thread, Registers& r) {
      r.x_64 = step * static_cast<double>(r.q);
      r.previous64 = 0;
      if (thread % 2 == 0) shared.x64[0][L::own_row(thread)] = r.x_64;
    });
    group.barrier();
    KALMANET_LOOP
    for (int k = 0; k < num_iter; ++k) {
      w = 1.0 / (1.0 - rho * rho * w);
      const double gain = step * w, momentum = w - 1.0;
      this->multiply64(shared.x64[k % 2]);
      group.each([&](int thread, Registers& r) {
        const double rest = lambda * r.x_64 - static_cast<double>(r.q);
        const double carried = momentum * (r.x_64 - r.previous64) + r.x_64;
        r.previous64 = r.x_64;
        r.x_64 = carried - gain * (rest + r.product64);
        if (thread % 2 == 0) shared.x64[1 - k % 2][L::own_row(thread)] = r.x_64;
      });
      group.barrier();
    }
    group.each([&](int thread, Registers& r) {
      const double q = static_cast<double>(r.q);
      if (thread % 2 == 0) {
        shared.x64[0][L::own_row(thread)] = static_cast<double>(now.alpha) * (r.x_64 - q) + q;
      }
    });
    group.barrier();
  }

  // U past a token (into shared memory, or `store`: where it belongs) and o = scale U^T m, stored;
  // |U|^2 into squares[2], |o|^2 into squares[3]. Ends with a barrier.
  KALMANET_KERNEL void read_out(int64_t t, bool store) {
    wait_copies();
    group.each([&](int thread, Registers& r) {
      float v[4], squares[4] = {};
      this->weighted_values(thread, v);
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) r.o[j] = 0;
      KALMANET_LOOP
      for (int i0 = 0; i0 < L::kUSteps; i0 += 4) {
        const int row = thread / 32 * L::kUSteps + i0, at = L::u_begin(thread) + i0 * L::kDim;
        float m[4], k[4], u[4][4];
        load4(shared.m + row, m);
        load4(shared.k + row, k);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) load4(shared.u + at + i * L::kDim, u[i]);
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          KALMANET_UNROLL
          for (int j = 0; j < 4; ++j) {
            u[i][j] = fused(now.u_decay, u[i][j], k[i] * v[j]);
            r.o[j] += m[i] * u[i][j];
            squares[j] += u[i][j] * u[i][j];
          }
          if (store) {
            store4(u_to + at + i * L::kDim, u[i]);
          } else {
            store4(shared.u + at + i * L::kDim, u[i]);
          }
        }
      }
      r.squares = (squares[0] + squares[1]) + (squares[2] + squares[3]);
      store4(shared.partial[thread / 32] + thread % 32 * 4, r.o);
    });
    this->put_squares(2, [](Registers& r) -> float& { return r.squares; });
    put_outputs(offset_of(job.o, sequence, t, head));
    group.barrier();
  }
  // o of its parts, stored from element `at` on; |o|^2 into squares[3]. Begins with a barrier.
  KALMANET_KERNEL void put_outputs(int64_t at) {
    group.barrier();
    group.each([&](int thread, Registers& r) {
      r.squares = 0;
      if (thread >= L::kDim) return;
      float o = 0;
      KALMANET_UNROLL
      for (int w = 0; w < L::kWarps; ++w) o += shared.partial[w][thread];
      o *= static_cast<float>(job.scale);
      store_element(job.o, at + thread * job.o.stride[3], o);
      r.squares = o * o;
    });
    this->put_squares(3, [](Registers& r) -> float& { return r.squares; });
  }

  // o once more, of x64[0] and the U that read_out has made.
  KALMANET_KERNEL void read_out64(int64_t t, bool stored) {
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int j = 0; j < 4; ++j) r.o64[j] = 0;
      KALMANET_LOOP
      for (int i = 0; i < L::kUSteps; ++i) {
        const int row = thread / 32 * L::kUSteps + i;
        float u[4];
        load4((stored ? u_to : shared.u) + L::u_begin(thread) + i * L::kDim, u);
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) r.o64[j] += shared.x64[0][row] * static_cast<double>(u[j]);
      }
      store4(shared.partial64[thread / 32] + thread % 32 * 4, r.o64);
    });
    group.barrier();
    const int64_t at = offset_of(job.o, sequence, t, head);
    group.each([&](int thread, Registers&) {
      if (thread >= L::kDim) return;
      double o = 0;
      for (int w = 0; w < L::kWarps; ++w) o += shared.partial64[w][thread];
      store_element(job.o, at + thread * job.o.stride[3], static_cast<float>(job.scale * o));
    });
    group.barrier();
  }

  // The amplification alpha scale |x| |U|_F / (sqrt(K) |o|) is more than float32 bears where |o|^2
  // is less than this (and not 0).
  KALMANET_KERNEL double least_o2() const {
    const double weight = static_cast<double>(now.alpha) * job.scale;
    const double scaled =
        weight * weight * static_cast<double>(this->total(1)) * static_cast<double>(this->total(2));
    const double limit = largest_amplification(job.o.dtype);
    return scaled * (1.0 / (limit * limit * L::kDim));
  }
  KALMANET_KERNEL bool amplified(double least) const {
    const double o2 = static_cast<double>(this->total(3));
    return o2 > 0.0 && least > o2;
  }

  KALMANET_KERNEL int count_steps() const {
    if (job.num_iter != 0) return job.num_iter;
    return uniform(counted_steps(static_cast<double>(now.ridge), job.tolerance));
  }

  KALMANET_KERNEL void token(int64_t t, bool keeps) {
    const int num_iter = count_steps();
    update_h([](int, Registers&, int) {});
    group.barrier();
    const float f = norm();
    this->template solve<true>(f, num_iter, keeps && h_to != nullptr);
    put_solution_squares();
    group.barrier();
    const bool store = keeps && u_to != nullptr;
    read_out(t, store);
    if (f != 0.0f && amplified(least_o2())) {
      solve64(f, num_iter);
      read_out64(t, store);
    }
  }

  // kOne: the call is one token, no draft, and none before it: without the loop, H needs no other
  // registers than its own. `resumed`: the last draft's tokens are in h_final and u_final already.
  template <bool kOne>
  KALMANET_KERNEL void run(bool resumed) {
    const int64_t row = state_row(job, sequence);
    if (!has_states(job, row)) {
      answer_nothing(group, job, {sequence, 0, job.T, 0, 1, 1, 0}, head, row);
      return;
    }
    const float* const h_from = dense_state(resumed ? job.h_final : job.h0, row, head);
    const float* const u_from = dense_state(resumed ? job.u_final : job.u0, row, head);
    h_to = dense_state(job.h_final, row, head);
    u_to = dense_state(job.u_final, row, head);
    if constexpr (kOne) {
      load_h(h_from);
      this->template fetch<false>(0);
      start_u(u_from);
      this->template take<false>();
      token(0, true);
      return;
    }
    const int64_t accepted = resumed ? 0 : accepted_of(job, sequence);
    KALMANET_LOOP
    for (int64_t i = 0; i < accepted + job.T; ++i) {
      const bool old = i < accepted;
      if (i == 0) load_h(h_from);
      if (old) {
        this->template fetch<true>(i);
      } else {
        this->template fetch<false>(i - accepted);
      }
      if (i == 0) start_u(u_from);
      if (i == accepted && job.is_draft) {  // what the states become is known before the new tokens
        if (accepted > 0 || h_from != h_to) store_h();
        if (accepted > 0 || u_from != u_to) store_u();
      }
      if (old) {
        this->template take<true>();
        advance();
      } else {
        this->template take<false>();
        token(i - accepted, i + 1 == accepted + job.T && !job.is_draft);
      }
    }
  }
};

// Whether run_step<true> does a job.
inline bool is_one_token(const GkaJob& job) {
  return job.T == 1 && !job.is_draft && job.accepted == nullptr;
}

// The work of block (sequence, head).
template <bool kOne, class Group>
KALMANET_KERNEL void run_step(Group& group, StepShared& shared, const GkaJob& job, int64_t sequence,
                              int64_t head, bool resumed = false) {
  StepBody<Group> body{{{group, shared}, job, sequence, head}};
  body.template run<kOne>(resumed);
}

}  // namespace kalmanet::cuda
