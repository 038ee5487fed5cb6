// Which backends and instruction sets there are, which one is used, and how to force one.
#pragma once

#include <string>
#include <vector>

#include "kalmanet/export.hpp"

namespace kalmanet {

// `automatic` takes the fastest backend that computes the problem and never `reference`, which is
// the float64 oracle (slow; always selectable by name), nor `cuda`, whose tensors lie in the
// memory of a GPU: only the caller knows that they do.
enum class Backend { automatic, cpu, reference, cuda };
KALMANET_API const char* name(Backend backend) noexcept;

// What the CPU backend's kernels are compiled for; `baseline` runs on every processor.
enum class InstructionSet { baseline, avx2, avx512 };
KALMANET_API const char* name(InstructionSet isa) noexcept;

// Those that both this build and this processor have, slowest first.
KALMANET_API std::vector<InstructionSet> available_instruction_sets();
// The one that the CPU backend uses now: forced by set_instruction_set, else by the environment
// variable KALMANET_ISA (baseline, avx2, avx512), else the fastest available. An environment
// variable that names none of them, or one that this machine lacks, is an Error at first use.
KALMANET_API InstructionSet instruction_set();
// Forces one for the whole process; throws Error if this machine or build lacks it.
KALMANET_API void set_instruction_set(InstructionSet isa);
// Back to the environment's choice or the fastest.
KALMANET_API void reset_instruction_set();

struct BackendInfo {
  Backend backend;
  bool available;
  std::string detail;  // "instruction sets: baseline avx2 avx512; using avx512"
};
KALMANET_API std::vector<BackendInfo> backends();

}  // namespace kalmanet
