// Trains a toy through gka_forward and gka_backward by gradient descent written out by hand, with
// no framework: a memory that is shown eight symbols with a random value each, and then asked for
// them. What a symbol looks like as a key and as a question are two tables that begin at random, so
// at first no question finds its key; how fast the memory fades and its ridge are learned too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kalmanet/kalmanet.hpp"

namespace {

constexpr int64_t B = 16, T = 16, K = 16, V = 4;  // sequences; tokens; sizes. One head
constexpr int64_t kSymbols = 16, kPairs = T / 2;  // symbols there are; shown, then asked for

// The parameters, all in one array: two tables [kSymbols, K], then log(-decay) and log(ridge).
struct Parameters {
  std::vector<float> all = std::vector<float>(2 * kSymbols * K + 2);
  float* key(int64_t symbol) { return &all[static_cast<size_t>(symbol * K)]; }
  float* question(int64_t symbol) { return key(kSymbols + symbol); }
  float& log_decay() { return all[all.size() - 2]; }
  float& log_ridge() { return all[all.size() - 1]; }
};

// One batch: tokens [0, kPairs) write a symbol's key with its value, the rest ask for one each.
struct Batch {
  std::vector<int64_t> symbol = std::vector<int64_t>(B * T);
  std::vector<float> value = std::vector<float>(B * T * V);  // written, or wanted as the answer

  explicit Batch(std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<int64_t> order(kSymbols);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t s = 0; s < kSymbols; ++s) order[s] = s;
      for (int64_t s = kSymbols - 1; s > 0; --s) {
        std::swap(order[s], order[random() % static_cast<uint64_t>(s + 1)]);
      }
      for (int64_t t = 0; t < kPairs; ++t) {
        // Asked for in the same order: each answer lies kPairs tokens back.
        symbol[b * T + t] = symbol[b * T + kPairs + t] = order[t];
        for (int64_t c = 0; c < V; ++c) {
          value[(b * T + t) * V + c] = value[(b * T + kPairs + t) * V + c] = normal(random);
        }
      }
    }
  }
  static bool asks(int64_t t) { return t >= kPairs; }
};

// The loss, half the mean square of what is wrong with an answer's numbers, and its gradient.
float loss_and_gradient(Parameters& p, const Batch& batch, Parameters& gradient) {
  const size_t tokens = B * T;
  std::vector<float> q(tokens * K), k(tokens * K), v(tokens * V), g(tokens), o(tokens * V);
  std::vector<float> x(tokens * K), d_o(tokens * V), dq(tokens * K), dk(tokens * K), dg(tokens);
  std::vector<float> dgk(tokens), d_ridge(tokens);
  for (size_t i = 0; i < tokens; ++i) {
    const bool asks = Batch::asks(static_cast<int64_t>(i) % T);
    for (int64_t c = 0; c < K; ++c) {  // what asks writes nothing: its key is zero
      (asks ? q : k)[i * K + c] = asks ? p.question(batch.symbol[i])[c] : p.key(batch.symbol[i])[c];
    }
    for (int64_t c = 0; c < V && !asks; ++c) v[i * V + c] = batch.value[i * V + c];
    g[i] = -std::exp(p.log_decay());
  }

  kalmanet::GkaOptions options;
  options.scale = 1.0;
  options.ridge_ratio = std::exp(p.log_ridge());
  options.num_iter = kalmanet::kAutoNumIter;
  kalmanet::GkaInputs in;
  in.q = kalmanet::dense(q.data(), {B, T, 1, K});
  in.k = kalmanet::dense(k.data(), {B, T, 1, K});
  in.v = kalmanet::dense(v.data(), {B, T, 1, V});
  in.g = in.gk = kalmanet::dense(g.data(), {B, T, 1});
  kalmanet::GkaOutputs out;
  out.o = kalmanet::dense(o.data(), {B, T, 1, V});
  out.x = kalmanet::dense(x.data(), {B, T, 1, K});  // spares the backward a solve
  kalmanet::gka_forward(in, out, options);

  double loss = 0;
  constexpr double answers = B * kPairs * V;
  for (size_t i = 0; i < tokens; ++i) {
    for (int64_t c = 0; c < V && Batch::asks(static_cast<int64_t>(i) % T); ++c) {
      const float wrong = o[i * V + c] - batch.value[i * V + c];
      loss += 0.5 * wrong * wrong / answers;
      d_o[i * V + c] = static_cast<float>(wrong / answers);
    }
  }

  kalmanet::GkaInputGrads grads;
  grads.dq = kalmanet::dense(dq.data(), {B, T, 1, K});
  grads.dk = kalmanet::dense(dk.data(), {B, T, 1, K});
  grads.dg = kalmanet::dense(dg.data(), {B, T, 1});
  grads.dgk = kalmanet::dense(dgk.data(), {B, T, 1});
  grads.d_ridge_ratio = kalmanet::dense(d_ridge.data(), {B, T, 1});
  kalmanet::GkaOutputGrads output_grads;
  output_grads.d_o = kalmanet::dense(d_o.data(), {B, T, 1, V});
  kalmanet::gka_backward(in, out.x, output_grads, grads, options);

  gradient = {};
  for (size_t i = 0; i < tokens; ++i) {
    for (int64_t c = 0; c < K; ++c) {
      if (Batch::asks(static_cast<int64_t>(i) % T)) {
        gradient.question(batch.symbol[i])[c] += dq[i * K + c];
      } else {
        gradient.key(batch.symbol[i])[c] += dk[i * K + c];
      }
    }
    gradient.log_decay() += (dg[i] + dgk[i]) * g[i];  // d(-e^w)/dw = -e^w
    gradient.log_ridge() += d_ridge[i] * static_cast<float>(options.ridge_ratio);
  }
  return static_cast<float>(loss);
}

// Ten characters for every factor of ten above 1e-5.
std::string bar(float loss) {
  return std::string(static_cast<size_t>(std::max(0.0F, 10 * (5 + std::log10(loss)))), '#');
}

}  // namespace

int main() {
  constexpr int kSteps = 200, kShown = 20;
  constexpr float kRate = 0.5F, kMomentum = 0.9F;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.25F);  // keys of length about 1
  Parameters p, gradient, velocity;
  for (float& e : p.all) e = normal(random);
  p.log_decay() = std::log(0.1F);  // forgets a tenth of what it knows every token
  p.log_ridge() = std::log(0.05F);

  float first = 0, mean = 0;
  for (int step = 1; step <= kSteps; ++step) {
    mean += loss_and_gradient(p, Batch(random), gradient) / kShown;
    for (size_t i = 0; i < p.all.size(); ++i) {
      velocity.all[i] = kMomentum * velocity.all[i] - kRate * gradient.all[i];
      p.all[i] += velocity.all[i];
    }
    if (step % kShown != 0) continue;
    if (step == kShown) first = mean;
    std::printf("step %3d  loss %.5f  ridge %.4f  decay %.4f  %s\n", step, mean,
                std::exp(p.log_ridge()), std::exp(p.log_decay()), bar(mean).c_str());
    if (step != kSteps) mean = 0;
  }
  std::printf("the loss fell to 1/%.0f of where it began\n", first / mean);
  return mean <= first / 100 ? 0 : 1;
}
