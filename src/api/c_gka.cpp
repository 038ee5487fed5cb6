// The C ABI of Gated KalmaNet: plans, the three operations and their sizes.
#include <memory>

#include "api/c_error.hpp"
#include "api/c_structs.hpp"
#include "core/check.hpp"
#include "core/problem.hpp"
#include "core/text.hpp"
#include "kalmanet/gka.hpp"

using namespace kalmanet;

kalmanet_status kalmanet_gka_plan_create(const kalmanet_gka_options* options,
                                         kalmanet_gka_plan** plan) {
  return api::guarded([&] {
    api::require(plan, "plan");
    const kalmanet_gka_options from = api::read_options(options);
    auto made = std::make_unique<kalmanet_gka_plan>();
    made->options = api::options_of(from);
    if (from.executor != nullptr) {
      made->executor = from.executor->executor;
      made->options.executor = made->executor.get();
    }
    core::validate_options(made->options);
    *plan = made.release();
  });
}

void kalmanet_gka_plan_destroy(kalmanet_gka_plan* plan) {
  delete plan;
}

kalmanet_status kalmanet_gka_forward(const kalmanet_gka_plan* plan,
                                     const kalmanet_gka_inputs* inputs,
                                     const kalmanet_gka_outputs* outputs,
                                     kalmanet_gka_report* report) {
  return api::guarded([&] {
    api::require(plan, "plan");
    api::check_report(report);
    api::write_report(gka_forward(api::inputs_of(inputs), api::outputs_of(outputs), plan->options),
                      report);
  });
}

kalmanet_status kalmanet_gka_step(const kalmanet_gka_plan* plan, const kalmanet_gka_inputs* inputs,
                                  const kalmanet_gka_outputs* outputs,
                                  kalmanet_gka_report* report) {
  return api::guarded([&] {
    api::require(plan, "plan");
    api::check_report(report);
    api::write_report(gka_step(api::inputs_of(inputs), api::outputs_of(outputs), plan->options),
                      report);
  });
}

kalmanet_status kalmanet_gka_backward(const kalmanet_gka_plan* plan,
                                      const kalmanet_gka_inputs* inputs,
                                      const kalmanet_gka_saved* saved,
                                      const kalmanet_gka_output_grads* output_grads,
                                      const kalmanet_gka_input_grads* grads,
                                      kalmanet_gka_report* report) {
  return api::guarded([&] {
    api::require(plan, "plan");
    api::check_report(report);
    api::write_report(
        gka_backward(api::inputs_of(inputs), api::saved_of(saved),
                     api::output_grads_of(output_grads), api::input_grads_of(grads), plan->options),
        report);
  });
}

kalmanet_status kalmanet_gka_workspace_bytes(const kalmanet_gka_plan* plan, int32_t operation,
                                             const kalmanet_gka_shape* shape, int64_t* bytes) {
  return api::guarded([&] {
    api::require(plan, "plan");
    api::require(bytes, "bytes");
    *bytes = gka_workspace_bytes(static_cast<GkaOperation>(operation), api::shape_of(shape),
                                 plan->options);
  });
}

kalmanet_status kalmanet_chebyshev_num_iter(double ridge_ratio, double tolerance,
                                            int32_t* num_iter) {
  return api::guarded([&] {
    api::require(num_iter, "num_iter");
    *num_iter = chebyshev_num_iter(ridge_ratio, tolerance);
  });
}

kalmanet_status kalmanet_gka_segment_state_size(int64_t key_dim, int64_t value_dim, int64_t* size) {
  return api::guarded([&] {
    api::require(size, "size");
    *size = gka_segment_state_size(key_dim, value_dim);
  });
}

kalmanet_status kalmanet_gka_state_bytes(int64_t num_heads, int64_t key_dim, int64_t value_dim,
                                         int64_t* bytes) {
  return api::guarded([&] {
    api::require(bytes, "bytes");
    *bytes = gka_state_bytes(num_heads, key_dim, value_dim);
  });
}
