// The CUDA backend's times on one GPU: the copy rate, decode steps and whole sequences, each a
// median of runs timed by events, steps replayed as a graph. Prints one line of JSON a case.
//
//   gka_cuda [step] [forward] [backward] [sizes] (default: the first three) [few] [quick]
//   [quick-backward] [steps_once], or first [direct] (sizes: fewer dims than 128, and float16; few:
//   the backward's first two sizes; quick.., steps_once: for a profiler; first: the process's first
//   calls, by the clock: first_call.cpp)
//
// Inputs as bench's peers have them: unit queries and keys, normal values, gates of a memory of
// about 30 tokens, all bfloat16 (or float16) but the gates. A case is timed only after its outputs
// were found finite and, at a short length, equal to the float64 oracle's.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "first_call.hpp"
#include "half_numbers.hpp"
#include "kalmanet/kalmanet.hpp"

namespace {

using namespace kalmanet;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Memory of the GPU, and what it was filled with.
struct Device {
  void* data = nullptr;
  explicit Device(size_t bytes) { check(cudaMalloc(&data, bytes), "cudaMalloc"); }
  template <class T>
  explicit Device(const std::vector<T>& from) : Device(from.size() * sizeof(T)) {
    check(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
};

struct Problem {
  int64_t B, T, H, K;
  DType dtype;
  std::vector<uint16_t> q, k, v;
  std::vector<float> g;

  uint16_t bits(float f) const { return dtype == DType::float16 ? to_float16(f) : to_bfloat16(f); }
  double number(uint16_t h) const {
    return dtype == DType::float16 ? from_float16(h) : from_bfloat16(h);
  }

  Problem(int64_t b, int64_t t, int64_t h, int64_t dim, DType of = DType::bfloat16)
      : B(b), T(t), H(h), K(dim), dtype(of) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;
    const auto vectors = [&](std::vector<uint16_t>& to, bool unit) {
      std::vector<float> y(static_cast<size_t>(K));
      for (int64_t i = 0; i < B * T * H; ++i) {
        float sum = 0;
        for (float& e : y) e = normal(random), sum += e * e;
        for (float e : y) to.push_back(bits(unit ? e / std::sqrt(sum) : e));
      }
    };
    vectors(q, true), vectors(k, true), vectors(v, false);
    for (int64_t i = 0; i < B * T * H; ++i) g.push_back(-std::exp(uniform(random) * 4 - 6));
  }
};

double median_ms(const std::function<void()>& run, cudaStream_t stream, int times) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event"), check(cudaEventCreate(&end), "event");
  for (int i = 0; i < 3; ++i) run();
  std::vector<float> all;
  for (int i = 0; i < times; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    run();
    check(cudaEventRecord(end, stream), "record");
    check(cudaEventSynchronize(end), "a kernel");
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    all.push_back(ms);
  }
  std::nth_element(all.begin(), all.begin() + times / 2, all.end());
  return all[static_cast<size_t>(times / 2)];
}

// Twin problems on the two sides: the oracle's answer in float64 for the first `tokens` tokens.
double error_of(const Problem& p, int64_t tokens, const GkaOptions& with, bool step) {
  Problem small(1, tokens, 2, p.K, p.dtype);
  const int64_t n = tokens * 2 * p.K;
  std::vector<double> q, k, v, g, o(static_cast<size_t>(n));
  for (uint16_t e : small.q) q.push_back(p.number(e));
  for (uint16_t e : small.k) k.push_back(p.number(e));
  for (uint16_t e : small.v) v.push_back(p.number(e));
  for (float e : small.g) g.push_back(e);
  GkaInputs in;
  const auto dims = [&](auto* data) { return dense(data, {1, tokens, 2, p.K}); };
  const double *cq = q.data(), *ck = k.data(), *cv = v.data(), *cg = g.data();
  in.q = dims(cq), in.k = dims(ck), in.v = dims(cv);
  in.g = in.gk = dense(cg, {1, tokens, 2});
  GkaOutputs out;
  out.o = dims(o.data());
  GkaOptions options = with;
  options.backend = Backend::reference;
  options.arithmetic = Arithmetic::standard;
  gka_forward(in, out, options);

  Device dq(small.q), dk(small.k), dv(small.v), dg(small.g), dout(static_cast<size_t>(n) * 2);
  const auto on_gpu = [&](const Device& d) {
    return dense(static_cast<const void*>(d.data), p.dtype, {1, tokens, 2, p.K});
  };
  in.q = on_gpu(dq), in.k = on_gpu(dk), in.v = on_gpu(dv);
  in.g = in.gk = dense(static_cast<const float*>(dg.data), {1, tokens, 2});
  out.o = dense(dout.data, p.dtype, {1, tokens, 2, p.K});
  if (step) {
    gka_step(in, out, with);
  } else {
    gka_forward(in, out, with);
  }
  std::vector<uint16_t> got(static_cast<size_t>(n));
  check(cudaMemcpy(got.data(), dout.data, got.size() * 2, cudaMemcpyDeviceToHost), "copy");
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = p.number(got[i]) - o[i];
    difference += e * e, norm += o[i] * o[i];
  }
  return std::sqrt(difference / norm);
}

