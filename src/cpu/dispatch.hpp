// Which instruction set's kernels run: one table of function pointers an instruction set.
#pragma once

#include "cpu/kernel_table.hpp"
#include "kalmanet/backend.hpp"

namespace kalmanet::cpu {

// The table of instruction_set().
const KernelTable& kernels();

// Chebyshev's iteration in bfloat16 that instruction_set() goes with: with the processor's
// instructions for it if they are there, else the table's.
const Bf16Kernels& bf16_kernels();
// false: the table's also where there are instructions (for the tests that compare the two). Of the
// process.
void use_bf16_instructions(bool use);

// Defined by isa/<name>.cpp; those that the build leaves out are never referenced.
const KernelTable& kernels_baseline();
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
const Bf16Kernels& kernels_avx512_bf16();

}  // namespace kalmanet::cpu
