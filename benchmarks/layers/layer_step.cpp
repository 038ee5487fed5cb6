// One training step (forward and backward) of GatedKalmaNet beside a plain gated-linear-attention
// layer of the same widths, turn by turn in one process. Before anything is timed the peer's core
// is compared with our operator at alpha = 0, which computes the same.
//
//   kalmanet_layer_bench [--quick] [--spoil] [--threads N] [--rounds N] [--out FILE]
#include <malloc.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../timing.hpp"
#include "gla_layer.hpp"
#include "layers/gated_kalmanet.hpp"
#include "layers/ops.hpp"

namespace kalmanet::bench {
namespace {

using at::Tensor;

constexpr double kSeconds = 60;  // no new round after that

struct Arguments {
  bool quick = false, spoil = false;
  int threads = 2, rounds = 5;
  std::string out;
};

Arguments parse(const std::vector<std::string>& words) {
  Arguments a;
  for (size_t i = 0; i < words.size(); ++i) {
    const auto value = [&]() -> const std::string& {
      if (i + 1 == words.size()) throw std::runtime_error(words[i] + " needs a value");
      return words[++i];
    };
    if (words[i] == "--quick") {
      a.quick = true;
    } else if (words[i] == "--spoil") {
      a.spoil = true;
    } else if (words[i] == "--threads") {
      a.threads = std::max(1, std::stoi(value()));
    } else if (words[i] == "--rounds") {
      a.rounds = std::max(1, std::stoi(value()));
    } else if (words[i] == "--out") {
      a.out = value();
    } else {
      throw std::runtime_error("unknown flag " + words[i] +
                               "; there are --quick, --spoil, --threads N, --rounds N, --out FILE");
    }
  }
  return a;
}

// The peer's core and its gradients against our operator with alpha = 0.
void check_core(bool spoil) {
  const int64_t T = 192, H = 2, K = 64;
  torch::manual_seed(1);
  std::vector<Tensor> leaves = {
      torch::nn::functional::normalize(torch::randn({1, T, H, K}),
                                       torch::nn::functional::NormalizeFuncOptions().dim(-1)),
      torch::nn::functional::normalize(torch::randn({1, T, H, K}),
                                       torch::nn::functional::NormalizeFuncOptions().dim(-1)),
      torch::randn({1, T, H, K}), -0.1 * torch::rand({1, T, H}), torch::rand({1, T, H})};
  for (Tensor& leaf : leaves) leaf.requires_grad_();
  const Tensor d_o = torch::randn({1, T, H, K});
  const auto results = [&](const Tensor& o) {
    std::vector<Tensor> all = torch::autograd::grad({o}, leaves, {d_o});
    all.push_back(o);
    return all;
  };
  layers::GkaOpOptions one_step;
  one_step.num_iter = 1;
  const auto want =
      results(layers::gka(leaves[0], leaves[1], leaves[2], leaves[3], {}, torch::zeros({1, T, H}),
                          leaves[4], {}, {}, {}, {}, one_step)
                  .o);
  const auto got = results(chunked_gla(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4]));
  const char* names[] = {"dq", "dk", "dv", "dg", "dbeta", "o"};
  for (size_t i = 0; i < got.size(); ++i) {
    const Tensor difference = got[i] * (spoil ? 1.001 : 1.0) - want[i];
    const double error = (difference.norm() / want[i].norm()).item<double>();
    if (!(error <= 2e-5)) {
      char text[160];
      std::snprintf(text, sizeof text,
                    "refused to time a wrong answer: %s of gated linear attention differs by %.2e "
                    "(at most 2e-5 allowed)",
                    names[i], error);
      throw std::runtime_error(text);
    }
  }
  std::fprintf(stderr, "gate passed: gated linear attention agrees with the operator at alpha 0\n");
}

struct Case {
  std::string name;
  std::function<Tensor(const Tensor&)> forward;
  std::function<void()> zero_grad;
  Samples ms, ratio, one_ms, one_ratio;
};

template <class Layer>
Case make_case(const std::string& name, Layer layer) {
  return {name,
          [layer](const Tensor& x) mutable { return layer->forward(x); },
          [layer]() mutable { layer->zero_grad(); },
          {},
          {},
          {},
          {}};
}

std::vector<Case> make_cases(int64_t D, int64_t H, int64_t K) {
  const auto gka = [&](const char* solver, bool learned) {
    layers::GatedKalmaNetOptions options;
    options.hidden_size = D;
    options.num_heads = H;
    options.head_dim = K;
    options.solver = solver;
    options.learned_ridge = learned;
    return layers::GatedKalmaNet(options);
  };
  std::vector<Case> cases;
  torch::manual_seed(2);
  cases.push_back(make_case("gated linear attention", GlaLayer(GlaLayerOptions{D, H, K, 4})));
  cases.push_back(make_case("direct, learned ridge", gka("direct", true)));
  cases.push_back(make_case("direct", gka("direct", false)));
  cases.push_back(make_case("chebyshev(30)", gka("chebyshev", false)));
  return cases;
}

// A step; returns the gradient of x, so that the whole backward has run.
void step(Case& c, const Tensor& x, const Tensor& d_y) {
  c.zero_grad();
  x.mutable_grad() = Tensor();
  c.forward(x).backward(d_y);
}

void write(const Arguments& a, const std::vector<Case>& cases, int64_t T, int64_t D, int64_t H,
           int64_t K) {
  std::ofstream file(a.out);
  if (!file) throw std::runtime_error("cannot write " + a.out);
  file << "{\"threads\": " << a.threads << ", \"T\": " << T << ", \"D\": " << D << ", \"H\": " << H
       << ", \"K\": " << K << ", \"cases\": [";
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    file << (i == 0 ? "\n" : ",\n") << "  {\"name\": \"" << c.name
         << "\", \"ms\": " << c.ms.median() << ", \"ms_min\": " << c.ms.min()
         << ", \"ms_max\": " << c.ms.max() << ", \"ratio\": " << c.ratio.median()
         << ", \"ratio_min\": " << c.ratio.min() << ", \"ratio_max\": " << c.ratio.max()
         << ", \"one_ms\": " << c.one_ms.median() << ", \"one_ratio\": " << c.one_ratio.median()
         << "}";
  }
  file << "\n]}\n";
}

