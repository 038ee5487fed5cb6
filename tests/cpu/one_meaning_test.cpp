// DESIGN's first promise on the CPU kernels: whole = split = step by step = packed = any chunk
// size, and the same bits for any number of threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/gka_cases.hpp"
#include "cpu/gka_oracle.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/expect.hpp"
#include "support/slices.hpp"

namespace kalmanet::testing {
namespace {

// Between two ways to compute the same: the arithmetic (float64's as kOutputBound says), and where
// 16-bit results are rounded, now and then to neighbours: at most one step apart.
template <class T>
constexpr double bound() {
  if (kIsHalf<T>) return 1e-5 + kRoundoff<T>;
  return std::is_same_v<T, double> ? 1e-12 : 1e-5;
}

// Chebyshev and direct take turns.
template <class T>
GkaOptions options_of(const CaseSpec& spec) {
  GkaOptions options = Case<T>(spec).options();
  options.solver = spec.seed % 4 < 2 ? Solver::direct : Solver::chebyshev;
  options.tolerance = kDtypeTolerance;
  return options;
}

// `count` threads' worth of tasks, each on a thread of its own, started in reverse order.
class ManyThreads final : public Executor {
 public:
  explicit ManyThreads(int count) : count_(count) {}
  int concurrency() const noexcept override { return count_; }
  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    std::vector<std::thread> threads;
    for (int w = count_ - 1; w >= 0; --w) {
      threads.emplace_back([&, w] {
        for (int64_t i = n - 1 - w; i >= 0; i -= count_) task(i);
      });
    }
    for (std::thread& t : threads) t.join();
  }

 private:
  int count_;
};

CaseSpec random_spec(Random& random, uint64_t seed) {
  CaseSpec spec;
  spec.B = random.integer(1, 2);
  spec.T = random.integer(1, 150);
  spec.H = random.integer(1, 3);
  spec.K = random.integer(1, 40);
  spec.V = random.integer(1, 40);
  set_gates(spec, static_cast<int>(random.integer(0, 63)));
  spec.h0 = random.coin();
  spec.u0 = random.coin();
  spec.strided = random.coin();
  spec.memory = random.coin() ? 20 : 500;
  const double ridges[] = {0.1, 0.02, 0.005};
  spec.ridge_ratio = ridges[random.integer(0, 2)];
  spec.seed = seed;
  return spec;
}

// The outputs of `c` computed piece by piece: pieces[i] tokens by the forward, or by the step if
// negative.
template <class T>
void run_pieces(Case<T>& c, const std::vector<int64_t>& pieces, const GkaOptions& options) {
  int64_t at = 0;
  bool first = true;
  for (int64_t piece : pieces) {
    const int64_t n = std::abs(piece);
    GkaInputs in = tokens(c.inputs(), at, at + n);
    GkaOutputs out = c.outputs();
    out.o = tokens(out.o, at, at + n);
    out.x = tokens(out.x, at, at + n);
    out.residual = tokens(out.residual, at, at + n);
    if (!first) {  // continue in place
      in.h0 = out.h_final;
      in.u0 = out.u_final;
    }
    piece > 0 ? gka_forward(in, out, options) : gka_step(in, out, options);
    at += n;
    first = false;
  }
}

template <class T>
std::string how_text(const char* how) {
  return std::string(how) + " " + name(DTypeOf<T>::value);
}

template <class T>
void expect_same_outputs(const char* how, const CaseSpec& spec, const Case<T>& got,
                         const Case<T>& whole, Solver solver) {
  const Where where{how_text<T>(how), name(instruction_set()), describe(spec)};
  for_each_output(got, whole, [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(within(where, tensor, a, b, bound<T>() + solver_slack<T>(solver)));
  });
}

template <class T>
void whole_equals_pieces(uint64_t seeds) {
  Random random(20);
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
    const CaseSpec spec = random_spec(random, seed);
    const GkaOptions options = options_of<T>(spec);
    Case<T> whole(spec), split(spec), steps(spec), chunks(spec);
    gka_forward(whole.inputs(), whole.outputs(), options);

    std::vector<int64_t> pieces;  // prefill, continuations and runs of single steps
    for (int64_t left = spec.T; left > 0;) {
      const int64_t n = std::min(left, random.integer(1, 40));
      pieces.push_back(random.coin() ? n : -n);
      left -= n;
    }
    run_pieces(split, pieces, options);
    expect_same_outputs("split", spec, split, whole, options.solver);

    run_pieces(steps, std::vector<int64_t>(static_cast<size_t>(spec.T), -1), options);
    expect_same_outputs("token by token", spec, steps, whole, options.solver);

    GkaOptions other = options;
    other.chunk_size = random.integer(1, 20);
    gka_forward(chunks.inputs(), chunks.outputs(), other);
    expect_same_outputs("another chunk size", spec, chunks, whole, options.solver);
  }
}

TEST(OneMeaning, WholeEqualsAnySplitAndTokenByToken) {
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    for_each_dtype([]<class T>(T) { whole_equals_pieces<T>(std::is_same_v<T, float> ? 120 : 40); });
  }
}