double copy_rate() {
  const size_t bytes = size_t{1} << 31;
  Device a(bytes), b(bytes);
  const double ms = median_ms(
      [&] { check(cudaMemcpyAsync(b.data, a.data, bytes, cudaMemcpyDeviceToDevice), "copy"); },
      nullptr, 9);
  return 2.0 * static_cast<double>(bytes) / ms * 1e-9;
}

void report(const char* what, const Problem& p, const GkaOptions& options, double ms, double error,
            const std::string& more) {
  std::printf(
      "{\"op\": \"%s\", \"solver\": \"%s\", \"arithmetic\": \"%s\", \"B\": %ld, \"T\": %ld, "
      "\"H\": %ld, \"K\": %ld, \"dtype\": \"%s\", \"ms\": %.4f, \"error\": %.2e%s}\n",
      what, name(options.solver), name(options.arithmetic), static_cast<long>(p.B),
      static_cast<long>(p.T), static_cast<long>(p.H), static_cast<long>(p.K), name(p.dtype), ms,
      error, more.c_str());
  std::fflush(stdout);
}

// plain; draft: the tokens are one, and half of as many before them were accepted; once: a few
// launches and no more, for a profiler.
enum class StepKind { plain, draft, once };

void time_step(const Problem& p, GkaOptions options, double copy, StepKind kind = StepKind::plain) {
  const bool once = kind == StepKind::once;
  // The states of one memory of about 100 keys, for every sequence and head.
  const size_t dim = static_cast<size_t>(p.K), one = dim * dim;
  const size_t states = static_cast<size_t>(p.B * p.H) * one;
  const Problem past(1, 300, 1, p.K);
  std::vector<float> h(one), u(one);
  for (size_t t = 0; t < 300; ++t) {
    for (size_t i = 0; i < dim; ++i) {
      const float key = static_cast<float>(from_bfloat16(past.k[t * dim + i]));
      for (size_t j = 0; j < dim; ++j) {
        float &to_h = h[i * dim + j], &to_u = u[i * dim + j];
        to_h = 0.99f * to_h + key * static_cast<float>(from_bfloat16(past.k[t * dim + j]));
        to_u = 0.99f * to_u + key * static_cast<float>(from_bfloat16(past.v[t * dim + j]));
      }
    }
  }
  h.reserve(states), u.reserve(states);
  while (h.size() < states) {
    h.insert(h.end(), h.begin(), h.begin() + static_cast<std::ptrdiff_t>(one));
    u.insert(u.end(), u.begin(), u.begin() + static_cast<std::ptrdiff_t>(one));
  }
  // Read from one place and written to another: a state updated over and over with the same few
  // tokens would become one that no sequence has.
  Device q(p.q), k(p.k), v(p.v), g(p.g), h0(h), u0(u), o(p.v.size() * 2);
  Device h1(states * 4), u1(states * 4);
  const auto view = [&](const Device& d) { return dense(d.data, p.dtype, {p.B, p.T, p.H, p.K}); };
  GkaInputs in;
  in.q = view(q), in.k = view(k), in.v = view(v);
  in.g = in.gk = dense(static_cast<float*>(g.data), {p.B, p.T, p.H});
  GkaOutputs out;
  out.o = view(o);
  out.h_final = dense(static_cast<float*>(h1.data), {p.B, p.H, p.K, p.K});
  out.u_final = dense(static_cast<float*>(u1.data), {p.B, p.H, p.K, p.K});
  in.h0 = dense(static_cast<float*>(h0.data), {p.B, p.H, p.K, p.K});
  in.u0 = dense(static_cast<float*>(u0.data), {p.B, p.H, p.K, p.K});
  const std::vector<int32_t> half(static_cast<size_t>(p.B), static_cast<int32_t>(p.T / 2));
  const Device accepted(half);
  if (kind == StepKind::draft) {
    in.is_draft = true;
    in.last_draft = {in.k, in.v, in.g, in.gk, {}};
    in.accepted = {static_cast<const int32_t*>(accepted.data), half.size()};
  }
  const double error = once ? 0.0 : error_of(p, 20, options, true);
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  options.stream = stream;
  for (int i = 0; i < 3; ++i) gka_step(in, out, options);
  check(cudaStreamSynchronize(stream), "a step");
  if (once) return;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  const int steps = 10;  // a graph: what one launch costs is divided by them
  for (int i = 0; i < steps; ++i) gka_step(in, out, options);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  const double ms =
      median_ms([&] { check(cudaGraphLaunch(replay, stream), "graph"); }, stream, 21) / steps;
  const double bytes = 4.0 * 4.0 * static_cast<double>(states);  // both states, read and written
  char more[128];
  std::snprintf(more, sizeof more, ", \"of_copy_rate\": %.3f", bytes / ms * 1e-9 / copy);
  report(kind == StepKind::draft ? "draft" : "step", p, options, ms, error, more);
  cudaGraphExecDestroy(replay), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
}