void run(const Arguments& a) {
  // Keep freed memory, as a training run's allocator does: glibc would give every large tensor back
  // to the system, and fresh pages cost both layers alike.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  at::set_num_threads(1);
  check_core(a.spoil);
  const int64_t T = a.quick ? 128 : 2048, D = a.quick ? 128 : 2048, H = a.quick ? 2 : 16,
                K = a.quick ? 64 : 128;
  std::vector<Case> cases = make_cases(D, H, K);
  Tensor x = torch::randn({1, T, D}).requires_grad_();
  const Tensor d_y = torch::randn({1, T, D});
  for (Case& c : cases) step(c, x, d_y);  // allocations are not timed
  const auto one_round = [&](auto&& seconds, Samples Case::* ms, Samples Case::* ratio) {
    double peer = 0;
    for (Case& c : cases) {
      const double spent = seconds([&] { step(c, x, d_y); });
      if (peer == 0) peer = spent;
      (c.*ms).add(1e3 * spent);
      (c.*ratio).add(spent / peer);
    }
  };
  const auto rounds = [&](int count, auto&& seconds, Samples Case::* ms, Samples Case::* ratio) {
    // OpenMP's threads wait for each other after every operation: on a machine that is busy with
    // other work a round can take ten times as long.
    double elapsed = 0;
    for (int round = 0; round < count && elapsed < kSeconds; ++round) {
      elapsed += seconds_of([&] { one_round(seconds, ms, ratio); });
    }
  };
  // Autograd runs the backward on the thread that asked for it, as all tensors are on the CPU.
  rounds(
      a.quick ? 1 : 3, [](auto&& work) { return cpu_seconds_of(Cpu::process, work); },
      &Case::one_ms, &Case::one_ratio);
  at::set_num_threads(a.threads);
  for (Case& c : cases) step(c, x, d_y);  // starts the threads
  rounds(
      a.quick ? 1 : a.rounds, [](auto&& work) { return seconds_of(work); }, &Case::ms,
      &Case::ratio);
  for (const Case& c : cases) {
    std::printf("%-24s %8.1f ms, %.2f times gated linear attention; one thread %.1f ms, %.2f\n",
                c.name.c_str(), c.ms.median(), c.ratio.median(), c.one_ms.median(),
                c.one_ratio.median());
  }
  if (!a.out.empty()) write(a, cases, T, D, H, K);
}

}  // namespace
}  // namespace kalmanet::bench

int main(int argc, char** argv) {
  try {
    kalmanet::bench::run(kalmanet::bench::parse({argv + 1, argv + argc}));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kalmanet_layer_bench: %s\n", error.what());
    return 1;
  }
}