template <class T>
void packed_equals_separate(uint64_t seeds) {
  Random random(21);
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
    CaseSpec spec = random_spec(random, 500 + seed);
    spec.lengths.clear();
    for (int64_t i = random.integer(1, 5); i > 0; --i)
      spec.lengths.push_back(random.integer(0, 40));
    if (seed % 4 == 0) {
      spec.H = 4;
      spec.Hk = 2;
      spec.Hv = 1;
    }
    Case<T> packed(spec), apart(spec);
    const GkaOptions options = options_of<T>(spec);
    gka_forward(packed.inputs(), packed.outputs(), options);
    gka_backward(packed.inputs(), packed.x.view(), packed.output_grads(), packed.grads(), options);
    for (size_t n = 0; n < spec.lengths.size(); ++n) {
      const int64_t begin = apart.cu_seqlens[n], end = apart.cu_seqlens[n + 1];
      const auto state = [&](auto view) {
        if (!view.defined()) return view;
        const int64_t offset = size_of(view.dtype) * view.stride[0] * static_cast<int64_t>(n);
        using Byte =
            std::conditional_t<std::is_same_v<decltype(view), ConstView>, const char, char>;
        view.data = static_cast<Byte*>(view.data) + offset;
        view.size[0] = 1;
        return view;
      };
      GkaInputs in = tokens(apart.inputs(), begin, end);
      in.cu_seqlens = {};
      in.h0 = state(in.h0);
      in.u0 = state(in.u0);
      GkaOutputs out = apart.outputs();
      out.o = tokens(out.o, begin, end);
      out.x = tokens(out.x, begin, end);
      out.residual = tokens(out.residual, begin, end);
      out.h_final = state(out.h_final);
      out.u_final = state(out.u_final);
      gka_forward(in, out, options);
      GkaOutputGrads dout = apart.output_grads();
      dout.d_o = tokens(dout.d_o, begin, end);
      dout.d_h_final = state(dout.d_h_final);
      dout.d_u_final = state(dout.d_u_final);
      GkaInputGrads din = apart.grads();
      for (View* v : {&din.dq, &din.dk, &din.dv, &din.dg, &din.dgk, &din.dalpha, &din.dbeta,
                      &din.d_ridge_ratio}) {
        *v = tokens(*v, begin, end);
      }
      din.d_h0 = state(din.d_h0);
      din.d_u0 = state(din.d_u0);
      gka_backward(in, out.x, dout, din, options);
    }
    // Chunks start where their sequence does, packed or not: the same bits.
    const Where where{how_text<T>("packed"), name(instruction_set()), describe(spec)};
    const auto same = [&](const char* tensor, ConstView a, ConstView b) {
      EXPECT_TRUE(identical(where, tensor, a, b));
    };
    for_each_output(packed, apart, same);
    for_each_gradient(packed, apart, same);
  }
}

TEST(OneMeaning, PackedEqualsSeparate) {
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    for_each_dtype(
        []<class T>(T) { packed_equals_separate<T>(std::is_same_v<T, float> ? 60 : 24); });
  }
}

template <class T>
void threads_change_no_bit(uint64_t seeds) {
  Random random(22);
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
    CaseSpec spec = random_spec(random, 1000 + seed);
    if (seed % 2 == 0) {  // one long sequence with few heads: cut into segments
      spec.B = 1;
      spec.H = 1;
      spec.T = random.integer(100, 700);
    }
    if (seed % 5 == 0) {
      spec.H = 4;
      spec.Hk = 2;
      spec.Hv = 1;
    }
    Case<T> one(spec), many(spec);
    const Where where{how_text<T>("threads"), name(instruction_set()), describe(spec)};
    GkaOptions options = options_of<T>(spec);
    const bool saved = seed % 3 != 0;
    const auto run = [&](Case<T>& c, int threads) {
      ManyThreads executor(threads);
      options.executor = &executor;
      gka_forward(c.inputs(), c.outputs(), options);
      const ConstView x = saved ? ConstView(c.x.view()) : ConstView();
      gka_backward(c.inputs(), x, c.output_grads(), c.grads(), options);
    };
    run(one, 1);
    for (int threads : {2, 3, 7}) {
      many.clear_results();
      run(many, threads);
      const auto same = [&](const char* tensor, ConstView a, ConstView b) {
        EXPECT_TRUE(identical(where, tensor, a, b)) << threads << " threads";
      };
      for_each_output(many, one, same);
      for_each_gradient(many, one, same);
      same("x", many.x.view(), one.x.view());
      same("residual", many.residual.view(), one.residual.view());
    }
  }
}

TEST(OneMeaning, ThreadsChangeNoBit) {
  for (InstructionSet isa : available_instruction_sets()) {
    ForcedInstructionSet forced(isa);
    for_each_dtype(
        []<class T>(T) { threads_change_no_bit<T>(std::is_same_v<T, float> ? 40 : 20); });
  }
}

}  // namespace
}  // namespace kalmanet::testing
