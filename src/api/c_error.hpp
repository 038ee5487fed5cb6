// The one way from an exception to a status: every function of the C ABI runs inside guarded().
#pragma once

#include <stdexcept>

#include "kalmanet/kalmanet.h"

namespace kalmanet::api {

// What a caller's run callback did wrong: KALMANET_CALLBACK_FAILED.
class CallbackFailed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Keeps the exception being handled as this thread's last error and returns its status. Allocates
// nothing: it works when memory is what has run out.
kalmanet_status keep_current_exception() noexcept;

template <class F>
kalmanet_status guarded(F&& f) noexcept {
  try {
    f();
    return KALMANET_OK;
  } catch (...) {
    return keep_current_exception();
  }
}

// Throws Error(invalid_argument) where an argument that must be there is null.
void require(const void* pointer, const char* argument);

}  // namespace kalmanet::api
