// Registration and choice of backend.
#include "api/backends.hpp"

#include <string>

#include "cpu/backend.hpp"
#include "kalmanet/backend.hpp"
#include "kalmanet/error.hpp"
#include "reference/backend.hpp"
#ifdef KALMANET_WITH_CUDA
#include "cuda/backend.hpp"
#endif

namespace kalmanet {
namespace api {

const core::GkaBackend& choose_backend(const core::GkaProblem& problem) {
  const Backend wanted = problem.options.backend;
#ifndef KALMANET_WITH_CUDA
  if (wanted == Backend::cuda) throw Error(ErrorCode::unsupported, "backend", kNoCuda);
#endif
  const core::GkaBackend& backend = wanted == Backend::reference ? reference::gka_backend()
#ifdef KALMANET_WITH_CUDA
                                    : wanted == Backend::cuda ? cuda::gka_backend()
#endif
                                                              : cpu::gka_backend();
  const std::string reason = backend.refuses(problem);
  if (!reason.empty()) throw Error(ErrorCode::unsupported, "backend", reason);
  return backend;
}

}  // namespace api

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> infos;
  const std::vector<const core::GkaBackend*> built = {
      &cpu::gka_backend(),
      &reference::gka_backend(),
#ifdef KALMANET_WITH_CUDA
      &cuda::gka_backend(),
#endif
  };
  for (const core::GkaBackend* backend : built) {
    try {
      infos.push_back({backend->id(), true, backend->describe()});
    } catch (const Error& e) {  // such as a KALMANET_ISA that names nothing
      infos.push_back({backend->id(), false, e.what()});
    }
  }
#ifndef KALMANET_WITH_CUDA
  infos.push_back({Backend::cuda, false, api::kNoCuda});
#endif
  return infos;
}

}  // namespace kalmanet
