// Names of the public enumerations, sizes of the dtypes, the version and the exception.
#include <string>
#include <utility>

#include "kalmanet/backend.hpp"
#include "kalmanet/error.hpp"
#include "kalmanet/gka.hpp"
#include "kalmanet/tensor.hpp"
#include "kalmanet/version.hpp"
#include "kalmanet/workspace.hpp"

#define KALMANET_TEXT_(x) #x
#define KALMANET_TEXT(x) KALMANET_TEXT_(x)

namespace kalmanet {

const char* name(DType dtype) noexcept {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
  }
  return "unknown dtype";
}

int64_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
  }
  return 0;
}

const char* name(Backend backend) noexcept {
  switch (backend) {
    case Backend::automatic:
      return "automatic";
    case Backend::cpu:
      return "cpu";
    case Backend::reference:
      return "reference";
    case Backend::cuda:
      return "cuda";
  }
  return "unknown backend";
}

const char* name(InstructionSet isa) noexcept {
  switch (isa) {
    case InstructionSet::baseline:
      return "baseline";
    case InstructionSet::avx2:
      return "avx2";
    case InstructionSet::avx512:
      return "avx512";
  }
  return "unknown instruction set";
}

const char* name(Arithmetic arithmetic) noexcept {
  switch (arithmetic) {
    case Arithmetic::standard:
      return "standard";
    case Arithmetic::bfloat16:
      return "bfloat16";
  }
  return "unknown arithmetic";
}

const char* name(Solver solver) noexcept {
  switch (solver) {
    case Solver::chebyshev:
      return "chebyshev";
    case Solver::direct:
      return "direct";
    case Solver::automatic:
      return "auto";
    case Solver::cg:
      return "cg";
  }
  return "unknown solver";
}

const char* name(GkaOperation operation) noexcept {
  switch (operation) {
    case GkaOperation::forward:
      return "forward";
    case GkaOperation::backward:
      return "backward";
    case GkaOperation::step:
      return "step";
  }
  return "unknown operation";
}

const char* version() noexcept {
  return KALMANET_TEXT(KALMANET_VERSION_MAJOR) "." KALMANET_TEXT(
      KALMANET_VERSION_MINOR) "." KALMANET_TEXT(KALMANET_VERSION_PATCH);
}

namespace {

// what() begins with the argument's name, whether the message already does or not.
std::string with_argument(const std::string& argument, const std::string& message) {
  const std::string prefix = argument + ": ";
  return message.rfind(prefix, 0) == 0 ? message : prefix + message;
}

}  // namespace

Error::Error(ErrorCode code, std::string argument, const std::string& message)
    : std::runtime_error(with_argument(argument, message)),
      code_(code),
      argument_(std::move(argument)) {}

}  // namespace kalmanet
