// The layer's mathematics written once more, token by token in plain LibTorch, for the tests: no
// operator of the project is called, every line is differentiable by PyTorch's own autograd.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace kalmanet::test {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct PlainResult {
  Tensor o, h, u;
};

// x = (h + shift I)^-1 q for one head; num_iter = 0: exactly, else that many Chebyshev steps.
inline Tensor plain_solve(const Tensor& h, const Tensor& shift, const Tensor& f, const Tensor& q,
                          int64_t num_iter) {
  if (num_iter == 0) {
    const Tensor system = h + shift * at::eye(h.size(0), h.options());
    return at::linalg_solve(system, q);
  }
  const Tensor step = 2 / (2 * shift + f);
  const Tensor rho2 = (f / (2 * shift + f) / 2).square();
  Tensor previous = at::zeros_like(q), x = step * q, w = at::full({}, 2, q.options());
  for (int64_t i = 0; i < num_iter; ++i) {
    w = 1 / (1 - rho2 * w);
    const Tensor next = w * x - step * w * (at::mv(h, x) + shift * x - q) - (w - 1) * previous;
    previous = x;
    x = next;
  }
  return x;
}

// [B,T,heads,..] with each head repeated to H of them.
inline Tensor expand_heads(const Tensor& t, int64_t H) {
  return t.repeat_interleave(H / t.size(2), 2);
}

// One batch of equally long sequences; gates [B,T,H] each optional, ridge [B,T,H] required.
inline PlainResult plain_gka(Tensor q, Tensor k, Tensor v, const OptionalTensor& g,
                             const OptionalTensor& gk, const OptionalTensor& alpha,
                             const OptionalTensor& beta, const Tensor& ridge,
                             const OptionalTensor& h0, const OptionalTensor& u0, double scale,
                             int64_t num_iter) {
  const int64_t B = q.size(0), T = q.size(1), K = q.size(3), V = v.size(3);
  const int64_t H = std::max({q.size(2), k.size(2), v.size(2)});
  q = expand_heads(q, H);
  k = expand_heads(k, H);
  v = expand_heads(v, H);
  const auto at_token = [](const Tensor& t, int64_t b, int64_t i, int64_t h) {
    return t.select(0, b).select(0, i).select(0, h);
  };
  std::vector<Tensor> outs, hs, us;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t head = 0; head < H; ++head) {
      Tensor h = h0 ? h0->select(0, b).select(0, head) : at::zeros({K, K}, q.options());
      Tensor u = u0 ? u0->select(0, b).select(0, head) : at::zeros({K, V}, q.options());
      for (int64_t t = 0; t < T; ++t) {
        const auto gate = [&](const OptionalTensor& value) {
          return value ? at_token(*value, b, t, head) : at::ones({}, q.options());
        };
        const Tensor kt = gate(beta) * at_token(k, b, t, head);
        const Tensor vt = gate(beta) * at_token(v, b, t, head);
        const Tensor qt = at_token(q, b, t, head);
        h = (gk ? gate(gk).exp() : gate(gk)) * h + at::outer(kt, kt);
        u = (g ? gate(g).exp() : gate(g)) * u + at::outer(kt, vt);
        const Tensor f = h.square().sum().sqrt();
        const Tensor x = plain_solve(h, at_token(ridge, b, t, head) * f, f, qt, num_iter);
        outs.push_back(scale * at::mv(u.t(), qt + gate(alpha) * (x - qt)));
      }
      hs.push_back(h);
      us.push_back(u);
    }
  }
  return {at::stack(outs).view({B, H, T, V}).transpose(1, 2), at::stack(hs).view({B, H, K, K}),
          at::stack(us).view({B, H, K, V})};
}

inline double relative_error(const Tensor& got, const Tensor& want) {
  const Tensor reference = want.detach().to(at::kDouble);
  const double norm = reference.norm().item<double>();
  return (got.detach().to(at::kDouble) - reference).norm().item<double>() / std::max(norm, 1e-30);
}

}  // namespace kalmanet::test

// Fails with the operation's name, the error and the bound.
#define EXPECT_NEAR_RELATIVE(got, want, bound, what)                                               \
  do {                                                                                             \
    ASSERT_EQ((got).sizes(), (want).sizes()) << (what);                                            \
    const double error_ = ::kalmanet::test::relative_error((got), (want));                         \
    EXPECT_LE(error_, (bound)) << (what) << ": relative error " << error_ << ", bound " << (bound) \
                               << ", shape " << (want).sizes();                                    \
  } while (false)

// Expects `statement` to throw a std::exception whose message contains `part`.
#define EXPECT_ERROR(statement, part)                                         \
  do {                                                                        \
    std::string message_ = "no exception";                                    \
    try {                                                                     \
      statement;                                                              \
    } catch (const std::exception& error) {                                   \
      message_ = error.what();                                                \
    }                                                                         \
    EXPECT_NE(message_.find(part), std::string::npos)                         \
        << "expected a message with \"" << (part) << "\", got: " << message_; \
  } while (false)
