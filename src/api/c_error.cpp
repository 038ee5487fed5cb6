// Status codes and the last error of each thread.
#include "api/c_error.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string_view>

#include "core/check.hpp"
#include "kalmanet/error.hpp"

namespace kalmanet::api {
namespace {

// Plain arrays, so that keeping an error cannot fail; longer texts are cut off. The longest message
// of the library has some 300 characters, with paths and names of the caller's there may be more.
struct LastError {
  char message[1024];
  char argument[64];
};
thread_local LastError last_error{};

template <size_t Size>
void copy(char (&to)[Size], std::string_view from) noexcept {
  const size_t size = std::min(from.size(), Size - 1);
  std::memcpy(to, from.data(), size);
  to[size] = '\0';
}

kalmanet_status keep(kalmanet_status status, std::string_view message,
                     std::string_view argument = "") noexcept {
  copy(last_error.message, message);
  copy(last_error.argument, argument);
  return status;
}

kalmanet_status status_of(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::invalid_argument:
      return KALMANET_INVALID_ARGUMENT;
    case ErrorCode::invalid_shape:
      return KALMANET_INVALID_SHAPE;
    case ErrorCode::invalid_dtype:
      return KALMANET_INVALID_DTYPE;
    case ErrorCode::unsupported:
      return KALMANET_UNSUPPORTED;
    case ErrorCode::invalid_data:
      return KALMANET_INVALID_DATA;
  }
  return KALMANET_INTERNAL;
}

}  // namespace

kalmanet_status keep_current_exception() noexcept {
  try {
    throw;
  } catch (const Error& e) {
    return keep(status_of(e.code()), e.what(), e.argument());
  } catch (const CallbackFailed& e) {
    return keep(KALMANET_CALLBACK_FAILED, e.what(), "run");
  } catch (const std::bad_alloc&) {
    return keep(KALMANET_OUT_OF_MEMORY, "out of memory");
  } catch (const std::length_error&) {  // a container asked for more than any memory holds
    return keep(KALMANET_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return keep(KALMANET_INTERNAL, e.what());
  } catch (...) {
    return keep(KALMANET_INTERNAL, "an exception of an unknown type (thrown by a callback?)");
  }
}

void require(const void* pointer, const char* argument) {
  if (pointer == nullptr) {
    core::fail(ErrorCode::invalid_argument, argument, "is a null pointer; it is required");
  }
}

}  // namespace kalmanet::api

using kalmanet::api::last_error;

const char* kalmanet_last_error(void) {
  return last_error.message;
}

const char* kalmanet_last_error_argument(void) {
  return last_error.argument;
}

const char* kalmanet_status_name(kalmanet_status status) {
  switch (status) {
    case KALMANET_OK:
      return "KALMANET_OK";
    case KALMANET_INVALID_ARGUMENT:
      return "KALMANET_INVALID_ARGUMENT";
    case KALMANET_INVALID_SHAPE:
      return "KALMANET_INVALID_SHAPE";
    case KALMANET_INVALID_DTYPE:
      return "KALMANET_INVALID_DTYPE";
    case KALMANET_UNSUPPORTED:
      return "KALMANET_UNSUPPORTED";
    case KALMANET_INVALID_DATA:
      return "KALMANET_INVALID_DATA";
    case KALMANET_OUT_OF_MEMORY:
      return "KALMANET_OUT_OF_MEMORY";
    case KALMANET_CALLBACK_FAILED:
      return "KALMANET_CALLBACK_FAILED";
    case KALMANET_INTERNAL:
      return "KALMANET_INTERNAL";
  }
  return "unknown status";
}
