// The CPU kernels, compiled for baseline (flags: src/cpu/CMakeLists.txt).
#include "cpu/dispatch.hpp"
#include "cpu/isa/vec_baseline.hpp"
#include "cpu/make_table.hpp"

namespace kalmanet::cpu {

const KernelTable& kernels_baseline() {
  static constexpr KernelTable table = make_table<Baseline>();
  return table;
}

}  // namespace kalmanet::cpu
