// The reference backend.
#include "reference/backend.hpp"

#include "kalmanet/error.hpp"
#include "reference/oracle.hpp"

namespace kalmanet::reference {
namespace {

class ReferenceBackend final : public core::GkaBackend {
 public:
  Backend id() const noexcept override { return Backend::reference; }
  std::string describe() const override {
    return "float64 oracles, token by token: direct (Cholesky), chebyshev, cg";
  }
  std::string refuses(const core::GkaProblem& problem) const override {
    if (problem.options.arithmetic == Arithmetic::standard) return {};
    return std::string("arithmetic ") + name(problem.options.arithmetic) +
           " is not available on the reference backend, which computes in float64; pass backend "
           "cpu or arithmetic standard";
  }
  GkaReport forward(const core::GkaProblem& problem, const GkaOutputs& outputs) const override {
    return reference::forward<double>(problem, outputs);
  }
  GkaReport backward(const core::GkaProblem& problem, const GkaSaved& saved,
                     const GkaOutputGrads& output_grads,
                     const GkaInputGrads& grads) const override {
    return reference::backward<double>(problem, saved.x, output_grads, grads);
  }
  GkaReport step(const core::GkaProblem& problem, const GkaOutputs& outputs) const override {
    return reference::step<double>(problem, outputs);
  }
  int64_t workspace_bytes(GkaOperation, const core::GkaProblem&, const GkaShape&) const override {
    throw Error(ErrorCode::unsupported, "backend",
                "the reference backend does not say how much memory it takes; ask about the cpu");
  }
};

}  // namespace

const core::GkaBackend& gka_backend() {
  static const ReferenceBackend backend;
  return backend;
}

}  // namespace kalmanet::reference
