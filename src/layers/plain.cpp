// The convolution and the norm in plain LibTorch.
#include "layers/plain.hpp"

#include <vector>

namespace kalmanet::layers {

ConvResult plain_causal_conv(const at::Tensor& x, const at::Tensor& weight,
                             const OptionalTensor& state, const OptionalTensor& cu_seqlens,
                             bool silu, bool want_final_state) {
  const int64_t D = x.size(2), W = weight.size(-1);
  const at::Tensor kernel = weight.reshape({D, 1, W});
  // One run of equally long sequences: x [N,T,D], before [N,D,W] the inputs in front of it.
  const auto convolve = [&](const at::Tensor& tokens, const at::Tensor& before) -> ConvResult {
    const at::Tensor padded = at::cat({before, tokens.transpose(1, 2)}, 2);  // [N,D,W+T]
    const int64_t T = tokens.size(1);
    at::Tensor y = T == 0
                       ? tokens
                       : at::conv1d(padded.narrow(2, 1, W - 1 + T), kernel, OptionalTensor(),
                                    at::IntArrayRef{1}, at::IntArrayRef{0}, at::IntArrayRef{1}, D)
                             .transpose(1, 2);
    return {silu ? at::silu(y) : y, padded.narrow(2, T, W)};
  };
  const int64_t N = cu_seqlens ? cu_seqlens->numel() - 1 : x.size(0);
  const at::Tensor before = state ? *state : at::zeros({N, D, W}, x.options());
  ConvResult result;
  if (!cu_seqlens) {
    result = convolve(x, before);
  } else {
    std::vector<at::Tensor> ys, states;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t begin = (*cu_seqlens)[n].item<int64_t>();
      const int64_t end = (*cu_seqlens)[n + 1].item<int64_t>();
      const ConvResult one = convolve(x.narrow(1, begin, end - begin), before.narrow(0, n, 1));
      ys.push_back(one.y);
      states.push_back(one.final_state);
    }
    result = {at::cat(ys, 1), at::cat(states, 0)};
  }
  if (!want_final_state) result.final_state = at::Tensor();
  return result;
}

at::Tensor plain_gated_rms_norm(const at::Tensor& o, const OptionalTensor& gate,
                                const at::Tensor& weight, double eps) {
  const at::Tensor y = o * at::rsqrt(o.square().mean(-1, true) + eps) * weight;
  return gate ? y * at::silu(*gate) : y;
}

}  // namespace kalmanet::layers
