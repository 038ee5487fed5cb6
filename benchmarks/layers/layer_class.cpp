// The C++ layer as a class that Python can make, torch.classes.kalmanet_bench.Layer, so that both
// layers run in one process, on one allocator and one clock (benchmarks/python_layer.py).
#include <torch/custom_class.h>
#include <torch/torch.h>

#include <string>
#include <vector>

#include "layers/gated_kalmanet.hpp"

namespace kalmanet::bench {
namespace {

using at::Tensor;

class Layer : public torch::CustomClassHolder {
 public:
  Layer(int64_t D, int64_t H, int64_t kv_heads, int64_t K, std::string solver, bool learned_ridge) {
    layers::GatedKalmaNetOptions options;
    options.hidden_size = D;
    options.num_heads = H;
    options.num_k_heads = kv_heads;
    options.num_v_heads = kv_heads;
    options.head_dim = K;
    options.solver = std::move(solver);
    options.learned_ridge = learned_ridge;
    layer_ = layers::GatedKalmaNet(options);
  }

  Tensor forward(const Tensor& x) { return layer_->forward(x); }

  // By the names that the Python layer has for them too.
  c10::Dict<std::string, Tensor> parameters() const {
    c10::Dict<std::string, Tensor> named;
    for (const auto& item : layer_->named_parameters()) named.insert(item.key(), item.value());
    return named;
  }

 private:
  layers::GatedKalmaNet layer_{nullptr};
};

}  // namespace
}  // namespace kalmanet::bench

TORCH_LIBRARY(kalmanet_bench, m) {
  using kalmanet::bench::Layer;
  m.class_<Layer>("Layer")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, std::string, bool>())
      .def("forward", &Layer::forward)
      .def("parameters", &Layer::parameters);
}
