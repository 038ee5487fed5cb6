// A valid call of Gated KalmaNet with everything present, and mistakes that spoil it.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "kalmanet/error.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {

// A valid forward and backward with everything present: B=2 T=5 H=4 (q 4, k 2, v 1) K=6 V=3.
struct Call {
  Case<float> c;
  GkaInputs in;
  GkaOutputs out;
  GkaSaved saved;
  GkaOutputGrads d_out;
  GkaInputGrads grads;
  GkaOptions options;
  std::vector<int64_t> cu_seqlens;
  // Another dtype's worth of memory, for views that lie about it.
  alignas(16) char memory[65536] = {};

  Call() : c(spec()) {
    in = c.inputs();
    out = c.outputs();
    saved.x = c.x.view();
    d_out = c.output_grads();
    grads = c.grads();
  }
  // What segment states of so few tokens are: a tensor without elements.
  View states(int64_t batch) {
    View view;
    view.data = memory;
    view.rank = 4;
    view.size = {batch, 4, 0, gka_segment_state_size(6, 3)};
    view.stride = {0, 0, 512, 1};
    return view;
  }
  static CaseSpec spec() {
    CaseSpec s;
    s.B = 2;
    s.T = 5;
    s.H = 4;
    s.Hk = 2;
    s.Hv = 1;
    s.K = 6;
    s.V = 3;
    s.g = s.gk = s.alpha = s.beta = s.ridge_tensor = s.h0 = s.u0 = true;
    return s;
  }
};

struct Mistake {
  const char* what;
  std::function<void(Call&)> make;
  ErrorCode code;
  std::string argument;
  std::vector<std::string> message;  // parts of what()
};

enum class Entry { forward, backward };

inline void expect_error(const Mistake& mistake, Entry entry) {
  Call call;
  mistake.make(call);
  try {
    if (entry == Entry::forward) {
      core::validate_forward(call.in, call.out, call.options);
    } else {
      core::validate_backward(call.in, call.saved, call.d_out, call.grads, call.options);
    }
    ADD_FAILURE() << mistake.what << ": accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.argument(), mistake.argument) << mistake.what << ": " << e.what();
    EXPECT_EQ(static_cast<int>(e.code()), static_cast<int>(mistake.code))
        << mistake.what << ": " << e.what();
    EXPECT_EQ(std::string(e.what()).rfind(mistake.argument + ": ", 0), 0u) << e.what();
    for (const std::string& part : mistake.message) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
          << mistake.what << ": \"" << e.what() << "\" lacks \"" << part << '"';
    }
  }
}

}  // namespace kalmanet::testing
