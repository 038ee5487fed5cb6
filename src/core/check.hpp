// Checks of one tensor argument, shared by the validations of every operation.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/problem.hpp"
#include "kalmanet/error.hpp"
#include "kalmanet/tensor.hpp"

namespace kalmanet::core {

[[noreturn]] void fail(ErrorCode code, std::string_view argument, const std::string& message);

// Absent: nothing was passed. A tensor without elements may have no memory at all and still be
// there: its rank tells.
inline bool present(const ConstView& view) {
  return view.defined() || view.rank > 0;
}

// One expected dimension: its letter and its size, or any size if that is not known beforehand.
struct Dim {
  const char* letter;
  std::optional<int64_t> size;
};

// `view` has memory wherever it has elements, aligned for its dtype, the given dimensions, and
// strides that do not overflow the address space. `meaning` says where a size comes from.
void check_tensor(std::string_view argument, const ConstView& view, std::initializer_list<Dim> dims,
                  std::string_view meaning = {});

// The same for an argument that must be there.
void check_required(std::string_view argument, const ConstView& view,
                    std::initializer_list<Dim> dims, std::string_view meaning = {});

// A tensor that is written: as check_tensor, and no two elements share memory.
void check_writable(std::string_view argument, const View& view, std::initializer_list<Dim> dims,
                    std::string_view meaning = {});

// `why`: "q is float32 and every tensor but the states shares its dtype".
void check_dtype(std::string_view argument, const ConstView& view, DType expected,
                 std::string_view why);

// The dtype of the tensor called `first`, or float32 where that is a 16-bit one.
void check_dtype_or_float32(std::string_view argument, const ConstView& view, DType dtype,
                            std::string_view first);

// `out` may be absent, another tensor than `in`, or exactly `in` (an update in place); never the
// same memory in another layout.
void check_in_place(std::string_view argument, const View& out, std::string_view in_name,
                    const ConstView& in);

struct Named {
  const char* argument;
  ConstView view;
};

// No tensor that is written begins at the same address as another one of the call, except that
// `in_place` pairs (written, read) may. Tensors side by side in one allocation are fine.
void check_distinct(std::span<const Named> written, std::span<const Named> read,
                    std::initializer_list<std::pair<std::string_view, std::string_view>> in_place);

// The sequences of a batch of B rows of T tokens: the rows, or the packed ones between cu_seqlens.
std::vector<Sequence> make_sequences(int64_t B, int64_t T, std::span<const int64_t> cu_seqlens);

}  // namespace kalmanet::core