void time_forward(const Problem& p, GkaOptions options, int times) {
  Device q(p.q), k(p.k), v(p.v), g(p.g), o(p.v.size() * 2);
  const auto view = [&](const Device& d) { return dense(d.data, p.dtype, {p.B, p.T, p.H, p.K}); };
  GkaInputs in;
  in.q = view(q), in.k = view(k), in.v = view(v);
  in.g = in.gk = dense(static_cast<float*>(g.data), {p.B, p.T, p.H});
  GkaOutputs out;
  out.o = view(o);
  const double error = error_of(p, 600, options, false);
  const double ms = median_ms([&] { gka_forward(in, out, options); }, nullptr, times);
  std::vector<uint16_t> got(p.v.size());
  check(cudaMemcpy(got.data(), o.data, got.size() * 2, cudaMemcpyDeviceToHost), "copy");
  for (uint16_t e : got) {
    if (!std::isfinite(p.number(e))) {
      std::fprintf(stderr, "an output is not finite\n");
      std::exit(1);
    }
  }
  report("forward", p, options, ms, error, "");
}

// The gradients that training asks for, of a loss with a random gradient of o.
struct Backward {
  Device q, k, v, g, d_o, dq, dk, dv, dg, dgk, o;
  GkaInputs in;
  GkaOutputs out;
  GkaOutputGrads of;
  GkaInputGrads to;

