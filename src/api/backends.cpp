// Registration and choice of backend.
#include "api/backends.hpp"

#include <string>

#include "cpu/backend.hpp"
#include "kalmanet/backend.hpp"
#include "kalmanet/error.hpp"
#include "reference/backend.hpp"

namespace kalmanet {
namespace api {

const core::GkaBackend& choose_backend(const core::GkaProblem& problem) {
  const Backend wanted = problem.options.backend;
  const core::GkaBackend& backend =
      wanted == Backend::reference ? reference::gka_backend() : cpu::gka_backend();
  const std::string reason = backend.refuses(problem);
  if (!reason.empty()) throw Error(ErrorCode::unsupported, "backend", reason);
  return backend;
}

}  // namespace api

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> infos;
  for (const core::GkaBackend* backend : {&cpu::gka_backend(), &reference::gka_backend()}) {
    try {
      infos.push_back({backend->id(), true, backend->describe()});
    } catch (const Error& e) {  // such as a KALMANET_ISA that names nothing
      infos.push_back({backend->id(), false, e.what()});
    }
  }
  return infos;
}

}  // namespace kalmanet
