// Checks of one tensor argument, and the sequences of a batch.
#include "core/check.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "core/half.hpp"
#include "core/text.hpp"

namespace kalmanet::core {
namespace {

// "[B, T, Hq, K] = [2, *, 4, 64]"
std::string expected_text(std::initializer_list<Dim> dims) {
  std::ostringstream out;
  const char* comma = "[";
  bool known = false;
  for (const Dim& dim : dims) {
    out << std::exchange(comma, ", ") << dim.letter;
    known |= dim.size.has_value();
  }
  out << ']';
  if (!known) return out.str();
  comma = " = [";
  for (const Dim& dim : dims) {
    out << std::exchange(comma, ", ");
    dim.size ? out << *dim.size : out << '*';
  }
  out << ']';
  return out.str();
}

// Every element is within int64 (in bytes) of the first.
bool addressable(const ConstView& view) {
  int64_t count = 1, reach = size_of(view.dtype);
  for (int d = 0; d < view.rank; ++d) {
    if (view.size[d] == 0) return true;
    int64_t span, bytes;
    if (__builtin_mul_overflow(count, view.size[d], &count) ||
        __builtin_mul_overflow(view.size[d] - 1, view.stride[d], &span) || span == INT64_MIN ||
        __builtin_mul_overflow(std::abs(span), size_of(view.dtype), &bytes) ||
        __builtin_add_overflow(reach, bytes, &reach)) {
      return false;
    }
  }
  return true;
}

// No two elements share memory, as far as nested strides show it: sorted by stride, each dimension
// steps over everything inside it. (Interleaved layouts that avoid each other by arithmetic alone
// are refused too; nobody makes them.)
bool elements_distinct(const ConstView& view) {
  std::array<int, kMaxRank> order;  // dimensions of more than one element, by |stride|
  int n = 0;
  for (int d = 0; d < view.rank; ++d) {
    if (view.size[d] == 0) return true;
    if (view.size[d] == 1) continue;
    int at = n++;
    for (; at > 0 && std::abs(view.stride[order[at - 1]]) > std::abs(view.stride[d]); --at) {
      order[at] = order[at - 1];
    }
    order[at] = d;
  }
  int64_t inside = 1;  // elements from the first to the last, of the dimensions so far
  for (int i = 0; i < n; ++i) {
    const int64_t stride = std::abs(view.stride[order[i]]);
    if (stride < inside) return false;
    inside += stride * (view.size[order[i]] - 1);
  }
  return true;
}

std::string strides_text(const ConstView& view) {
  ConstView strides = view;
  strides.size = view.stride;
  return shape_text(strides);
}

}  // namespace

void fail(ErrorCode code, std::string_view argument, const std::string& message) {
  throw Error(code, std::string(argument), message);
}

void check_tensor(std::string_view argument, const ConstView& view, std::initializer_list<Dim> dims,
                  std::string_view meaning) {
  const std::string because = meaning.empty() ? "" : text(" (", meaning, ")");
  if (view.rank < 0 || view.rank > kMaxRank) {
    fail(ErrorCode::invalid_shape, argument,
         text("rank ", view.rank, "; must be ", expected_text(dims)));
  }
  bool fits = view.rank == static_cast<int>(dims.size());
  int d = 0;
  for (const Dim& dim : dims) {
    if (!fits) break;
    fits = view.size[d] >= 0 && (!dim.size || *dim.size == view.size[d]);
    ++d;
  }
  if (!fits) {
    fail(ErrorCode::invalid_shape, argument,
         text("shape ", shape_text(view), "; must be ", expected_text(dims), because));
  }
  if (size_of(view.dtype) == 0) {
    fail(ErrorCode::invalid_dtype, argument,
         text("unknown dtype (", static_cast<int>(view.dtype),
              "); must be float32, float64, bfloat16 or float16"));
  }
  if (!addressable(view)) {
    fail(ErrorCode::invalid_shape, argument,
         text("shape ", shape_text(view), " with strides ", strides_text(view),
              " reaches beyond the 64-bit address space"));
  }
  const bool empty = std::any_of(view.size.begin(), view.size.begin() + view.rank,
                                 [](int64_t size) { return size == 0; });
  if (!view.defined() && !empty) {
    fail(ErrorCode::invalid_argument, argument,
         text("shape ", shape_text(view), " without memory (null data)"));
  }
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(size_of(view.dtype)) != 0) {
    fail(ErrorCode::invalid_argument, argument,
         text("data is not aligned to ", size_of(view.dtype), " bytes, the size of one ",
              name(view.dtype)));
  }
}

