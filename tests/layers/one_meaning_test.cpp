// GatedKalmaNet has one meaning however a sequence is cut, packed or stepped, and in 16 bits.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

#include "layers/small_layer.hpp"

namespace kalmanet::test {
namespace {

TEST(GatedKalmaNet, AnyCutIsTheWhole) {
  const at::NoGradGuard no_grad;
  for (auto& [name, options] : variants()) {
    GatedKalmaNet layer = make_layer(options);
    const Tensor x = make_input(options, 2, 40);
    GkaLayerState whole;
    const Tensor want = layer->forward(x, {}, &whole);
    // Chunked prefill, a short step, single tokens, a chunked continuation.
    for (const auto& lengths : {std::vector<int64_t>{20, 3, 1, 1, 15}, {1, 1, 1, 37}, {8, 9, 23}}) {
      GkaLayerState state;
      std::vector<Tensor> parts;
      int64_t begin = 0;
      for (const int64_t length : lengths) {
        parts.push_back(layer->forward(x.narrow(1, begin, length), {}, &state));
        begin += length;
      }
      ASSERT_EQ(begin, 40);
      EXPECT_NEAR_RELATIVE(at::cat(parts, 1), want, 1e-5, name + ", output");
      EXPECT_NEAR_RELATIVE(state.h, whole.h, 1e-5, name + ", h");
      EXPECT_NEAR_RELATIVE(state.u, whole.u, 1e-5, name + ", u");
      EXPECT_NEAR_RELATIVE(state.conv_q, whole.conv_q, 1e-5, name + ", conv_q");
      EXPECT_NEAR_RELATIVE(state.conv_k, whole.conv_k, 1e-5, name + ", conv_k");
    }
  }
}

// The fused step and the separate operators, token after token: from a state that as many keys have
// filled as a head has dimensions, and from the first token on. There few directions are known and
// o amplifies what either rounds (docs/numerics.md, section 1), so that the two, each within 1e-5
// of the exact answer, are held to that instead.
TEST(GatedKalmaNet, FusedStepIsTheOperators) {
  const at::NoGradGuard no_grad;
  auto all = variants();
  const auto add = [&](const std::string& name, auto&& change) {
    GatedKalmaNetOptions o = small_options();
    change(o);
    all.emplace_back(name, o);
  };
  add("learned ridge", [](auto& o) { o.learned_ridge = true; });
  add("learned ridge, direct, odd head dims", [](auto& o) {
    o.learned_ridge = true;
    o.solver = "direct";
    o.head_dim = 5;
    o.expand_v = 1.4;
  });
  add("GQA of wide heads", [](auto& o) {
    o.head_dim = 72;
    o.num_k_heads = o.num_v_heads = 1;
  });
  const auto check = [&](at::ScalarType type, int64_t prefill, double bound) {
    for (auto& [name, options] : all) {
      GatedKalmaNetOptions separate_options = options;
      separate_options.fused_step = false;
      GatedKalmaNet fused = make_layer(options, type),
                    separate = make_layer(separate_options, type);
      GatedKalmaNet exact = make_layer(separate_options, at::kDouble);  // the same weights
      GkaLayerState a, b, c;
      if (prefill > 0) {
        fused->forward(make_input(options, 2, prefill, type), {}, &a);
        b = a.clone();
        c = a.clone();
        for (Tensor* t : {&c.h, &c.u, &c.conv_q, &c.conv_k, &c.conv_v}) {
          if (t->defined()) *t = t->to(at::kDouble);
        }
      }
      for (const int64_t T : {1, 6, 1, 3, 1}) {
        const Tensor x = make_input(options, 2, T, type);
        const Tensor got = fused->forward(x, {}, &a), want = separate->forward(x, {}, &b);
        EXPECT_EQ(got.scalar_type(), type);
        // Where a lone token's query hardly meets its key (1e-3 here), o magnifies the last bits of
        // q and k, which differ from processor to processor: the fused step may then be as far from
        // float64 as twice what the operators are.
        const Tensor truth = exact->forward(x.to(at::kDouble), {}, &c);
        const double own = type == at::kFloat ? relative_error(want, truth) : 0.0;
        if (own > bound / 2) {
          EXPECT_NEAR_RELATIVE(got, truth, 2 * own, name + ", output, of float64's");
        } else {
          EXPECT_NEAR_RELATIVE(got, want, bound, name + ", output");
        }
        EXPECT_NEAR_RELATIVE(a.h, b.h, bound, name + ", h");
        EXPECT_NEAR_RELATIVE(a.u, b.u, bound, name + ", u");
        EXPECT_NEAR_RELATIVE(a.conv_q, b.conv_q, bound, name + ", conv_q");
        EXPECT_NEAR_RELATIVE(a.conv_k, b.conv_k, bound, name + ", conv_k");
        if (options.use_v_conv) {
          EXPECT_NEAR_RELATIVE(a.conv_v, b.conv_v, bound, name + ", conv_v");
        }
      }
    }
  };
  check(at::kFloat, 100, 1e-6);
  check(at::kFloat, 0, 1e-5);
  check(at::kDouble, 100, 1e-13);
  check(at::kDouble, 0, 1e-11);
  // What the separate operators are handed in float32 is rounded to bfloat16 by both at the same
  // places, but numbers that differ in the last float32 bit may round apart: by 2^-8 at most.
  check(at::kBFloat16, 100, 0x1p-8);
  check(at::kBFloat16, 0, 0x1p-8);
}

TEST(GatedKalmaNet, StepsReuseTheStatesMemory) {
  const at::NoGradGuard no_grad;
  const GatedKalmaNetOptions options = small_options();
  GatedKalmaNet layer = make_layer(options);
  GkaLayerState state;
  layer->forward(make_input(options, 3, 1), {}, &state);
  const void* h = state.h.data_ptr();
  const GkaLayerState fork = state.clone();
  const Tensor before = fork.h.clone();
  for (int i = 0; i < 3; ++i) layer->forward(make_input(options, 3, 1), {}, &state);
  EXPECT_EQ(state.h.data_ptr(), h);
  EXPECT_TRUE(at::equal(fork.h, before));
  EXPECT_FALSE(at::equal(state.h, before));
  // N=3: H (4x4) and U (4x4) for 2 heads, three convolutions of 8 channels by 4, float32.
  EXPECT_EQ(state.bytes(), 3 * 4 * (2 * (16 + 16) + 3 * 8 * 4));
  EXPECT_EQ(layer->empty_state(3).bytes(), state.bytes());
}

TEST(GatedKalmaNet, PackedIsSeparate) {
  const at::NoGradGuard no_grad;
  const std::vector<int64_t> lengths = {5, 0, 1, 30, 4};
  const Tensor cu = at::tensor({0, 5, 5, 6, 36, 40}, at::kLong);
  for (auto& [name, options] : variants()) {
    GatedKalmaNet layer = make_layer(options);
    const Tensor x = make_input(options, 1, 40), more = make_input(options, 1, 5);
    const Tensor one_each = at::arange(6, at::kLong);
    GkaLayerState packed;
    const Tensor got = layer->forward(x, cu, &packed);
    const Tensor got_more = layer->forward(more, one_each, &packed);  // a packed step
    int64_t begin = 0;
    for (int64_t n = 0; n < 5; ++n) {
      GkaLayerState alone;
      const int64_t length = lengths[static_cast<size_t>(n)];
      if (length > 0) {
        const Tensor want = layer->forward(x.narrow(1, begin, length), {}, &alone);
        EXPECT_NEAR_RELATIVE(got.narrow(1, begin, length), want, 1e-5, name);
      }
      const Tensor want_more = layer->forward(more.narrow(1, n, 1), {}, &alone);
      EXPECT_NEAR_RELATIVE(got_more.narrow(1, n, 1), want_more, 1e-5, name + ", continued");
      EXPECT_NEAR_RELATIVE(packed.h.narrow(0, n, 1), alone.h, 1e-5, name + ", h");
      begin += length;
    }
  }
}

TEST(GatedKalmaNet, GradientsFlowThroughACarriedState) {
  const GatedKalmaNetOptions options = small_options();
  GatedKalmaNet layer = make_layer(options);
  const Tensor x = make_input(options, 1, 24), weights = at::randn({1, 24, 10});
  const Tensor whole = (layer->forward(x) * weights).sum();
  GkaLayerState state;
  const Tensor first = layer->forward(x.narrow(1, 0, 13), {}, &state);
  const Tensor second = layer->forward(x.narrow(1, 13, 11), {}, &state);
  const Tensor cut = (at::cat({first, second}, 1) * weights).sum();
  const auto want = torch::autograd::grad({whole}, layer->parameters());
  const auto got = torch::autograd::grad({cut}, layer->parameters());
  for (size_t i = 0; i < want.size(); ++i) {
    // Chebyshev's truncation enters the gradient through h, of which a cut has one more.
    EXPECT_NEAR_RELATIVE(got[i], want[i], 1e-3, "gradient " + std::to_string(i));
  }
}

TEST(GatedKalmaNet, AStepOnAStateThatAGraphNeedsIsNoticed) {
  const GatedKalmaNetOptions options = small_options();
  GatedKalmaNet layer = make_layer(options);
  GkaLayerState state;
  layer->forward(make_input(options, 1, 9), {}, &state);
  const GkaLayerState saved = state;  // the same tensors: the next call saves them for its backward
  const Tensor y = layer->forward(make_input(options, 1, 9), {}, &state);
  {
    const at::NoGradGuard no_grad;
    GkaLayerState stepped = saved;
    layer->forward(make_input(options, 1, 1), {}, &stepped);
  }
  EXPECT_ERROR(y.sum().backward(), "modified by an inplace operation");
}

TEST(GatedKalmaNet, SixteenBits) {
  const GatedKalmaNetOptions options = small_options();
  GatedKalmaNet wide = make_layer(options), low = make_layer(options, at::kBFloat16);
  {
    const at::NoGradGuard no_grad;  // the same, rounded, parameters in both
    auto from = low->parameters(), to = wide->parameters();
    for (size_t i = 0; i < to.size(); ++i) to[i].copy_(from[i]);
  }
  const Tensor x = make_input(options, 2, 20, at::kBFloat16);
  const Tensor want = wide->forward(x.to(at::kFloat));
  GkaLayerState state;
  const Tensor got = low->forward(x, {}, &state);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_EQ(state.h.scalar_type(), at::kFloat);
  EXPECT_EQ(state.conv_q.scalar_type(), at::kFloat);
  EXPECT_NEAR_RELATIVE(got, want, 3e-2, "bfloat16 parameters");
  got.to(at::kFloat).sum().backward();
  for (const auto& item : low->named_parameters()) {
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_EQ(item.value().grad().scalar_type(), at::kBFloat16) << item.key();
  }
  // Autocast: float32 parameters, bfloat16 products, float32 inside.
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const Tensor mixed = wide->forward(x.to(at::kFloat));
  mixed.to(at::kFloat).sum().backward();
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(mixed.scalar_type(), at::kBFloat16);
  EXPECT_NEAR_RELATIVE(mixed, want, 3e-2, "autocast");
  for (const auto& item : wide->named_parameters()) {
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_EQ(item.value().grad().scalar_type(), at::kFloat) << item.key();
  }
}

}  // namespace
}  // namespace kalmanet::test
