// The CPU kernels, compiled for avx2 (flags: src/cpu/CMakeLists.txt).
#include "cpu/dispatch.hpp"
#include "cpu/isa/vec_avx2.hpp"
#include "cpu/make_table.hpp"

namespace kalmanet::cpu {

const KernelTable& kernels_avx2() {
  static constexpr KernelTable table = make_table<Avx2>();
  return table;
}

}  // namespace kalmanet::cpu