  explicit Backward(const Problem& p)
      : q(p.q),
        k(p.k),
        v(p.v),
        g(p.g),
        d_o(output_gradient(p)),
        dq(p.q.size() * 2),
        dk(p.q.size() * 2),
        dv(p.q.size() * 2),
        dg(p.g.size() * 4),
        dgk(p.g.size() * 4),
        o(p.q.size() * 2) {
    const auto rows = [&](const Device& d) { return dense(d.data, p.dtype, {p.B, p.T, p.H, p.K}); };
    const auto gates = [&](const Device& d) {
      return dense(static_cast<float*>(d.data), {p.B, p.T, p.H});
    };
    in.q = rows(q), in.k = rows(k), in.v = rows(v), in.g = in.gk = gates(g);
    out.o = rows(o), of.d_o = rows(d_o);
    to.dq = rows(dq), to.dk = rows(dk), to.dv = rows(dv), to.dg = gates(dg), to.dgk = gates(dgk);
  }
  static std::vector<uint16_t> output_gradient(const Problem& p) {
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> all;
    for (size_t i = 0; i < p.v.size(); ++i) all.push_back(p.bits(normal(random)));
    return all;
  }
};

// The worst of the gradients' relative errors against the float64 oracle, at `tokens` tokens of two
// heads.
double backward_error_of(const Problem& p, int64_t tokens, const GkaOptions& with) {
  const Problem small(1, tokens, 2, p.K, p.dtype);
  Backward on_gpu(small);
  gka_backward(on_gpu.in, {}, on_gpu.of, on_gpu.to, with);
  const auto wide = [&](const std::vector<uint16_t>& from) {
    std::vector<double> all;
    for (uint16_t e : from) all.push_back(p.number(e));
    return all;
  };
  const std::vector<double> q = wide(small.q), k = wide(small.k), v = wide(small.v);
  const std::vector<double> d_o = wide(Backward::output_gradient(small));
  const std::vector<double> g(small.g.begin(), small.g.end());
  std::vector<double> want[5];
  GkaInputs in;
  GkaOutputGrads of;
  GkaInputGrads to;
  const auto rows = [&](auto& from) { return dense(from.data(), {1, tokens, 2, p.K}); };
  const auto gates = [&](auto& from) { return dense(from.data(), {1, tokens, 2}); };
  for (int i = 0; i < 5; ++i) want[i].resize(i < 3 ? q.size() : g.size());
  in.q = rows(q), in.k = rows(k), in.v = rows(v), in.g = in.gk = gates(g), of.d_o = rows(d_o);
  to.dq = rows(want[0]), to.dk = rows(want[1]), to.dv = rows(want[2]);
  to.dg = gates(want[3]), to.dgk = gates(want[4]);
  GkaOptions options = with;
  options.backend = Backend::reference;
  gka_backward(in, {}, of, to, options);
  const Device* const got[5] = {&on_gpu.dq, &on_gpu.dk, &on_gpu.dv, &on_gpu.dg, &on_gpu.dgk};
  double worst = 0;
  for (int i = 0; i < 5; ++i) {
    std::vector<double> ours;
    if (i < 3) {
      std::vector<uint16_t> half(want[i].size());
      check(cudaMemcpy(half.data(), got[i]->data, half.size() * 2, cudaMemcpyDeviceToHost), "copy");
      ours = wide(half);
    } else {
      std::vector<float> all(want[i].size());
      check(cudaMemcpy(all.data(), got[i]->data, all.size() * 4, cudaMemcpyDeviceToHost), "copy");
      ours.assign(all.begin(), all.end());
    }
    double difference = 0, norm = 0;
    for (size_t j = 0; j < ours.size(); ++j) {
      difference += (ours[j] - want[i][j]) * (ours[j] - want[i][j]);
      norm += want[i][j] * want[i][j];
    }
    const double error = std::sqrt(difference / norm);
    if (!(error <= worst)) worst = error;  // NaN is the worst
  }
  return worst;
}

