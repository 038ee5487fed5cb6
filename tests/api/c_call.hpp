// Test cases as C callers hand them in: a Case's tensors in the C ABI's structs, and owning
// handles.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "kalmanet/kalmanet.h"
#include "support/expect.hpp"

namespace kalmanet::testing {

inline ::testing::AssertionResult ok(kalmanet_status status) {
  if (status == KALMANET_OK) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << kalmanet_status_name(status) << ": " << kalmanet_last_error();
}

// A failure of that kind whose message begins with the argument and has the part.
inline ::testing::AssertionResult fails(kalmanet_status got, kalmanet_status status,
                                        const std::string& argument, const std::string& part) {
  const std::string message = kalmanet_last_error();
  if (got == status && kalmanet_last_error_argument() == argument &&
      message.rfind(argument + ": ", 0) == 0 && message.find(part) != std::string::npos) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure()
         << "got " << kalmanet_status_name(got) << " about \"" << kalmanet_last_error_argument()
         << "\": \"" << message << "\", expected " << kalmanet_status_name(status) << " about \""
         << argument << "\" with \"" << part << '"';
}

inline kalmanet_tensor c_tensor(const ConstView& view) {
  kalmanet_tensor t = KALMANET_ABSENT;
  t.data = const_cast<void*>(view.data);
  t.dtype = static_cast<int32_t>(view.dtype);
  t.rank = view.rank;
  std::copy(view.size.begin(), view.size.end(), t.size);
  std::copy(view.stride.begin(), view.stride.end(), t.stride);
  // What lies behind the rank means nothing.
  for (int d = std::max(0, view.rank); d < KALMANET_MAX_RANK; ++d) t.size[d] = t.stride[d] = -77;
  return t;
}

inline kalmanet_gka_inputs c_inputs(const GkaInputs& in) {
  kalmanet_gka_inputs c = KALMANET_GKA_INPUTS_INIT;
  c.q = c_tensor(in.q);
  c.k = c_tensor(in.k);
  c.v = c_tensor(in.v);
  c.g = c_tensor(in.g);
  c.gk = c_tensor(in.gk);
  c.alpha = c_tensor(in.alpha);
  c.beta = c_tensor(in.beta);
  c.ridge_ratio = c_tensor(in.ridge_ratio);
  c.h0 = c_tensor(in.h0);
  c.u0 = c_tensor(in.u0);
  c.cu_seqlens = in.cu_seqlens.empty() ? nullptr : in.cu_seqlens.data();
  c.num_offsets = std::ssize(in.cu_seqlens);
  c.slots = in.slots.empty() ? nullptr : in.slots.data();
  c.slots_count = std::ssize(in.slots);
  c.draft_k = c_tensor(in.last_draft.k);
  c.draft_v = c_tensor(in.last_draft.v);
  c.draft_g = c_tensor(in.last_draft.g);
  c.draft_gk = c_tensor(in.last_draft.gk);
  c.draft_beta = c_tensor(in.last_draft.beta);
  c.accepted = in.accepted.empty() ? nullptr : in.accepted.data();
  c.accepted_count = std::ssize(in.accepted);
  c.is_draft = in.is_draft ? 1 : 0;
  return c;
}

inline kalmanet_gka_outputs c_outputs(const GkaOutputs& out) {
  kalmanet_gka_outputs c = KALMANET_GKA_OUTPUTS_INIT;
  c.o = c_tensor(out.o);
  c.h_final = c_tensor(out.h_final);
  c.u_final = c_tensor(out.u_final);
  c.x = c_tensor(out.x);
  c.residual = c_tensor(out.residual);
  c.segment_states = c_tensor(out.segment_states);
  return c;
}

inline kalmanet_gka_output_grads c_output_grads(const GkaOutputGrads& grads) {
  kalmanet_gka_output_grads c = KALMANET_GKA_OUTPUT_GRADS_INIT;
  c.d_o = c_tensor(grads.d_o);
  c.d_h_final = c_tensor(grads.d_h_final);
  c.d_u_final = c_tensor(grads.d_u_final);
  return c;
}

inline kalmanet_gka_input_grads c_input_grads(const GkaInputGrads& grads) {
  kalmanet_gka_input_grads c = KALMANET_GKA_INPUT_GRADS_INIT;
  c.dq = c_tensor(grads.dq);
  c.dk = c_tensor(grads.dk);
  c.dv = c_tensor(grads.dv);
  c.dg = c_tensor(grads.dg);
  c.dgk = c_tensor(grads.dgk);
  c.dalpha = c_tensor(grads.dalpha);
  c.dbeta = c_tensor(grads.dbeta);
  c.d_ridge_ratio = c_tensor(grads.d_ridge_ratio);
  c.d_h0 = c_tensor(grads.d_h0);
  c.d_u0 = c_tensor(grads.d_u0);
  return c;
}

// Handles that are destroyed at the end of their scope.
struct CPlan {
  kalmanet_gka_plan* plan = nullptr;
  CPlan() : CPlan(KALMANET_GKA_OPTIONS_INIT) {}
  explicit CPlan(const kalmanet_gka_options& options) {
    EXPECT_TRUE(ok(kalmanet_gka_plan_create(&options, &plan)));
  }
  ~CPlan() { kalmanet_gka_plan_destroy(plan); }
  CPlan(const CPlan&) = delete;
  CPlan& operator=(const CPlan&) = delete;
};

// The three operations on a Case through the C ABI; the backward reads the Case's x.
template <class T>
kalmanet_status c_forward(const kalmanet_gka_plan* plan, Case<T>& c,
                          kalmanet_gka_report* report = nullptr) {
  const kalmanet_gka_inputs in = c_inputs(c.inputs());
  const kalmanet_gka_outputs out = c_outputs(c.outputs());
  return kalmanet_gka_forward(plan, &in, &out, report);
}
template <class T>
kalmanet_status c_step(const kalmanet_gka_plan* plan, Case<T>& c,
                       kalmanet_gka_report* report = nullptr) {
  const kalmanet_gka_inputs in = c_inputs(c.inputs());
  const kalmanet_gka_outputs out = c_outputs(c.outputs());
  return kalmanet_gka_step(plan, &in, &out, report);
}
template <class T>
kalmanet_status c_backward(const kalmanet_gka_plan* plan, Case<T>& c,
                           kalmanet_gka_report* report = nullptr, bool saved_x = true) {
  const kalmanet_gka_inputs in = c_inputs(c.inputs());
  kalmanet_gka_saved saved = KALMANET_GKA_SAVED_INIT;
  saved.x = c_tensor(c.x.view());
  const kalmanet_gka_output_grads d_out = c_output_grads(c.output_grads());
  const kalmanet_gka_input_grads grads = c_input_grads(c.grads());
  return kalmanet_gka_backward(plan, &in, saved_x ? &saved : nullptr, &d_out, &grads, report);
}

}  // namespace kalmanet::testing
