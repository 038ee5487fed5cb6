// Every mistake in the gradients' arguments gives an Error that names the argument, what came and
// what is allowed.
#include <gtest/gtest.h>

#include <vector>

#include "core/valid_call.hpp"
#include "kalmanet/error.hpp"

namespace kalmanet {
namespace {

using testing::Call;
using testing::Entry;
using testing::expect_error;
using testing::Mistake;

constexpr ErrorCode kArgument = ErrorCode::invalid_argument;
constexpr ErrorCode kShape = ErrorCode::invalid_shape;
constexpr ErrorCode kDType = ErrorCode::invalid_dtype;

TEST(Validation, MistakesInGradients) {
  const std::vector<Mistake> mistakes = {
      {"no d_o", [](Call& m) { m.d_out.d_o = {}; }, kArgument, "d_o", {"required"}},
      {"d_o of another V",
       [](Call& m) { m.d_out.d_o.size[3] = 2; },
       kShape,
       "d_o",
       {"[2, 5, 4, 3]"}},
      {"d_o in float64",
       [](Call& m) {
         m.d_out.d_o.data = m.memory;
         m.d_out.d_o.dtype = DType::float64;
       },
       kDType,
       "d_o",
       {"float64"}},
      {"saved_x of another T",
       [](Call& m) { m.saved.x.size[1] = 1; },
       kShape,
       "saved_x",
       {"[2, 1, 4, 6]", "[2, 5, 4, 6]"}},
      {"segment states of another T",
       [](Call& m) {
         m.saved.segment_states = m.states(2);
         m.saved.segment_states.size[2] = 1;
       },
       kShape,
       "segment_states",
       {"[2, 4, 1, 512]", "[2, 4, 0, 512]"}},
      {"segment states in float64",
       [](Call& m) {
         m.saved.segment_states = m.states(2);
         m.saved.segment_states.dtype = DType::float64;
       },
       kDType,
       "segment_states",
       {"float64"}},
      {"segment states of chunks of 12",
       [](Call& m) {
         m.saved.segment_states = m.states(2);
         m.options.chunk_size = 12;
       },
       kArgument,
       "segment_states",
       {"power of two", "not 12"}},
      {"segment states for the oracle",
       [](Call& m) {
         m.saved.segment_states = m.states(2);
         m.options.backend = Backend::reference;
       },
       ErrorCode::unsupported,
       "segment_states",
       {"backend cpu", "reference"}},
      {"d_h_final of the wrong N",
       [](Call& m) { m.d_out.d_h_final.size[0] = 1; },
       kShape,
       "d_h_final",
       {"[2, 4, 6, 6]"}},
      {"d_u_final of the wrong V",
       [](Call& m) { m.d_out.d_u_final.size[3] = 1; },
       kShape,
       "d_u_final",
       {"[2, 4, 6, 3]"}},
      {"dq of the wrong heads",
       [](Call& m) { m.grads.dq.size[2] = 2; },
       kShape,
       "dq",
       {"[2, 5, 4, 6]"}},
      {"dk of all heads", [](Call& m) { m.grads.dk.size[2] = 4; }, kShape, "dk", {"[2, 5, 2, 6]"}},
      {"dv of the wrong V",
       [](Call& m) { m.grads.dv.size[3] = 6; },
       kShape,
       "dv",
       {"[2, 5, 1, 3]"}},
      {"dk expanded",
       [](Call& m) { m.grads.dk.stride[2] = 0; },
       kShape,
       "dk",
       {"must not share memory"}},
      {"dg of rank 4", [](Call& m) { m.grads.dg.rank = 4; }, kShape, "dg", {"[B, T, H]"}},
      {"dgk of another H", [](Call& m) { m.grads.dgk.size[2] = 1; }, kShape, "dgk", {}},
      {"dalpha of another T", [](Call& m) { m.grads.dalpha.size[1] = 1; }, kShape, "dalpha", {}},
      {"dbeta of another B", [](Call& m) { m.grads.dbeta.size[0] = 1; }, kShape, "dbeta", {}},
      {"d_ridge_ratio as a scalar",
       [](Call& m) { m.grads.d_ridge_ratio.rank = 1; },
       kShape,
       "d_ridge_ratio",
       {"[B, T, H]"}},
      {"d_h0 in float16",
       [](Call& m) { m.grads.d_h0.dtype = DType::float16; },
       kDType,
       "d_h0",
       {"float16"}},
      {"d_u0 of the wrong K", [](Call& m) { m.grads.d_u0.size[2] = 1; }, kShape, "d_u0", {}},
      {"dg without g", [](Call& m) { m.in.g = {}; }, kArgument, "dg", {"g is absent"}},
      {"dgk without gk", [](Call& m) { m.in.gk = {}; }, kArgument, "dgk", {"gk is absent"}},
      {"dalpha without alpha", [](Call& m) { m.in.alpha = {}; }, kArgument, "dalpha", {}},
      {"dbeta without beta", [](Call& m) { m.in.beta = {}; }, kArgument, "dbeta", {}},
      {"d_h0 without h0", [](Call& m) { m.in.h0 = {}; }, kArgument, "d_h0", {"h0 is absent"}},
      {"d_u0 without u0", [](Call& m) { m.in.u0 = {}; }, kArgument, "d_u0", {"u0 is absent"}},
      {"one memory for dg and dgk",
       [](Call& m) { m.grads.dgk = m.grads.dg; },
       kArgument,
       "dgk",
       {"shares its memory with dg"}},
      {"d_h0 over d_h_final",
       [](Call& m) { m.grads.d_h0.data = const_cast<void*>(m.d_out.d_h_final.data); },
       kArgument,
       "d_h0",
       {"the input d_h_final"}},
      {"dq over q",
       [](Call& m) { m.grads.dq.data = const_cast<void*>(m.in.q.data); },
       kArgument,
       "dq",
       {"the input q"}},
  };
  for (const Mistake& mistake : mistakes) expect_error(mistake, Entry::backward);
}

}  // namespace
}  // namespace kalmanet
