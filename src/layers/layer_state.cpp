// What one layer keeps of a sequence: its size, and a copy of it.
#include "layers/gated_kalmanet.hpp"

namespace kalmanet::layers {

using at::Tensor;

int64_t GkaLayerState::bytes() const {
  int64_t total = 0;
  for (const Tensor* t : {&h, &u, &conv_q, &conv_k, &conv_v}) {
    if (t->defined()) total += t->numel() * t->element_size();
  }
  return total;
}

GkaLayerState GkaLayerState::clone() const {
  const auto copy = [](const Tensor& t) { return t.defined() ? t.clone() : t; };
  return {copy(h), copy(u), copy(conv_q), copy(conv_k), copy(conv_v)};
}

}  // namespace kalmanet::layers
