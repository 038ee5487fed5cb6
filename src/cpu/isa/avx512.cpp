// The CPU kernels, compiled for avx512 (flags: src/cpu/CMakeLists.txt).
#include "cpu/dispatch.hpp"
#include "cpu/isa/vec_avx512.hpp"
#include "cpu/make_table.hpp"

namespace kalmanet::cpu {

const KernelTable& kernels_avx512() {
  static constexpr KernelTable table = make_table<Avx512>();
  return table;
}

}  // namespace kalmanet::cpu
