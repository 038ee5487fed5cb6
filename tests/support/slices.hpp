// Parts of a problem's tensors: some of its tokens, one of its sequences.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kalmanet/gka.hpp"

namespace kalmanet::testing {

// Elements [begin, end) of dimension `d`; an absent view stays absent.
template <class V>
V part(V view, int d, int64_t begin, int64_t end) {
  if (!view.defined()) return view;
  using Byte = std::conditional_t<std::is_same_v<V, ConstView>, const char, char>;
  view.data = static_cast<Byte*>(view.data) + size_of(view.dtype) * view.stride[d] * begin;
  view.size[d] = end - begin;
  return view;
}

// A view of tokens [begin, end) of dimension 1.
template <class V>
V tokens(V view, int64_t begin, int64_t end) {
  return part(view, 1, begin, end);
}
inline GkaInputs tokens(GkaInputs in, int64_t begin, int64_t end) {
  for (ConstView* v : {&in.q, &in.k, &in.v, &in.g, &in.gk, &in.alpha, &in.beta, &in.ridge_ratio}) {
    *v = tokens(*v, begin, end);
  }
  return in;
}
inline GkaOutputs tokens(GkaOutputs out, int64_t begin, int64_t end) {
  for (View* v : {&out.o, &out.x, &out.residual}) *v = tokens(*v, begin, end);
  return out;
}
inline GkaInputGrads tokens(GkaInputGrads grads, int64_t begin, int64_t end) {
  for (View* v : {&grads.dq, &grads.dk, &grads.dv, &grads.dg, &grads.dgk, &grads.dalpha,
                  &grads.dbeta, &grads.d_ridge_ratio}) {
    *v = tokens(*v, begin, end);
  }
  return grads;
}

// The state of sequence n.
template <class V>
V state(V view, int64_t n) {
  return part(view, 0, n, n + 1);
}

}  // namespace kalmanet::testing
