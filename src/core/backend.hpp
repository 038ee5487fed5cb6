// What a backend is to the library: a name, what it can compute, and the operations.
#pragma once

#include <string>

#include "core/problem.hpp"
#include "kalmanet/backend.hpp"

namespace kalmanet::core {

class GkaBackend {
 public:
  virtual ~GkaBackend() = default;
  virtual Backend id() const noexcept = 0;
  virtual std::string describe() const = 0;
  // Empty if this backend computes the problem, else the reason why not, for the error message:
  // "float64 is not available on the cpu backend; pass backend=reference".
  virtual std::string refuses(const GkaProblem& problem) const = 0;

  virtual GkaReport forward(const GkaProblem& problem, const GkaOutputs& outputs) const = 0;
  virtual GkaReport backward(const GkaProblem& problem, const GkaSaved& saved,
                             const GkaOutputGrads& output_grads,
                             const GkaInputGrads& grads) const = 0;
  virtual GkaReport step(const GkaProblem& problem, const GkaOutputs& outputs) const = 0;

  // What the operation allocates at most, for a problem that has sizes but no tensors; throws
  // Error(unsupported) from a backend that does not say.
  virtual int64_t workspace_bytes(GkaOperation operation, const GkaProblem& problem,
                                  const GkaShape& shape) const = 0;
};

}  // namespace kalmanet::core
