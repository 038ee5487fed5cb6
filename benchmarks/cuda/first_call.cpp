// The first calls of a process: what they take beyond the creation of the GPU's context (which
// cudaFree(0) asks for, and every program that uses a GPU waits for once). Kernels are brought to
// the GPU when they are first launched; nothing of ours is kept from one process to the next.
#include "first_call.hpp"

#include <cuda_runtime.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "kalmanet/kalmanet.hpp"

namespace {

using namespace kalmanet;
using Clock = std::chrono::steady_clock;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

double ms_of(const std::function<void()>& f) {
  const auto begin = Clock::now();
  f();
  check(cudaDeviceSynchronize(), "a first call");
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// A training step's tensors of one layer, bfloat16, and a decode step's: B1 T2048, 32 heads of 128.
struct Tensors {
  static constexpr int64_t T = 2048, H = 32, K = 128;
  std::mt19937 random{1};
  GkaInputs in, step_in;
  GkaOutputs out, step_out;
  GkaOutputGrads of;
  GkaInputGrads to;

  Tensors() {
    in.q = rows(true), in.k = rows(true), in.v = rows(true), of.d_o = rows(true);
    in.g = in.gk = gates(true);
    out.o = rows(false), to.dq = rows(false), to.dk = rows(false), to.dv = rows(false);
    to.dg = gates(false), to.dgk = gates(false);
    const auto first = [](View view) {
      view.size[1] = 1;
      return view;
    };
    step_in.q = first(rows(true)), step_in.k = first(rows(true)), step_in.v = first(rows(true));
    step_in.g = step_in.gk = first(gates(true));
    step_in.h0 = step_out.h_final = state();
    step_in.u0 = step_out.u_final = state();
    step_out.o = first(rows(false));
  }

 private:
  static void* memory(size_t bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), "cudaMalloc");
    check(cudaMemset(data, 0, bytes), "cudaMemset");
    return data;
  }
  // (The process's end gives the memory back.)
  View rows(bool drawn) {
    std::vector<uint16_t> bits(static_cast<size_t>(T * H * K));
    std::normal_distribution<float> normal(0.0f, 0.09f);  // 128 of them: a length of about 1
    for (uint16_t& e : bits) {
      const float x = normal(random);
      uint32_t all;
      static_assert(sizeof all == sizeof x);
      __builtin_memcpy(&all, &x, 4);
      e = static_cast<uint16_t>(all >> 16);
    }
    void* const data = memory(bits.size() * 2);
    if (drawn)
      check(cudaMemcpy(data, bits.data(), bits.size() * 2, cudaMemcpyHostToDevice), "copy");
    return dense(data, DType::bfloat16, {1, T, H, K});
  }
  View gates(bool drawn) {
    std::vector<float> decays(static_cast<size_t>(T * H), -0.03f);
    void* const data = memory(decays.size() * 4);
    if (drawn)
      check(cudaMemcpy(data, decays.data(), decays.size() * 4, cudaMemcpyHostToDevice), "copy");
    return dense(data, DType::float32, {1, T, H});
  }
  static View state() {
    return dense(memory(static_cast<size_t>(H * K * K) * 4), DType::float32, {1, H, K, K});
  }
};

bool is_finite(const View& o) {
  std::vector<uint16_t> bits(static_cast<size_t>(o.numel()));
  check(cudaMemcpy(bits.data(), o.data, bits.size() * 2, cudaMemcpyDeviceToHost), "copy");
  for (const uint16_t e : bits) {
    if ((e & 0x7f80) == 0x7f80) return false;
  }
  return true;
}

}  // namespace

int time_first_calls(bool direct) {
  std::printf("{\"context_ms\": %.1f}\n", ms_of([] { check(cudaFree(nullptr), "cudaFree"); }));
  Tensors t;
  check(cudaDeviceSynchronize(), "copies");
  const std::vector<Solver> solvers =
      direct ? std::vector{Solver::direct} : std::vector{Solver::chebyshev, Solver::direct};
  for (const Solver solver : solvers) {
    GkaOptions options;
    options.backend = Backend::cuda;
    options.solver = solver;
    double first = 0;
    const auto time = [&](const char* what, const std::function<void()>& call) {
      const double once = ms_of(call), again = ms_of(call);
      first += once;
      std::printf("{\"op\": \"first %s\", \"solver\": \"%s\", \"ms\": %.2f, \"second_ms\": %.2f}\n",
                  what, name(solver), once, again);
    };
    time("forward", [&] { gka_forward(t.in, t.out, options); });
    time("backward", [&] { gka_backward(t.in, {}, t.of, t.to, options); });
    time("step", [&] { gka_step(t.step_in, t.step_out, options); });
    std::printf("{\"op\": \"first calls together\", \"solver\": \"%s\", \"ms\": %.1f}\n",
                name(solver), first);
    if (!is_finite(t.out.o) || !is_finite(t.to.dk) || !is_finite(t.step_out.o)) {
      std::fprintf(stderr, "an output is not finite\n");
      return 1;
    }
  }
  return 0;
}
