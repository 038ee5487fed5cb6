// Small pieces of error messages: shapes and lists as text.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

#include "kalmanet/tensor.hpp"

namespace kalmanet::core {

// "[2, 16, 4, 64]"
template <class Void>
std::string shape_text(const BasicView<Void>& view) {
  std::ostringstream s;
  s << '[';
  for (int d = 0; d < view.rank; ++d) s << (d ? ", " : "") << view.size[d];
  s << ']';
  return s.str();
}

// Any streamable values, one after the other.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream s;
  s.precision(10);
  (s << ... << parts);
  return s.str();
}

}  // namespace kalmanet::core
