// Run-time choice of the instruction set: what the build has, what the processor has, what was
// asked.
#include "cpu/dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <string>

#include "kalmanet/error.hpp"
#if defined(KALMANET_X86_64)
#include "cpu/isa/processor.hpp"
#endif

namespace kalmanet {
namespace {

bool processor_has(InstructionSet isa) {
  if (isa == InstructionSet::baseline) return true;
#if defined(KALMANET_X86_64)
  __builtin_cpu_init();
  if (isa == InstructionSet::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           cpu::processor_has_f16c();
  }
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

std::string list_available() {
  std::string text;
  for (InstructionSet isa : available_instruction_sets()) {
    text += (text.empty() ? "" : ", ") + std::string(name(isa));
  }
  return text;
}

InstructionSet check_available(InstructionSet isa, const std::string& argument) {
  if (!processor_has(isa)) {
    throw Error(ErrorCode::unsupported, argument,
                argument + ": instruction set " + name(isa) +
                    " is not available on this machine; available: " + list_available());
  }
  return isa;
}

InstructionSet from_environment() {
  const char* value = std::getenv("KALMANET_ISA");
  if (value == nullptr || *value == '\0') return available_instruction_sets().back();
  for (InstructionSet isa :
       {InstructionSet::baseline, InstructionSet::avx2, InstructionSet::avx512}) {
    if (std::string(value) == name(isa)) return check_available(isa, "KALMANET_ISA");
  }
  throw Error(ErrorCode::invalid_argument, "KALMANET_ISA",
              "KALMANET_ISA: '" + std::string(value) +
                  "' names no instruction set; use baseline, avx2 or avx512");
}

// -1: not chosen yet. Racing first uses all compute the same value.
std::atomic<int> chosen{-1};

std::atomic<bool> bf16_instructions_allowed{true};

}  // namespace

std::vector<InstructionSet> available_instruction_sets() {
  std::vector<InstructionSet> sets;
  for (InstructionSet isa :
       {InstructionSet::baseline, InstructionSet::avx2, InstructionSet::avx512}) {
    if (processor_has(isa)) sets.push_back(isa);
  }
  return sets;
}

InstructionSet instruction_set() {
  int value = chosen.load(std::memory_order_relaxed);
  if (value < 0) {
    value = static_cast<int>(from_environment());
    chosen.store(value, std::memory_order_relaxed);
  }
  return static_cast<InstructionSet>(value);
}

void set_instruction_set(InstructionSet isa) {
  chosen.store(static_cast<int>(check_available(isa, "set_instruction_set")),
               std::memory_order_relaxed);
}

void reset_instruction_set() {
  chosen.store(-1, std::memory_order_relaxed);
}

namespace cpu {

const KernelTable& kernels() {
  switch (instruction_set()) {
#if defined(KALMANET_X86_64)
    case InstructionSet::avx512:
      return kernels_avx512();
    case InstructionSet::avx2:
      return kernels_avx2();
#endif
    default:
      return kernels_baseline();
  }
}

const Bf16Kernels& bf16_kernels() {
#if defined(KALMANET_X86_64)
  static const bool available = processor_has_avx512_bf16();
  if (available && instruction_set() == InstructionSet::avx512 &&
      bf16_instructions_allowed.load(std::memory_order_relaxed)) {
    return kernels_avx512_bf16();
  }
#endif
  return kernels().bf16;
}

void use_bf16_instructions(bool use) {
  bf16_instructions_allowed.store(use, std::memory_order_relaxed);
}

}  // namespace cpu
}  // namespace kalmanet
