// GkaOutputs::segment_states: a backward that is given them changes no bit, and does read them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cpu/gka_cases.hpp"
#include "cpu/gka_oracle.hpp"
#include "kalmanet/executor.hpp"
#include "support/expect.hpp"

namespace kalmanet::testing {
namespace {

// Room for a Case's segment states, slots apart by more than their size; NaN until written.
template <class S>
struct Kept {
  std::vector<S> memory;
  View view;
  int64_t gap;

  explicit Kept(const CaseSpec& spec, int64_t gap_ = 5) : gap(gap_) {
    const int64_t slots = spec.T / kSegmentTokens, size = gka_segment_state_size(spec.K, spec.V);
    memory.assign(static_cast<size_t>(spec.B * spec.H * slots * (size + gap)),
                  std::numeric_limits<S>::quiet_NaN());
    view.data = slots > 0 ? memory.data() : nullptr;
    view.dtype = DTypeOf<S>::value;
    view.rank = 4;
    view.size = {spec.B, spec.H, slots, size};
    view.stride = {spec.H * slots * (size + gap), slots * (size + gap), size + gap, 1};
  }
  bool gaps_intact() const {
    const int64_t size = view.size[3];
    for (int64_t i = 0; i < std::ssize(memory); ++i) {
      if (i % (size + gap) >= size && !std::isnan(memory[static_cast<size_t>(i)])) return false;
    }
    return true;
  }
};

std::vector<CaseSpec> specs() {
  CaseSpec base;
  base.K = 20;
  base.V = 9;
  base.g = base.gk = base.alpha = base.beta = base.ridge_tensor = true;
  base.seed = 41;
  std::vector<CaseSpec> all;
  for (int64_t T : {511, 512, 513, 1300}) {
    CaseSpec s = base;
    s.B = 2;
    s.H = 2;
    s.T = T;
    s.h0 = s.u0 = T == 1300;
    all.push_back(s);
  }
  CaseSpec packed = base;
  packed.lengths = {600, 0, 1, 513, 512, 30, 1025};
  packed.H = 4;
  packed.Hk = 2;
  packed.Hv = 1;
  packed.strided = true;
  all.push_back(packed);
  CaseSpec alone = base;  // one head: cut over its chunks
  alone.H = 1;
  alone.T = 1100;
  all.push_back(alone);
  return all;
}

template <class T>
void check(CaseSpec spec, Solver solver, int64_t chunk_size, int threads, bool saved_x) {
  using G = std::conditional_t<kIsHalf<T>, float, T>;
  using S = StateOf<T>;
  GkaOptions options;
  options.solver = solver;
  options.num_iter = solver == Solver::chebyshev ? 12 : 30;
  options.chunk_size = chunk_size;
  const auto executor = make_executor(threads);
  options.executor = executor.get();
  const Where where{std::string("segment states, ") + name(DTypeOf<T>::value) + " " + name(solver) +
                        ", chunk " + std::to_string(chunk_size) + ", " + std::to_string(threads) +
                        " threads" + (saved_x ? ", saved x" : ""),
                    name(instruction_set()), describe(spec)};
  Case<T, G> without(spec), with(spec);
  Kept<S> kept(with.spec);
  const auto run = [&](Case<T, G>& c, bool states) {
    GkaOutputs out = c.outputs();
    if (states) out.segment_states = kept.view;
    gka_forward(c.inputs(), out, options);
    const ConstView x = saved_x ? ConstView(c.x.view()) : ConstView();
    const GkaSaved saved{x, states ? ConstView(kept.view) : ConstView()};
    gka_backward(c.inputs(), saved, c.output_grads(), c.grads(), options);
  };
  run(without, false);
  run(with, true);
  const auto same = [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(identical(where, tensor, a, b));
  };
  for_each_output(with, without, same);
  for_each_gradient(with, without, same);
  EXPECT_TRUE(kept.gaps_intact()) << text(where, "segment_states: gaps between slots written");

  if (with.spec.lengths.empty() && spec.T > kSegmentTokens) {
    // It is they that are read: other states, other gradients.
    std::fill(kept.memory.begin(), kept.memory.end(), S{0});
    with.clear_results();
    const ConstView x = saved_x ? ConstView(without.x.view()) : ConstView();
    gka_backward(with.inputs(), {x, kept.view}, with.output_grads(), with.grads(), options);
    EXPECT_FALSE(identical(where, "dk", with.dk.view(), without.dk.view()))
        << text(where, "segment_states: not read");
  }
}

TEST(SegmentStates, ChangeNoBitOfTheGradients) {
  for (InstructionSet isa : available_instruction_sets()) {
    const ForcedInstructionSet forced(isa);
    for (const CaseSpec& spec : specs()) {
      check<float>(spec, Solver::direct, 0, 1, true);
      check<float>(spec, Solver::chebyshev, 8, 3, false);
    }
    check<double>(specs()[3], Solver::direct, 4, 2, false);
    check<double>(specs()[4], Solver::chebyshev, 16, 1, true);
    check<BFloat16>(specs()[4], Solver::direct, 256, 3, true);
    check<float>(specs()[3], Solver::cg, 1, 2, true);
  }
}

}  // namespace
}  // namespace kalmanet::testing
