// Which instruction set's kernels run: one table of function pointers an instruction set.
#pragma once

#include "cpu/kernel_table.hpp"
#include "kalmanet/backend.hpp"

namespace kalmanet::cpu {

// The table of instruction_set().
const KernelTable& kernels();

// Defined by isa/<name>.cpp; those that the build leaves out are never referenced.
const KernelTable& kernels_baseline();
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();

}  // namespace kalmanet::cpu
