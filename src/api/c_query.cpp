// The C ABI's questions: versions, names, backends, instruction sets.
#include <algorithm>
#include <vector>

#include "api/c_error.hpp"
#include "api/c_structs.hpp"
#include "core/check.hpp"
#include "core/text.hpp"
#include "kalmanet/backend.hpp"
#include "kalmanet/error.hpp"
#include "kalmanet/version.hpp"

using namespace kalmanet;

namespace {

// C++ code behind this takes an enumerator for granted.
InstructionSet known_set(int32_t isa) {
  if (isa < KALMANET_ISA_BASELINE || isa > KALMANET_ISA_AVX512) {
    core::fail(ErrorCode::invalid_argument, "isa",
               core::text("unknown value ", isa, "; must be baseline (0), avx2 (1) or avx512 (2)"));
  }
  return static_cast<InstructionSet>(isa);
}

}  // namespace

uint32_t kalmanet_abi_version(void) {
  return KALMANET_ABI_VERSION;
}

const char* kalmanet_version(void) {
  return version();
}

const char* kalmanet_dtype_name(int32_t dtype) {
  return name(static_cast<DType>(dtype));
}

int64_t kalmanet_dtype_size(int32_t dtype) {
  return size_of(static_cast<DType>(dtype));
}

const char* kalmanet_solver_name(int32_t solver) {
  return name(static_cast<Solver>(solver));
}

const char* kalmanet_arithmetic_name(int32_t arithmetic) {
  return name(static_cast<Arithmetic>(arithmetic));
}

const char* kalmanet_backend_name(int32_t backend) {
  return name(static_cast<Backend>(backend));
}

const char* kalmanet_instruction_set_name(int32_t isa) {
  return name(static_cast<InstructionSet>(isa));
}

kalmanet_status kalmanet_num_backends(int32_t* count) {
  return api::guarded([&] {
    api::require(count, "count");
    *count = static_cast<int32_t>(backends().size());
  });
}

kalmanet_status kalmanet_get_backend_info(int32_t index, kalmanet_backend_info* info) {
  return api::guarded([&] {
    api::require(info, "info");
    const std::vector<BackendInfo> all = backends();
    if (index < 0 || index >= std::ssize(all)) {
      core::fail(ErrorCode::invalid_argument, "index",
                 core::text("got ", index, "; must be in 0..", all.size() - 1));
    }
    api::write_info(all[static_cast<size_t>(index)], info);
  });
}

kalmanet_status kalmanet_instruction_set_available(int32_t isa, int32_t* available) {
  return api::guarded([&] {
    api::require(available, "available");
    const std::vector<InstructionSet> all = available_instruction_sets();
    *available = std::find(all.begin(), all.end(), known_set(isa)) != all.end() ? 1 : 0;
  });
}

kalmanet_status kalmanet_get_instruction_set(int32_t* isa) {
  return api::guarded([&] {
    api::require(isa, "isa");
    *isa = static_cast<int32_t>(instruction_set());
  });
}

kalmanet_status kalmanet_set_instruction_set(int32_t isa) {
  return api::guarded([&] { set_instruction_set(known_set(isa)); });
}

kalmanet_status kalmanet_reset_instruction_set(void) {
  return api::guarded([&] { reset_instruction_set(); });
}