void time_backward(const Problem& p, const GkaOptions& options, int times) {
  Backward b(p);
  const double error = backward_error_of(p, 600, options);
  if (!(error < 0.1)) {
    std::fprintf(stderr, "gradients are off by %g\n", error);
    std::exit(1);
  }
  const auto backward = [&] { gka_backward(b.in, {}, b.of, b.to, options); };
  const double ms = median_ms(backward, nullptr, times);
  const double both = median_ms(
      [&] {
        gka_forward(b.in, b.out, options);
        backward();
      },
      nullptr, times);
  GkaShape shape;
  shape.B = p.B, shape.T = p.T, shape.H = p.H, shape.K = shape.V = p.K;
  shape.dtype = p.dtype;
  const double bytes =
      static_cast<double>(gka_workspace_bytes(GkaOperation::backward, shape, options));
  char more[128];
  std::snprintf(more, sizeof more, ", \"with_forward_ms\": %.4f, \"workspace_MiB\": %.0f", both,
                bytes / (1 << 20));
  report("backward", p, options, ms, error, more);
}

}  // namespace

int main(int argc, char** argv) {
  const auto asked = [&](const char* what) {
    if (argc < 2) {
      return !std::strcmp(what, "step") || !std::strcmp(what, "forward") ||
             !std::strcmp(what, "backward");
    }
    return std::any_of(argv + 1, argv + argc, [&](const char* a) { return !std::strcmp(a, what); });
  };
  if (asked("first")) return time_first_calls(asked("direct"));
  for (const BackendInfo& info : backends()) {
    if (info.backend != Backend::cuda) continue;
    std::printf("{\"device\": \"%s\"}\n", info.detail.c_str());
    if (!info.available) return 1;
  }
  const double copy = copy_rate();
  std::printf("{\"copy_TBps\": %.3f}\n", copy);
  GkaOptions options;
  options.backend = Backend::cuda;
  GkaOptions direct = options;
  direct.solver = Solver::direct;
  if (asked("step")) {
    for (int64_t batch : {1, 16, 128}) {
      Problem p(batch, 1, 32, 128);
      time_step(p, options, copy);
      time_step(p, direct, copy);
    }
    for (int64_t batch : {1, 128}) {
      for (int64_t tokens : {2, 3, 4, 8}) {
        Problem p(batch, tokens, 32, 128);
        time_step(p, options, copy);
        if (tokens == 4) time_step(p, direct, copy);
        time_step(p, options, copy, StepKind::draft);
      }
    }
  }
  if (asked("steps_once")) {
    for (int64_t batch : {1, 128}) {
      for (int64_t tokens : {1, 4})
        time_step(Problem(batch, tokens, 32, 128), options, copy, StepKind::once);
    }
  }
  GkaOptions bf16 = options;
  bf16.arithmetic = Arithmetic::bfloat16;
  if (asked("forward")) {
    for (const auto& [B, T, H] :
         {std::array<int64_t, 3>{1, 2048, 32}, {1, 8192, 32}, {1, 8192, 8}, {8, 2048, 32}}) {
      Problem p(B, T, H, 128);
      time_forward(p, options, 9);
      time_forward(p, bf16, 9);
      time_forward(p, direct, 9);
    }
  }
  if (asked("sizes")) {
    const auto time_both = [&](const Problem& p, const GkaOptions& with) {
      time_forward(p, with, 9), time_backward(p, with, 5);
    };
    for (const GkaOptions& with : {direct, options}) time_both(Problem(1, 8192, 32, 64), with);
    time_both(Problem(1, 8192, 32, 96), direct);
    time_both(Problem(1, 8192, 32, 128, DType::float16), direct);
    time_both(Problem(1, 8192, 32, 128), direct);  // beside them
  }
  if (asked("quick")) {
    Problem p(1, 8192, 32, 128);
    time_forward(p, options, 1);
    time_forward(p, direct, 1);
  }
  if (asked("backward")) {
    for (const auto& [B, T, H] :
         {std::array<int64_t, 3>{1, 2048, 32}, {1, 8192, 32}, {1, 8192, 8}, {8, 2048, 32}}) {
      if (asked("few") && (H == 8 || B == 8)) continue;
      const Problem p(B, T, H, 128);
      time_backward(p, options, 5);
      time_backward(p, direct, 5);
    }
  }
  if (asked("quick-backward")) {
    const Problem p(1, 2048, 32, 128);
    time_backward(p, direct, 1);
  }
  return 0;
}
