// The problems that gka_cuda times, on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "half_numbers.hpp"
#include "kalmanet/kalmanet.hpp"

namespace kalmanet::benchmark {

// fresh: gates of a layer that was not trained yet, -A dt a token: A of a head uniform in 1 .. 16,
// dt log-uniform in 0.001 .. 0.1 and each token's own by a normal deviate of 0.5 of its logarithm.
struct Problem {
  int64_t B, T, H, K;
  DType dtype;
  bool fresh;
  bool two_gates = false;  // gk is a copy of g: without the kernels of short memory
  std::vector<uint16_t> q, k, v;
  std::vector<float> g;

  uint16_t bits(float f) const { return dtype == DType::float16 ? to_float16(f) : to_bfloat16(f); }
  double number(uint16_t h) const {
    return dtype == DType::float16 ? from_float16(h) : from_bfloat16(h);
  }

  Problem(int64_t b, int64_t t, int64_t h, int64_t dim, DType of = DType::bfloat16,
          bool is_fresh = false)
      : B(b), T(t), H(h), K(dim), dtype(of), fresh(is_fresh) {
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
    if (is_fresh) draw_fresh_gates();
  }
  void draw_fresh_gates() {
    fresh = true;
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;
    std::vector<float> of_head;
    for (int64_t h = 0; h < H; ++h) {
      const float a = 1 + 15 * uniform(random);
      of_head.push_back(a * 0.001f * std::pow(100.0f, uniform(random)));
    }
    for (size_t i = 0; i < g.size(); ++i) {
      g[i] = -of_head[i % of_head.size()] * std::exp(0.5f * normal(random));
    }
  }
  // Heads of a twin at a short length whose answers are compared with the oracle's.
  int64_t few_heads() const { return fresh ? 4 : 2; }
  int64_t few_tokens() const { return fresh ? 320 : 600; }
};

}  // namespace kalmanet::benchmark
