// Gradient checkpointing as a custom autograd function over x and the parameters: as inputs of the
// function, the parameters receive their gradients through the graph like any other tensor.
#include "models/checkpointing.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>

#include <mutex>

#include "kalmanet/error.hpp"

namespace kalmanet::models {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What of the thread's state decides f's result.
struct Ambience {
  at::DeviceType device = at::kCPU;
  bool autocast = false;
  at::ScalarType autocast_dtype = at::kBFloat16;
  Tensor random_state;

  static Tensor random_state_now() {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get_state();
  }
  static void set_random_state(const Tensor& state) {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(state);
  }
  static Ambience now(at::DeviceType device) {
    return {device, at::autocast::is_autocast_enabled(device),
            at::autocast::get_autocast_dtype(device), random_state_now()};
  }
};

// Autocast keeps the casts it made of parameters; one made while no graph is recorded must not
// serve where one is, nor one of the first run the second.
class NoAutocastCache {
 public:
  NoAutocastCache() : before_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~NoAutocastCache() { at::autocast::set_autocast_cache_enabled(before_); }
  NoAutocastCache(const NoAutocastCache&) = delete;
  NoAutocastCache& operator=(const NoAutocastCache&) = delete;

 private:
  bool before_;
};

class Restore {
 public:
  explicit Restore(const Ambience& ambience) : before_(Ambience::now(ambience.device)) {
    apply(ambience);
  }
  ~Restore() { apply(before_); }
  Restore(const Restore&) = delete;
  Restore& operator=(const Restore&) = delete;

 private:
  static void apply(const Ambience& a) {
    at::autocast::set_autocast_enabled(a.device, a.autocast);
    at::autocast::set_autocast_dtype(a.device, a.autocast_dtype);
    Ambience::set_random_state(a.random_state);
  }
  Ambience before_;
};

struct Call : torch::CustomClassHolder {
  Call(TensorFunction function, Ambience surroundings)
      : f(std::move(function)), ambience(std::move(surroundings)) {}
  TensorFunction f;
  Ambience ambience;
};

class CheckpointFunction : public torch::autograd::Function<CheckpointFunction> {
 public:
  // inputs: x, then the parameters.
  static Tensor forward(AutogradContext* ctx, const c10::intrusive_ptr<Call>& call,
                        at::TensorList inputs) {
    ctx->save_for_backward(inputs.vec());  // also notices a parameter changed before the backward
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    const at::NoGradGuard no_grad;
    const NoAutocastCache no_cache;
    return call->f(inputs[0]);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (at::GradMode::is_enabled()) {
      throw Error(ErrorCode::unsupported, "create_graph",
                  "second derivatives through gradient checkpointing are not available; call "
                  "set_gradient_checkpointing(false)");
    }
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const variable_list inputs = ctx->get_saved_variables();
    variable_list result(1 + inputs.size());  // the first belongs to `call`
    if (!grads[0].defined()) return result;

    const at::AutoGradMode with_grad(true);
    const Tensor x = inputs[0].detach().requires_grad_(inputs[0].requires_grad());
    variable_list wanted;
    std::vector<size_t> places;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!ctx->needs_input_grad(i)) continue;  // counts tensors only
      wanted.push_back(i == 0 ? x : inputs[i]);
      places.push_back(i + 1);
    }
    Tensor out;
    {
      const Restore again(call->ambience);
      const NoAutocastCache no_cache;
      out = call->f(x);
    }
    const variable_list found = torch::autograd::grad({out}, wanted, {grads[0]},
                                                      /*retain_graph=*/false,
                                                      /*create_graph=*/false,
                                                      /*allow_unused=*/true);
    for (size_t i = 0; i < found.size(); ++i) result[places[i]] = found[i];
    return result;
  }
};

}  // namespace

Tensor checkpoint(TensorFunction f, const Tensor& x, const std::vector<Tensor>& parameters) {
  variable_list inputs = {x};
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  return CheckpointFunction::apply(
      c10::make_intrusive<Call>(std::move(f), Ambience::now(x.device().type())),
      at::TensorList(inputs));
}

}  // namespace kalmanet::models
