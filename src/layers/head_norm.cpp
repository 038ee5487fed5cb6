// The unit norm of queries and keys: an autograd function over torch.ops.kalmanet.unit_norm_*.
#include "layers/head_norm.hpp"

#include <string_view>

#include "layers/find_operator.hpp"

namespace kalmanet::layers {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = Tensor(const Tensor&, std::string_view, double);
using Backward = Tensor(const Tensor&, const Tensor&, std::string_view, double);

Tensor forward_rows(const Tensor& rows, const std::string& kind, double eps) {
  static const auto op = find_operator<Forward>("kalmanet::unit_norm_forward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(rows, kind, eps);
}

class UnitNorm : public torch::autograd::Function<UnitNorm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const std::string& kind,
                        double eps) {
    ctx->save_for_backward({rows});
    ctx->saved_data["kind"] = kind;
    ctx->saved_data["eps"] = eps;
    return forward_rows(rows, kind, eps);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "unit_heads: the backward pass itself is not differentiable; call backward() or "
                "grad() without create_graph");
    static const auto op = find_operator<Backward>("kalmanet::unit_norm_backward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return {op.call(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["kind"].toStringRef(),
                    ctx->saved_data["eps"].toDouble()),
            Tensor(), Tensor()};
  }
};

}  // namespace

Tensor unit_heads(const Tensor& t, const std::string& kind, double eps) {
  if (t.scalar_type() != at::kFloat) return plain_unit_heads(t, kind, eps);
  const Tensor rows = t.reshape({-1, t.size(-1)});
  const bool records = at::GradMode::is_enabled() && rows.requires_grad();
  const Tensor y = records ? UnitNorm::apply(rows, kind, eps) : forward_rows(rows, kind, eps);
  return y.view(t.sizes());
}

Tensor plain_unit_heads(const Tensor& t, const std::string& kind, double eps) {
  if (kind == "fla") return t * at::rsqrt(t.square().sum(-1, true) + eps);
  return t / (at::linalg_vector_norm(t, 2, -1, true) + eps);
}

}  // namespace kalmanet::layers
