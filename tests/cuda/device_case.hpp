// A test's problem in the memory of the GPU: every tensor with its layout and its gaps, results
// poisoned, and back again.
#pragma once

#include <cstdint>
#include <deque>

#include "cuda/launch.hpp"
#include "kalmanet/gka.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {

template <class T, class G = T>
class DeviceCase {
 public:
  explicit DeviceCase(Case<T, G>& c) : case_(c) {
    inputs_ = c.inputs();
    upload(inputs_.q, c.q), upload(inputs_.k, c.k), upload(inputs_.v, c.v);
    upload(inputs_.g, c.g);
    if (c.spec.same_gate) {
      inputs_.gk = inputs_.g;
    } else {
      upload(inputs_.gk, c.gk);
    }
    upload(inputs_.alpha, c.alpha), upload(inputs_.beta, c.beta);
    upload(inputs_.ridge_ratio, c.ridge_ratio), upload(inputs_.h0, c.h0), upload(inputs_.u0, c.u0);
    outputs_ = c.outputs();
    upload(outputs_.o, c.o), upload(outputs_.x, c.x), upload(outputs_.residual, c.residual);
    upload(outputs_.h_final, c.h_final), upload(outputs_.u_final, c.u_final);
    output_grads_ = c.output_grads();
    upload(output_grads_.d_o, c.d_o);
    upload(output_grads_.d_h_final, c.d_h_final), upload(output_grads_.d_u_final, c.d_u_final);
    grads_ = c.grads();
    for_each_grad([&](View& view, auto& tensor) { upload(view, tensor); });
  }
  ~DeviceCase() {
    for (void* memory : memories_) cuda::release(memory, nullptr);
  }
  DeviceCase(const DeviceCase&) = delete;
  DeviceCase& operator=(const DeviceCase&) = delete;

  GkaInputs& inputs() { return inputs_; }
  GkaOutputs& outputs() { return outputs_; }
  GkaOutputGrads& output_grads() { return output_grads_; }
  GkaInputGrads& grads() { return grads_; }

  // What was computed, gaps included, into the case.
  void download() {
    download(outputs_.o, case_.o), download(outputs_.x, case_.x);
    download(outputs_.residual, case_.residual);
    download(outputs_.h_final, case_.h_final), download(outputs_.u_final, case_.u_final);
    for_each_grad([&](View& view, auto& tensor) { download(view, tensor); });
  }

 private:
  template <class F>
  void for_each_grad(F&& f) {
    f(grads_.dq, case_.dq), f(grads_.dk, case_.dk), f(grads_.dv, case_.dv);
    f(grads_.dg, case_.dg), f(grads_.dgk, case_.dgk), f(grads_.dalpha, case_.dalpha);
    f(grads_.dbeta, case_.dbeta), f(grads_.d_ridge_ratio, case_.d_ridge_ratio);
    f(grads_.d_h0, case_.d_h0), f(grads_.d_u0, case_.d_u0);
  }
  template <class V, class E>
  void upload(V& view, const Tensor<E>& tensor) {
    if (!tensor.defined()) return;
    const int64_t bytes = static_cast<int64_t>(tensor.memory().size() * sizeof(E));
    void* const memory = cuda::allocate(bytes, nullptr);
    memories_.push_back(memory);
    cuda::copy_to_device(memory, tensor.memory().data(), bytes, nullptr);
    view.data = static_cast<E*>(memory) + tensor.origin();
  }
  template <class E>
  void download(const View& view, Tensor<E>& tensor) {
    if (!tensor.defined()) return;
    cuda::copy_to_host(tensor.memory().data(), static_cast<E*>(view.data) - tensor.origin(),
                       static_cast<int64_t>(tensor.memory().size() * sizeof(E)), nullptr);
  }

  Case<T, G>& case_;
  GkaInputs inputs_;
  GkaOutputs outputs_;
  GkaOutputGrads output_grads_;
  GkaInputGrads grads_;
  std::deque<void*> memories_;
};

}  // namespace kalmanet::testing
