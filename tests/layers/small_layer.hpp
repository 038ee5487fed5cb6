// Layers small enough to be computed again token by token, and the variants that tests go through.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "layers/gated_kalmanet.hpp"
#include "layers/plain_gka.hpp"

namespace kalmanet::test {

using layers::GatedKalmaNet;
using layers::GatedKalmaNetOptions;
using layers::GkaLayerState;

inline constexpr int64_t kSeed = 20261123;

inline GatedKalmaNetOptions small_options() {
  GatedKalmaNetOptions o;
  o.hidden_size = 10;
  o.head_dim = 4;
  o.num_heads = 2;
  return o;
}

// Makes the layer from a fixed seed; its norm weight is moved off 1, and a learned ridge's weight
// off 0, so that they matter. One thread: on tensors this small a second one only waits.
inline GatedKalmaNet make_layer(const GatedKalmaNetOptions& options,
                                at::ScalarType type = at::kFloat) {
  at::set_num_threads(1);
  torch::manual_seed(kSeed);
  GatedKalmaNet layer(options);
  const at::NoGradGuard no_grad;
  auto parameters = layer->named_parameters();
  parameters["o_norm.weight"].uniform_(0.5, 1.5);
  if (options.learned_ridge) parameters["ridge_proj.weight"].uniform_(-0.3, 0.3);
  layer->to(type);
  return layer;
}

inline Tensor make_input(const GatedKalmaNetOptions& options, int64_t B, int64_t T,
                         at::ScalarType type = at::kFloat) {
  return at::randn({B, T, options.hidden_size}, at::kDouble).to(type);
}

inline std::vector<std::pair<std::string, GatedKalmaNetOptions>> variants() {
  std::vector<std::pair<std::string, GatedKalmaNetOptions>> all;
  const auto add = [&](const std::string& name, auto&& change) {
    GatedKalmaNetOptions o = small_options();
    change(o);
    all.emplace_back(name, o);
  };
  add("defaults", [](auto&) {});
  add("GQA", [](auto& o) {
    o.num_heads = 4;
    o.num_k_heads = o.num_v_heads = 2;
  });
  add("GVA", [](auto& o) { o.num_v_heads = 4; });
  add("all head counts differ", [](auto& o) {
    o.num_heads = 4;
    o.num_k_heads = 1;
    o.num_v_heads = 2;
  });
  add("expand_v", [](auto& o) { o.expand_v = 1.5; });
  add("fla norm", [](auto& o) { o.qk_norm = "fla"; });
  add("U decays alone", [](auto& o) { o.use_forgetting_gate_kk = false; });
  add("no decay", [](auto& o) { o.use_forgetting_gate = false; });
  add("no alpha", [](auto& o) { o.use_alpha_connection = false; });
  add("alpha fixed at 0", [](auto& o) { o.fixed_alpha = 0.0; });
  add("alpha fixed at 0.3", [](auto& o) { o.fixed_alpha = 0.3; });
  add("alpha fixed at 1", [](auto& o) { o.fixed_alpha = 1.0; });
  add("no beta, gate or v convolution",
      [](auto& o) { o.use_beta_gate = o.use_gate = o.use_v_conv = false; });
  add("unscaled, other ridge and window", [](auto& o) {
    o.gla_rescale = false;
    o.ridge_ratio = 0.1;
    o.conv_size = 2;
  });
  return all;
}

}  // namespace kalmanet::test
