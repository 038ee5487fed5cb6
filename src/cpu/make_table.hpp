// Gathers every operation's kernels, instantiated for one vector type.
#pragma once

#include "cpu/bf16_chebyshev.hpp"
#include "cpu/conv_kernels.hpp"
#include "cpu/convert.hpp"
#include "cpu/gka_backward.hpp"
#include "cpu/gka_forward.hpp"
#include "cpu/gka_step.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/norm_kernels.hpp"

namespace kalmanet::cpu {

template <class Vec>
constexpr GkaKernels<typename Vec::Elem> gka_kernels() {
  return {
      .gka_forward = &gka_forward_segment<Vec>,
      .gka_scan_states = &gka_scan_states<Vec>,
      .gka_backward = &gka_backward_segment<Vec>,
      .gka_step = &gka_step_head<Vec>,
  };
}

template <class Vec>
constexpr KernelTable make_table() {
  return KernelTable{
      .gka = gka_kernels<Vec>(),
      .gka_float64 = gka_kernels<typename Vec::Wide>(),
      .bf16 = bf16_kernels_of<Vec, EmulatedBf16<Vec>>(false),
      .convert = convert_kernels<Vec>(),
      .conv = conv_kernels<Vec>(),
      .conv_float64 = conv_kernels<typename Vec::Wide>(),
      .norm = norm_kernels<Vec>(),
      .norm_float64 = norm_kernels<typename Vec::Wide>(),
  };
}

}  // namespace kalmanet::cpu
