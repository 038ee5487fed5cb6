// What one layer of width 2048 with 16 heads of 128 takes: a token of decode with the fused step
// and operator by operator, turn by turn on one thread; and where a prefill's time goes. The two
// ways to decode are compared before they are timed.
//
//   kalmanet_layer_decode_bench [--quick] [--out FILE]
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "../timing.hpp"
#include "layers/gated_kalmanet.hpp"
#include "layers/head_norm.hpp"
#include "layers/ops.hpp"

namespace kalmanet::bench {
namespace {

using at::Tensor;
using layers::GatedKalmaNet;
using layers::GatedKalmaNetOptions;
using layers::GkaLayerState;

GatedKalmaNet make(const GatedKalmaNetOptions& options, at::ScalarType type) {
  torch::manual_seed(1);
  GatedKalmaNet layer(options);
  layer->to(type);
  return layer;
}

struct Json {
  std::string text;
  void add(const std::string& name, double value) {
    char line[96];
    std::snprintf(line, sizeof line, "%s\"%s\": %.6g", text.empty() ? "" : ", ", name.c_str(),
                  value);
    text += line;
    std::printf("%-28s %10.3f\n", name.c_str(), value);
  }
};

constexpr int kDifferent = 256;

// One token after another from a state that `filled` tokens have left.
void decode(const GatedKalmaNetOptions& base, const std::string& name, at::ScalarType type,
            int64_t filled, int rounds, int tokens, Json& json) {
  GatedKalmaNetOptions separate_options = base;
  separate_options.fused_step = false;
  GatedKalmaNet fused = make(base, type), separate = make(separate_options, type);
  GkaLayerState a;
  fused->forward(at::randn({1, filled, base.hidden_size}).to(type), {}, &a);
  GkaLayerState b = a.clone();
  // Different tokens: the same one again and again would leave a state of one direction, which is
  // solved in float64 (docs/numerics.md).
  const auto inputs = at::randn({kDifferent, 1, 1, base.hidden_size}).to(type).unbind();
  const Tensor& x = inputs[0];
  const Tensor got = fused->forward(x, {}, &a).to(at::kDouble);
  const Tensor want = separate->forward(x, {}, &b).to(at::kDouble);
  const double error = ((got - want).norm() / want.norm()).item<double>();
  if (!(error <= (type == at::kFloat ? 1e-5 : 0x1p-8))) {
    throw std::runtime_error(name + ": refused to time a wrong answer, relative difference " +
                             std::to_string(error));
  }
  // The projections are the same products either way; what is between them is the difference.
  Samples fused_us, separate_us, products_us, ratio;
  std::vector<Tensor> weights;
  for (const auto& item : fused->named_parameters()) {
    if (item.value().dim() == 2) weights.push_back(item.value());
  }
  const Tensor row = x.view({1, base.hidden_size});
  for (int round = 0; round < rounds; ++round) {
    const auto time = [&](const std::function<void(const Tensor&)>& work) {
      return 1e6 / tokens * cpu_seconds_of(Cpu::thread, [&] {
               for (int t = 0; t < tokens; ++t) {
                 work(inputs[static_cast<size_t>(round * tokens + t) % kDifferent]);
               }
             });
    };
    fused_us.add(time([&](const Tensor& token) { fused->forward(token, {}, &a); }));
    separate_us.add(time([&](const Tensor& token) { separate->forward(token, {}, &b); }));
    products_us.add(time([&](const Tensor&) {
      for (const Tensor& w : weights) at::mm(row, w.t());
    }));
    ratio.add(separate_us.values.back() / fused_us.values.back());
  }
  json.add(name + ":fused_us", fused_us.median());
  json.add(name + ":separate_us", separate_us.median());
  json.add(name + ":products_us", products_us.median());
  json.add(name + ":separate_over_fused", ratio.median());
}

// A prefill's parts, by the operators that the layer calls: what fusing them could save at most.
void prefill(const GatedKalmaNetOptions& o, int64_t T, int rounds, Json& json) {
  GatedKalmaNet layer = make(o, at::kFloat);
  const int64_t H = o.num_heads, K = o.head_dim;
  const Tensor x = at::randn({1, T, o.hidden_size}), rows = at::randn({1, T, H * K});
  const Tensor weight = at::randn({H * K, 1, o.conv_size}), heads = at::randn({1, T, H, K});
  const Tensor logits = at::randn({1, T, H}), norm = at::ones({K});
  const Tensor unit = layers::unit_heads(heads), gates = -at::rand({1, T, H}) / 50;
  Samples all, conv, unit_norm, gate, out_norm, core;
  const auto time = [&](Samples& samples, auto&& work) {
    samples.add(1e3 * cpu_seconds_of(Cpu::thread, work));
  };
  layers::GkaOpOptions op;
  op.solver = o.solver;
  for (int round = 0; round < rounds; ++round) {
    GkaLayerState state;
    time(all, [&] { layer->forward(x, {}, &state); });
    time(conv, [&] {
      for (int i = 0; i < 3; ++i) layers::causal_conv(rows, weight, {}, {}, true, true);
    });
    time(unit_norm, [&] {
      for (int i = 0; i < 2; ++i) layers::unit_heads(heads);
    });
    time(gate, [&] {
      at::sigmoid(logits) + 1e-6;
      at::sigmoid(logits);
      at::softplus(logits + logits) * logits;
    });
    time(out_norm, [&] { layers::gated_rms_norm(heads, heads, norm); });
    time(core, [&] { layers::gka(unit, unit, heads, gates, gates, {}, {}, {}, {}, {}, {}, op); });
  }
  const std::string name = "prefill " + o.solver + ":";
  json.add(name + "layer_ms", all.median());
  json.add(name + "gka_ms", core.median());
  json.add(name + "conv_ms", conv.median());
  json.add(name + "unit_norm_ms", unit_norm.median());
  json.add(name + "gates_ms", gate.median());
  json.add(name + "out_norm_ms", out_norm.median());
  const double around = conv.median() + unit_norm.median() + gate.median() + out_norm.median();
  json.add(name + "around_share", around / all.median());
}

void run(int argc, char** argv) {
  bool quick = false;
  std::string out;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--quick") {
      quick = true;
    } else if (word == "--out" && i + 1 < argc) {
      out = argv[++i];
    } else {
      throw std::runtime_error("unknown flag " + word + "; there are --quick and --out FILE");
    }
  }
  at::set_num_threads(1);
  const at::NoGradGuard no_grad;
  GatedKalmaNetOptions o;
  if (quick) {
    o.hidden_size = 64;
    o.num_heads = 2;
    o.head_dim = 32;
  }
  const int rounds = quick ? 2 : 15, tokens = quick ? 2 : 20;
  Json json;
  decode(o, "float32", at::kFloat, quick ? 16 : 512, rounds, tokens, json);
  decode(o, "bfloat16", at::kBFloat16, quick ? 16 : 512, rounds, tokens, json);
  // Nothing solved: what is left is the work around the solver, and the framework's.
  GatedKalmaNetOptions unsolved = o;
  unsolved.fixed_alpha = 0.0;
  decode(unsolved, "float32, alpha 0", at::kFloat, quick ? 16 : 512, rounds, tokens, json);
  for (const char* solver : {"chebyshev", "direct"}) {
    o.solver = solver;
    prefill(o, quick ? 32 : 1024, quick ? 1 : 5, json);
  }
  if (!out.empty()) std::ofstream(out) << "{" << json.text << "}\n";
}

}  // namespace
}  // namespace kalmanet::bench

int main(int argc, char** argv) {
  try {
    kalmanet::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kalmanet_layer_decode_bench: %s\n", error.what());
    return 1;
  }
}
