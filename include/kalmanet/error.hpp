// The one exception type of the library: what was wrong, with which argument, and what is allowed.
#pragma once

#include <stdexcept>
#include <string>

#include "kalmanet/export.hpp"

namespace kalmanet {

enum class ErrorCode {
  invalid_argument,  // a value outside what the argument allows
  invalid_shape,     // rank, size or stride does not fit the problem
  invalid_dtype,     // a dtype that the argument never takes
  unsupported,       // valid, but no backend here computes it (yet)
  invalid_data,      // bytes that are no saved state, or a damaged one
};

// Thrown by every public function on bad input, before anything is written to an output.
// what() names the argument, what was given and what is allowed.
class KALMANET_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, std::string argument, const std::string& message);

  ErrorCode code() const noexcept { return code_; }
  // The name of the offending argument, as spelled in the public structs ("q", "num_iter", ...).
  const std::string& argument() const noexcept { return argument_; }

 private:
  ErrorCode code_;
  std::string argument_;
};

}  // namespace kalmanet
