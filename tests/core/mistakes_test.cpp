// Every mistake in Gated KalmaNet's arguments gives an Error that names the argument, what came and
// what is allowed.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "core/valid_call.hpp"
#include "kalmanet/error.hpp"
#include "support/problem.hpp"

namespace kalmanet {
namespace {

using testing::Call;
using testing::Entry;
using testing::expect_error;
using testing::Mistake;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr ErrorCode kArgument = ErrorCode::invalid_argument;
constexpr ErrorCode kShape = ErrorCode::invalid_shape;
constexpr ErrorCode kDType = ErrorCode::invalid_dtype;

// Both entries share these.
const std::vector<Mistake>& shared_mistakes() {
  static const std::vector<Mistake> all = {
      {"no q", [](Call& m) { m.in.q = {}; }, kArgument, "q", {"required", "[B, T, Hq, K]"}},
      {"no k", [](Call& m) { m.in.k = {}; }, kArgument, "k", {"required"}},
      {"no v", [](Call& m) { m.in.v = {}; }, kArgument, "v", {"required"}},
      {"q of rank 3",
       [](Call& m) { m.in.q.rank = 3; },
       kShape,
       "q",
       {"[2, 5, 4]", "[B, T, Hq, K]"}},
      {"q of rank 9", [](Call& m) { m.in.q.rank = 9; }, kShape, "q", {"rank 9"}},
      {"q of negative rank", [](Call& m) { m.in.q.rank = -1; }, kShape, "q", {"rank -1"}},
      {"a negative size", [](Call& m) { m.in.q.size[1] = -5; }, kShape, "q", {"[2, -5, 4, 6]"}},
      {"q without memory", [](Call& m) { m.in.q.data = nullptr; }, kArgument, "q", {"null"}},
      {"k of another T",
       [](Call& m) { m.in.k.size[1] = 4; },
       kShape,
       "k",
       {"[2, 4, 2, 6]", "[2, 5, *, 6]"}},
      {"k of another K", [](Call& m) { m.in.k.size[3] = 5; }, kShape, "k", {"[2, 5, *, 6]"}},
      {"v of another B", [](Call& m) { m.in.v.size[0] = 1; }, kShape, "v", {"[2, 5, *, *]"}},
      {"K = 0",
       [](Call& m) { m.in.q.size[3] = m.in.k.size[3] = 0; },
       kShape,
       "q",
       {"K is 0", "1..256"}},
      {"K = 257",
       [](Call& m) { m.in.q.size[3] = m.in.k.size[3] = 257; },
       kShape,
       "q",
       {"K is 257", "1..256"}},
      {"V = 257",
       [](Call& m) { m.in.v.size[3] = m.out.o.size[3] = m.d_out.d_o.size[3] = 257; },
       kShape,
       "v",
       {"V is 257", "1..256"}},
      {"3 heads of k for 4",
       [](Call& m) { m.in.k.size[2] = 3; },
       kShape,
       "k",
       {"3 heads", "divide H = 4"}},
      {"8 heads of q for 4",
       [](Call& m) { m.in.q.size[2] = 8; },
       kShape,
       "q",
       {"8 heads", "divide H = 4"}},
      {"0 heads of v", [](Call& m) { m.in.v.size[2] = 0; }, kShape, "v", {"0 heads"}},
      {"k in float64",
       [](Call& m) {
         m.in.k.data = m.memory;
         m.in.k.dtype = DType::float64;
       },
       kDType,
       "k",
       {"float64", "must be float32", "q is float32"}},
      {"g in float64",
       [](Call& m) {
         m.in.g.data = m.memory;
         m.in.g.dtype = DType::float64;
       },
       kDType,
       "g",
       {"float64", "float32"}},
      {"an unknown dtype",
       [](Call& m) { m.in.q.dtype = static_cast<DType>(17); },
       kDType,
       "q",
       {"17", "bfloat16"}},
      {"v not aligned",
       [](Call& m) { m.in.v.data = static_cast<const char*>(m.in.v.data) + 1; },
       kArgument,
       "v",
       {"aligned", "4 bytes"}},
      {"strides beyond the address space",
       [](Call& m) { m.in.q.stride[0] = INT64_MAX; },
       kShape,
       "q",
       {"9223372036854775807", "address space"}},
      {"strides that reach the last byte alone",
       [](Call& m) { m.in.q.stride[0] = INT64_MAX / 4; },
       kShape,
       "q",
       {"address space"}},
      {"sizes whose product overflows",
       [](Call& m) {
         m.in.q.size = {int64_t{1} << 40, int64_t{1} << 40, 4, 6};
         m.in.q.stride = {0, 0, 0, 0};
       },
       kShape,
       "q",
       {"address space"}},
      {"g of the wrong heads",
       [](Call& m) { m.in.g.size[2] = 2; },
       kShape,
       "g",
       {"[2, 5, 2]", "[2, 5, 4]"}},
      {"gk of rank 4", [](Call& m) { m.in.gk.rank = 4; }, kShape, "gk", {"[B, T, H]"}},
      {"alpha of another T",
       [](Call& m) { m.in.alpha.size[1] = 6; },
       kShape,
       "alpha",
       {"[2, 6, 4]", "[2, 5, 4]"}},
      {"beta of another B", [](Call& m) { m.in.beta.size[0] = 3; }, kShape, "beta", {"[3, 5, 4]"}},
      {"ridge_ratio of rank 2",
       [](Call& m) { m.in.ridge_ratio.rank = 2; },
       kShape,
       "ridge_ratio",
       {"[B, T, H]"}},
      {"h0 of another N",
       [](Call& m) { m.in.h0.size[0] = 3; },
       kShape,
       "h0",
       {"[3, 4, 6, 6]", "[2, 4, 6, 6]"}},
      {"h0 not square", [](Call& m) { m.in.h0.size[3] = 3; }, kShape, "h0", {"[2, 4, 6, 6]"}},
      {"u0 transposed",
       [](Call& m) { std::swap(m.in.u0.size[2], m.in.u0.size[3]); },
       kShape,
       "u0",
       {"[2, 4, 3, 6]", "[2, 4, 6, 3]"}},
      {"h0 in bfloat16",
       [](Call& m) { m.in.h0.dtype = DType::bfloat16; },
       kDType,
       "h0",
       {"bfloat16", "float32"}},
      {"u0 in float64",
       [](Call& m) {
         m.in.u0.data = m.memory;
         m.in.u0.dtype = DType::float64;
       },
       kDType,
       "u0",
       {"float64", "float32"}},
      {"packed with B = 2",
       [](Call& m) {
         m.cu_seqlens = {0, 5};
         m.in.cu_seqlens = m.cu_seqlens;
       },
       kArgument,
       "cu_seqlens",
       {"batch of 2", "B = 1"}},
      {"ridge_ratio 0",
       [](Call& m) { m.options.ridge_ratio = 0; },
       kArgument,
       "ridge_ratio",
       {"got 0", "> 0"}},
      {"ridge_ratio negative",
       [](Call& m) { m.options.ridge_ratio = -0.1; },
       kArgument,
       "ridge_ratio",
       {"-0.1"}},
      {"ridge_ratio NaN",
       [](Call& m) { m.options.ridge_ratio = kNaN; },
       kArgument,
       "ridge_ratio",
       {"nan"}},
      {"ridge_ratio infinite",
       [](Call& m) { m.options.ridge_ratio = kInf; },
       kArgument,
       "ridge_ratio",
       {"inf"}},
      {"one token's ridge_ratio 0",
       [](Call& m) { m.c.ridge_ratio[(1 * 5 + 2) * 4 + 3] = 0; },
       kArgument,
       "ridge_ratio",
       {"ridge_ratio[1, 2, 3] is 0"}},
      {"one token's ridge_ratio NaN",
       [](Call& m) { m.c.ridge_ratio[7] = NAN; },
       kArgument,
       "ridge_ratio",
       {"ridge_ratio[0, 1, 3] is nan"}},
      {"one token's ridge_ratio infinite",
       [](Call& m) { m.c.ridge_ratio[0] = INFINITY; },
       kArgument,
       "ridge_ratio",
       {"inf"}},
      {"scale NaN", [](Call& m) { m.options.scale = kNaN; }, kArgument, "scale", {"nan"}},
      {"scale infinite", [](Call& m) { m.options.scale = kInf; }, kArgument, "scale", {"inf"}},
      {"num_iter negative",
       [](Call& m) { m.options.num_iter = -1; },
       kArgument,
       "num_iter",
       {"-1", ">= 1"}},
      {"tolerance -1", [](Call& m) { m.options.tolerance = -1; }, kArgument, "tolerance", {"> 0"}},
      {"tolerance NaN",
       [](Call& m) { m.options.tolerance = kNaN; },
       kArgument,
       "tolerance",
       {"nan"}},
      {"chunk_size 257",
       [](Call& m) { m.options.chunk_size = 257; },
       kArgument,
       "chunk_size",
       {"257", "1..256"}},
      {"chunk_size negative",
       [](Call& m) { m.options.chunk_size = -64; },
       kArgument,
       "chunk_size",
       {"-64"}},
      {"an unknown solver",
       [](Call& m) { m.options.solver = static_cast<Solver>(9); },
       kArgument,
       "solver",
       {"9", "chebyshev"}},
      {"an unknown arithmetic",
       [](Call& m) { m.options.arithmetic = static_cast<Arithmetic>(9); },
       kArgument,
       "arithmetic",
       {"9", "bfloat16"}},
      {"bfloat16 products for direct",
       [](Call& m) {
         m.options.arithmetic = Arithmetic::bfloat16;
         m.options.solver = Solver::direct;
       },
       kArgument,
       "arithmetic",
       {"chebyshev", "not direct"}},
      {"bfloat16 products for auto",
       [](Call& m) {
         m.options.arithmetic = Arithmetic::bfloat16;
         m.options.solver = Solver::automatic;
       },
       kArgument,
       "arithmetic",
       {"chebyshev", "not auto"}},
      {"bfloat16 products with num_iter auto",
       [](Call& m) {
         m.options.arithmetic = Arithmetic::bfloat16;
         m.options.num_iter = kAutoNumIter;
       },
       kArgument,
       "arithmetic",
       {"num_iter", "tolerance"}},
      {"an unknown backend",
       [](Call& m) { m.options.backend = static_cast<Backend>(9); },
       kArgument,
       "backend",
       {"9", "reference"}},
      {"automatic steps that no int counts",
       [](Call& m) {
         m.options.num_iter = kAutoNumIter;
         m.in.ridge_ratio = {};
         m.options.ridge_ratio = 1e-300;
       },
       kArgument,
       "ridge_ratio",
       {"1e-300", "num_iter"}},
  };
  return all;
}

TEST(Validation, SharedMistakesOfForwardAndBackward) {
  for (const Mistake& mistake : shared_mistakes()) {
    for (Entry entry : {Entry::forward, Entry::backward}) expect_error(mistake, entry);
  }
}

TEST(Validation, MistakesInOutputs) {
  const std::vector<Mistake> mistakes = {
      {"no o", [](Call& m) { m.out.o = {}; }, kArgument, "o", {"required", "[B, T, H, V]"}},
      {"o of another T",
       [](Call& m) { m.out.o.size[1] = 4; },
       kShape,
       "o",
       {"[2, 4, 4, 3]", "[2, 5, 4, 3]"}},
      {"o of another V", [](Call& m) { m.out.o.size[3] = 2; }, kShape, "o", {"[2, 5, 4, 3]"}},
      {"o without heads", [](Call& m) { m.out.o.size[2] = 0; }, kShape, "o", {"0 heads"}},
      {"o in float64",
       [](Call& m) {
         m.out.o.data = m.memory;
         m.out.o.dtype = DType::float64;
       },
       kDType,
       "o",
       {"float64", "float32"}},
      {"o expanded",
       [](Call& m) { m.out.o.stride[2] = 0; },
       kShape,
       "o",
       {"strides [60, 12, 0, 1]", "must not share memory"}},
      {"o overlapping",
       [](Call& m) { m.out.o.stride[2] = 2; },
       kShape,
       "o",
       {"must not share memory"}},
      {"x of the wrong K", [](Call& m) { m.out.x.size[3] = 3; }, kShape, "x", {"[2, 5, 4, 6]"}},
      {"residual of the wrong H",
       [](Call& m) { m.out.residual.size[2] = 1; },
       kShape,
       "residual",
       {"[2, 5, 4]"}},
      {"h_final of the wrong N",
       [](Call& m) { m.out.h_final.size[0] = 1; },
       kShape,
       "h_final",
       {"[2, 4, 6, 6]"}},
      {"u_final in bfloat16",
       [](Call& m) { m.out.u_final.dtype = DType::bfloat16; },
       kDType,
       "u_final",
       {"bfloat16", "float32"}},
      {"h_final expanded over the batch",
       [](Call& m) { m.out.h_final.stride[0] = 0; },
       kShape,
       "h_final",
       {"must not share memory"}},
      {"h_final in h0's memory, transposed",
       [](Call& m) {
         m.out.h_final.data = m.c.h0.view().data;
         std::swap(m.out.h_final.stride[2], m.out.h_final.stride[3]);
       },
       kShape,
       "h_final",
       {"h0", "same strides"}},
      {"u_final in u0's memory with other strides",
       [](Call& m) {
         m.out.u_final.data = m.c.u0.view().data;
         std::swap(m.out.u_final.stride[0], m.out.u_final.stride[1]);
         m.out.u_final.stride[1] = 18;
         m.out.u_final.stride[0] = 144;
       },
       kShape,
       "u_final",
       {"u0", "same strides"}},
      {"x in o's memory",
       [](Call& m) { m.out.x.data = m.out.o.data; },
       kArgument,
       "x",
       {"shares its memory with o"}},
      {"o over v",
       [](Call& m) { m.out.o.data = const_cast<void*>(m.in.v.data); },
       kArgument,
       "o",
       {"the input v"}},
      {"u_final over h0",
       [](Call& m) { m.out.u_final.data = const_cast<void*>(m.in.h0.data); },
       kArgument,
       "u_final",
       {"the input h0"}},
  };
  for (const Mistake& mistake : mistakes) expect_error(mistake, Entry::forward);
}

}  // namespace
}  // namespace kalmanet
