// One pass over the rows, forward and backward: LibTorch's operators need three and eight.
#include "layers/head_norm.hpp"

#include <ATen/Parallel.h>

#include <cmath>

namespace kalmanet::layers {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows of this many elements together are worth a thread of their own.
constexpr int64_t kElementsPerTask = 16384;

// Eight partial sums: the compiler may then use vectors without changing the order of additions.
float dot(const float* a, const float* b, int64_t n) {
  float sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sums[i % 8] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// f(row) for each of the rows, spread over PyTorch's threads.
template <class F>
void for_rows(int64_t rows, int64_t width, const F& f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / width),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) f(row);
                   });
}

bool fast(const Tensor& t) {
  return t.device().is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() > 0;
}

Tensor forward_rows(const Tensor& t, float eps) {
  Tensor y = at::empty_like(t);
  const int64_t width = t.size(-1);
  const float* in = t.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  for_rows(t.numel() / width, width, [=](int64_t row) {
    const float* a = in + row * width;
    const float inverse = 1 / (std::sqrt(dot(a, a, width)) + eps);
    for (int64_t i = 0; i < width; ++i) out[row * width + i] = a[i] * inverse;
  });
  return y;
}

// With n = |t|, s = n + eps:  dt = dy / s - t (t . dy) / (n s^2).
Tensor backward_rows(const Tensor& t, const Tensor& dy, float eps) {
  Tensor dt = at::empty_like(t);
  const int64_t width = t.size(-1);
  const float *in = t.const_data_ptr<float>(), *grad = dy.const_data_ptr<float>();
  float* out = dt.mutable_data_ptr<float>();
  for_rows(t.numel() / width, width, [=](int64_t row) {
    const float *a = in + row * width, *g = grad + row * width;
    const float norm = std::sqrt(dot(a, a, width));
    const float inverse = 1 / (norm + eps);
    const float along = norm > 0 ? dot(a, g, width) * inverse * inverse / norm : 0;
    for (int64_t i = 0; i < width; ++i) out[row * width + i] = g[i] * inverse - a[i] * along;
  });
  return dt;
}

class UnitHeads : public torch::autograd::Function<UnitHeads> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& t, double eps) {
    ctx->save_for_backward({t});
    ctx->saved_data["eps"] = eps;
    return forward_rows(t, static_cast<float>(eps));
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "unit_heads: the backward pass itself is not differentiable; call backward() or "
                "grad() without create_graph");
    const Tensor t = ctx->get_saved_variables()[0];
    const Tensor dy = grads[0].contiguous();
    return {backward_rows(t, dy, static_cast<float>(ctx->saved_data["eps"].toDouble())), Tensor()};
  }
};

}  // namespace

Tensor unit_heads(const Tensor& t, double eps) {
  if (!fast(t)) return t / (at::linalg_vector_norm(t, 2, -1, true) + eps);
  if (at::GradMode::is_enabled() && t.requires_grad()) return UnitHeads::apply(t, eps);
  return forward_rows(t, static_cast<float>(eps));
}

}  // namespace kalmanet::layers