void check_required(std::string_view argument, const ConstView& view,
                    std::initializer_list<Dim> dims, std::string_view meaning) {
  if (!present(view)) {
    fail(ErrorCode::invalid_argument, argument,
         text("absent; it is required, as ", expected_text(dims)));
  }
  check_tensor(argument, view, dims, meaning);
}

void check_writable(std::string_view argument, const View& view, std::initializer_list<Dim> dims,
                    std::string_view meaning) {
  check_tensor(argument, view, dims, meaning);
  if (!elements_distinct(view)) {
    fail(ErrorCode::invalid_shape, argument,
         text("strides ", strides_text(view), " for shape ", shape_text(view),
              "; elements of a tensor that is written must not share memory (no expanded or "
              "overlapping dimensions)"));
  }
}

void check_dtype(std::string_view argument, const ConstView& view, DType expected,
                 std::string_view why) {
  if (view.dtype != expected) {
    fail(ErrorCode::invalid_dtype, argument,
         text("dtype ", name(view.dtype), "; must be ", name(expected), " (", why, ")"));
  }
}

void check_dtype_or_float32(std::string_view argument, const ConstView& view, DType dtype,
                            std::string_view first) {
  if (!is_half(dtype)) {
    check_dtype(argument, view, dtype, text("as ", first));
  } else if (view.dtype != dtype && view.dtype != DType::float32) {
    fail(ErrorCode::invalid_dtype, argument,
         text("dtype ", name(view.dtype), "; must be ", name(dtype), ", as ", first,
              ", or float32"));
  }
}

void check_in_place(std::string_view argument, const View& out, std::string_view in_name,
                    const ConstView& in) {
  if (!out.defined() || out.data != in.data) return;
  for (int d = 0; d < out.rank; ++d) {
    if (out.size[d] > 1 && out.stride[d] != in.stride[d]) {
      fail(ErrorCode::invalid_shape, argument,
           text("shares its memory with ", in_name, " but has strides ", strides_text(out),
                " where ", in_name, " has ", strides_text(in),
                "; an update in place needs the same strides"));
    }
  }
}

void check_distinct(std::span<const Named> written, std::span<const Named> read,
                    std::initializer_list<std::pair<std::string_view, std::string_view>> in_place) {
  const auto same = [](const Named& a, const Named& b) {
    return a.view.defined() && a.view.data == b.view.data && a.view.numel() > 0 &&
           b.view.numel() > 0;
  };
  for (size_t i = 0; i < written.size(); ++i) {
    const Named& out = written[i];
    for (const Named& other : written.first(i)) {
      if (same(out, other)) {
        fail(ErrorCode::invalid_argument, out.argument,
             text("shares its memory with ", other.argument,
                  "; every tensor that is written needs memory of its own"));
      }
    }
    for (const Named& in : read) {
      const std::pair<std::string_view, std::string_view> pair(out.argument, in.argument);
      if (same(out, in) && std::find(in_place.begin(), in_place.end(), pair) == in_place.end()) {
        fail(ErrorCode::invalid_argument, out.argument,
             text("shares its memory with the input ", in.argument,
                  "; only final states may be written in place, over their initial states"));
      }
    }
  }
}

std::vector<Sequence> make_sequences(int64_t B, int64_t T, std::span<const int64_t> cu_seqlens) {
  std::vector<Sequence> sequences;
  if (cu_seqlens.empty()) {
    sequences.reserve(static_cast<size_t>(B));
    for (int64_t b = 0; b < B; ++b) sequences.push_back({b, b, 0, T});
    return sequences;
  }
  const auto bad = [](const std::string& message) {
    fail(ErrorCode::invalid_argument, "cu_seqlens", message);
  };
  if (B != 1) bad(text("given with a batch of ", B, "; packed sequences need B = 1"));
  if (cu_seqlens.front() != 0) {
    bad(text("cu_seqlens[0] is ", cu_seqlens.front(), "; must be 0"));
  }
  for (size_t n = 1; n < cu_seqlens.size(); ++n) {
    if (cu_seqlens[n] < cu_seqlens[n - 1]) {
      bad(text("cu_seqlens[", n, "] is ", cu_seqlens[n], ", less than cu_seqlens[", n - 1,
               "] = ", cu_seqlens[n - 1], "; offsets must not decrease"));
    }
    sequences.push_back({static_cast<int64_t>(n) - 1, 0, cu_seqlens[n - 1], cu_seqlens[n]});
  }
  if (cu_seqlens.back() != T) {
    bad(text("the last offset is ", cu_seqlens.back(), "; must be T = ", T));
  }
  return sequences;
}

}  // namespace kalmanet::core
