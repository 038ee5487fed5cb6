// From the C ABI's structs to the library's: versions by size, tensors to views.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <span>

#include "kalmanet/gka.hpp"
#include "kalmanet/kalmanet.h"
#include "kalmanet/state.hpp"
#include "kalmanet/workspace.hpp"

// What the two opaque handles are.
struct kalmanet_executor {
  std::shared_ptr<kalmanet::Executor> executor;
};
struct kalmanet_gka_plan {
  kalmanet::GkaOptions options;
  std::shared_ptr<kalmanet::Executor> executor;  // keeps options.executor alive; null: process-wide
};

namespace kalmanet::api {

// How many leading bytes of a caller's struct this library and the caller both know. `full` is the
// size here; `ends` are the shorter sizes that end between two fields, so that none is cut in half.
// A longer struct passes if its unknown bytes are zeros. Throws Error about `argument` otherwise.
size_t known_bytes(const char* argument, const void* from, size_t full,
                   std::initializer_list<size_t> ends);

// The caller's struct as this library knows it: fields that it lacks are as in `defaults`.
template <class S>
S read_struct(const char* argument, const S* from, const S& defaults,
              std::initializer_list<size_t> ends) {
  S here = defaults;
  std::memcpy(&here, from, known_bytes(argument, from, sizeof(S), ends));
  return here;
}

// Fills in a caller's struct as far as it goes; its struct_size stays.
template <class S>
void write_struct(const char* argument, S* to, const S& from, std::initializer_list<size_t> ends) {
  const size_t bytes = known_bytes(argument, to, sizeof(S), ends);
  constexpr size_t first = sizeof(uint32_t);
  std::memcpy(reinterpret_cast<char*>(to) + first, reinterpret_cast<const char*>(&from) + first,
              bytes - first);
}

ConstView const_view(const kalmanet_tensor& tensor);
View view(const kalmanet_tensor& tensor);
ConstView const_view(const kalmanet_tensor* tensor);  // null: absent
View view(const kalmanet_tensor* tensor);

GkaOptions options_of(const kalmanet_gka_options& options);
GkaInputs inputs_of(const kalmanet_gka_inputs* inputs);
GkaOutputs outputs_of(const kalmanet_gka_outputs* outputs);
GkaSaved saved_of(const kalmanet_gka_saved* saved);  // null: nothing
GkaOutputGrads output_grads_of(const kalmanet_gka_output_grads* grads);
GkaInputGrads input_grads_of(const kalmanet_gka_input_grads* grads);
GkaShape shape_of(const kalmanet_gka_shape* shape);

// Checks the caller's struct before any work is done, and fills it in after; null is left alone.
void check_report(const kalmanet_gka_report* report);
void write_report(const GkaReport& from, kalmanet_gka_report* report);
void write_info(const GkaSavedStateInfo& from, kalmanet_gka_saved_state_info* info);
void write_info(const BackendInfo& from, kalmanet_backend_info* info);

kalmanet_gka_options read_options(const kalmanet_gka_options* options);  // null: all defaults
kalmanet_executor_callbacks read_callbacks(const kalmanet_executor_callbacks* callbacks);

}  // namespace kalmanet::api
