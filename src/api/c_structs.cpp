// From the C ABI's structs to the library's.
#include "api/c_structs.hpp"

#include <algorithm>

#include "api/c_error.hpp"
#include "core/check.hpp"
#include "core/text.hpp"
#include "kalmanet/error.hpp"

namespace kalmanet::api {
namespace {

// A size that was never set is caught before its bytes are read.
constexpr size_t kLargestStruct = 65536;

// The C enumerators are the C++ ones, value for value.
template <class Enum>
constexpr bool same(int c, Enum cpp) {
  return c == static_cast<int>(cpp);
}
static_assert(same(KALMANET_FLOAT32, DType::float32) && same(KALMANET_FLOAT64, DType::float64) &&
              same(KALMANET_BFLOAT16, DType::bfloat16) && same(KALMANET_FLOAT16, DType::float16));
static_assert(same(KALMANET_SOLVER_CHEBYSHEV, Solver::chebyshev) &&
              same(KALMANET_SOLVER_DIRECT, Solver::direct) && same(KALMANET_SOLVER_CG, Solver::cg));
static_assert(same(KALMANET_ARITHMETIC_STANDARD, Arithmetic::standard) &&
              same(KALMANET_ARITHMETIC_BFLOAT16, Arithmetic::bfloat16));
static_assert(same(KALMANET_BACKEND_AUTOMATIC, Backend::automatic) &&
              same(KALMANET_BACKEND_CPU, Backend::cpu) &&
              same(KALMANET_BACKEND_REFERENCE, Backend::reference) &&
              same(KALMANET_BACKEND_CUDA, Backend::cuda));
static_assert(same(KALMANET_ISA_BASELINE, InstructionSet::baseline) &&
              same(KALMANET_ISA_AVX2, InstructionSet::avx2) &&
              same(KALMANET_ISA_AVX512, InstructionSet::avx512));
static_assert(same(KALMANET_GKA_FORWARD, GkaOperation::forward) &&
              same(KALMANET_GKA_BACKWARD, GkaOperation::backward) &&
              same(KALMANET_GKA_STEP, GkaOperation::step));
static_assert(KALMANET_MAX_RANK == kMaxRank && KALMANET_AUTO_NUM_ITER == kAutoNumIter);
static_assert(KALMANET_SEGMENT_TOKENS == kSegmentTokens);
static_assert(KALMANET_SAVED_STATE_HEADER_BYTES == kSavedStateHeaderBytes);

// The defaults that C callers see are those of the C++ structs.
constexpr GkaOptions kDefaults;
constexpr kalmanet_gka_options kOptionsInit = KALMANET_GKA_OPTIONS_INIT;
static_assert(same(kOptionsInit.solver, kDefaults.solver) &&
              kOptionsInit.num_iter == kDefaults.num_iter &&
              same(kOptionsInit.backend, kDefaults.backend) &&
              kOptionsInit.ridge_ratio == kDefaults.ridge_ratio &&
              kOptionsInit.tolerance == kDefaults.tolerance && !kDefaults.scale &&
              kOptionsInit.scale == 0 && kOptionsInit.bp_lambda == kDefaults.bp_lambda &&
              kOptionsInit.chunk_size == kDefaults.chunk_size &&
              same(kOptionsInit.arithmetic, kDefaults.arithmetic) && !kOptionsInit.executor &&
              !kOptionsInit.stream && !kDefaults.stream);
static_assert(kalmanet_gka_shape KALMANET_GKA_SHAPE_INIT.saved_x == GkaShape{}.saved_x);

template <class V, class Data>
V view_of(const kalmanet_tensor& tensor, Data* data) {
  V view;
  view.data = data;
  view.dtype = static_cast<DType>(tensor.dtype);  // checked with the rest of the tensor
  view.rank = tensor.rank;
  std::copy(std::begin(tensor.size), std::end(tensor.size), view.size.begin());
  std::copy(std::begin(tensor.stride), std::end(tensor.stride), view.stride.begin());
  return view;
}

std::span<const int64_t> offsets_of(const int64_t* cu_seqlens, int64_t num_offsets) {
  if (num_offsets < 0 || (num_offsets > 0) != (cu_seqlens != nullptr)) {
    core::fail(ErrorCode::invalid_argument, "cu_seqlens",
               core::text(cu_seqlens ? "given" : "a null pointer", " with num_offsets = ",
                          num_offsets, "; packed sequences need both, others neither"));
  }
  return {cu_seqlens, static_cast<size_t>(num_offsets)};
}

std::span<const int32_t> numbers_of(const char* argument, const int32_t* numbers, int64_t count) {
  if (count < 0 || (count > 0) != (numbers != nullptr)) {
    core::fail(ErrorCode::invalid_argument, argument,
               core::text(numbers ? "given" : "a null pointer", " with ", argument,
                          "_count = ", count, "; one a sequence, or neither"));
  }
  return {numbers, static_cast<size_t>(count)};
}

}  // namespace

size_t known_bytes(const char* argument, const void* from, size_t full,
                   std::initializer_list<size_t> ends) {
  require(from, argument);
  uint32_t size;
  std::memcpy(&size, from, sizeof size);
  if (size == full) return full;
  if (size > full && size <= kLargestStruct) {
    const auto* bytes = static_cast<const unsigned char*>(from);
    const auto* set = std::find_if(bytes + full, bytes + size, [](unsigned char b) { return b; });
    if (set == bytes + size) return full;
    core::fail(ErrorCode::unsupported, argument,
               core::text("struct_size is ", size, " where this library knows ", full,
                          " bytes, and byte ", set - bytes,
                          " is set: the caller was built for a newer kalmanet and uses what this "
                          "one lacks"));
  }
  if (std::find(ends.begin(), ends.end(), size) != ends.end()) return size;
  core::fail(ErrorCode::invalid_argument, argument,
             core::text("struct_size is ", size, "; set it to sizeof the struct, which is ", full,
                        " here (the initialisers KALMANET_..._INIT do)"));
}

ConstView const_view(const kalmanet_tensor& tensor) {
  return view_of<ConstView>(tensor, static_cast<const void*>(tensor.data));
}
View view(const kalmanet_tensor& tensor) {
  return view_of<View>(tensor, tensor.data);
}
ConstView const_view(const kalmanet_tensor* tensor) {
  return tensor ? const_view(*tensor) : ConstView();
}
View view(const kalmanet_tensor* tensor) {
  return tensor ? view(*tensor) : View();
}

kalmanet_gka_options read_options(const kalmanet_gka_options* options) {
  if (options == nullptr) return kOptionsInit;
  using S = kalmanet_gka_options;
  return read_struct<S>(
      "options", options, kOptionsInit,
      {offsetof(S, num_iter), offsetof(S, backend), offsetof(S, ridge_ratio),
       offsetof(S, tolerance), offsetof(S, scale), offsetof(S, bp_lambda), offsetof(S, chunk_size),
       offsetof(S, executor), offsetof(S, arithmetic), offsetof(S, stream)});
}

kalmanet_executor_callbacks read_callbacks(const kalmanet_executor_callbacks* callbacks) {
  using S = kalmanet_executor_callbacks;
  return read_struct<S>("callbacks", callbacks, KALMANET_EXECUTOR_CALLBACKS_INIT,
                        {offsetof(S, user_data)});
}

GkaOptions options_of(const kalmanet_gka_options& from) {
  GkaOptions options;
  options.solver = static_cast<Solver>(from.solver);
  options.num_iter = from.num_iter;
  options.backend = static_cast<Backend>(from.backend);
  options.ridge_ratio = from.ridge_ratio;
  options.tolerance = from.tolerance;
  options.arithmetic = static_cast<Arithmetic>(from.arithmetic);
  if (from.scale != 0) options.scale = from.scale;
  options.bp_lambda = from.bp_lambda != 0;
  options.chunk_size = from.chunk_size;
  options.stream = from.stream;
  return options;
}

GkaInputs inputs_of(const kalmanet_gka_inputs* inputs) {
  using S = kalmanet_gka_inputs;
  const S from =
      read_struct<S>("inputs", inputs, KALMANET_GKA_INPUTS_INIT,
                     {offsetof(S, g), offsetof(S, gk), offsetof(S, alpha), offsetof(S, beta),
                      offsetof(S, ridge_ratio), offsetof(S, h0), offsetof(S, u0),
                      offsetof(S, cu_seqlens), offsetof(S, slots), offsetof(S, draft_k),
                      offsetof(S, draft_v), offsetof(S, draft_g), offsetof(S, draft_gk),
                      offsetof(S, draft_beta), offsetof(S, accepted), offsetof(S, is_draft)});
  GkaInputs in;
  in.q = const_view(from.q);
  in.k = const_view(from.k);
  in.v = const_view(from.v);
  in.g = const_view(from.g);
  in.gk = const_view(from.gk);
  in.alpha = const_view(from.alpha);
  in.beta = const_view(from.beta);
  in.ridge_ratio = const_view(from.ridge_ratio);
  in.h0 = const_view(from.h0);
  in.u0 = const_view(from.u0);
  in.cu_seqlens = offsets_of(from.cu_seqlens, from.num_offsets);
  in.slots = numbers_of("slots", from.slots, from.slots_count);
  in.last_draft = {const_view(from.draft_k), const_view(from.draft_v), const_view(from.draft_g),
                   const_view(from.draft_gk), const_view(from.draft_beta)};
  in.accepted = numbers_of("accepted", from.accepted, from.accepted_count);
  in.is_draft = from.is_draft != 0;
  return in;
}

GkaOutputs outputs_of(const kalmanet_gka_outputs* outputs) {
  using S = kalmanet_gka_outputs;
  const S from = read_struct<S>("outputs", outputs, KALMANET_GKA_OUTPUTS_INIT,
                                {offsetof(S, h_final), offsetof(S, u_final), offsetof(S, x),
                                 offsetof(S, residual), offsetof(S, segment_states)});
  return {view(from.o), view(from.h_final),  view(from.u_final),
          view(from.x), view(from.residual), view(from.segment_states)};
}

GkaSaved saved_of(const kalmanet_gka_saved* saved) {
  if (saved == nullptr) return {};
  using S = kalmanet_gka_saved;
  const S from =
      read_struct<S>("saved", saved, KALMANET_GKA_SAVED_INIT, {offsetof(S, segment_states)});
  return {const_view(from.x), const_view(from.segment_states)};
}

GkaOutputGrads output_grads_of(const kalmanet_gka_output_grads* grads) {
  using S = kalmanet_gka_output_grads;
  const S from = read_struct<S>("output_grads", grads, KALMANET_GKA_OUTPUT_GRADS_INIT,
                                {offsetof(S, d_h_final), offsetof(S, d_u_final)});
  return {const_view(from.d_o), const_view(from.d_h_final), const_view(from.d_u_final)};
}

GkaInputGrads input_grads_of(const kalmanet_gka_input_grads* grads) {
  using S = kalmanet_gka_input_grads;
  const S from = read_struct<S>(
      "grads", grads, KALMANET_GKA_INPUT_GRADS_INIT,
      {offsetof(S, dk), offsetof(S, dv), offsetof(S, dg), offsetof(S, dgk), offsetof(S, dalpha),
       offsetof(S, dbeta), offsetof(S, d_ridge_ratio), offsetof(S, d_h0), offsetof(S, d_u0)});
  GkaInputGrads to;
  to.dq = view(from.dq);
  to.dk = view(from.dk);
  to.dv = view(from.dv);
  to.dg = view(from.dg);
  to.dgk = view(from.dgk);
  to.dalpha = view(from.dalpha);
  to.dbeta = view(from.dbeta);
  to.d_ridge_ratio = view(from.d_ridge_ratio);
  to.d_h0 = view(from.d_h0);
  to.d_u0 = view(from.d_u0);
  return to;
}

GkaShape shape_of(const kalmanet_gka_shape* shape) {
  using S = kalmanet_gka_shape;
  const S from = read_struct<S>("shape", shape, KALMANET_GKA_SHAPE_INIT,
                                {offsetof(S, Hq), offsetof(S, cu_seqlens), offsetof(S, saved_x),
                                 offsetof(S, segment_states)});
  GkaShape to;
  to.B = from.B;
  to.T = from.T;
  to.H = from.H;
  to.K = from.K;
  to.V = from.V;
  to.Hq = from.Hq;
  to.Hk = from.Hk;
  to.Hv = from.Hv;
  to.dtype = static_cast<DType>(from.dtype);
  to.cu_seqlens = offsets_of(from.cu_seqlens, from.num_offsets);
  to.saved_x = from.saved_x != 0;
  to.segment_states = from.segment_states != 0;
  return to;
}

namespace {

using Report = kalmanet_gka_report;
constexpr std::initializer_list<size_t> kReportEnds = {
    offsetof(Report, instruction_set), offsetof(Report, min_iterations),
    offsetof(Report, max_iterations),  offsetof(Report, reserved),
    offsetof(Report, chunk_size),      offsetof(Report, solves),
    offsetof(Report, direct_solves),   offsetof(Report, factorizations),
    offsetof(Report, bfloat16_solves)};

}  // namespace

void check_report(const kalmanet_gka_report* report) {
  if (report) known_bytes("report", report, sizeof *report, kReportEnds);
}

void write_report(const GkaReport& from, kalmanet_gka_report* report) {
  if (report == nullptr) return;
  Report to = KALMANET_GKA_REPORT_INIT;
  to.backend = static_cast<int32_t>(from.backend);
  to.instruction_set = static_cast<int32_t>(from.instruction_set);
  to.min_iterations = from.min_iterations;
  to.max_iterations = from.max_iterations;
  to.chunk_size = from.chunk_size;
  to.solves = from.solves;
  to.direct_solves = from.direct_solves;
  to.factorizations = from.factorizations;
  to.bfloat16_solves = from.bfloat16_solves;
  to.bfloat16_instructions = from.bfloat16_instructions ? 1 : 0;
  write_struct("report", report, to, kReportEnds);
}

void write_info(const GkaSavedStateInfo& from, kalmanet_gka_saved_state_info* info) {
  using S = kalmanet_gka_saved_state_info;
  S to = KALMANET_GKA_SAVED_STATE_INFO_INIT;
  to.version = from.version;
  to.dtype = static_cast<int32_t>(from.dtype);
  to.num_sequences = from.num_sequences;
  to.num_heads = from.num_heads;
  to.key_dim = from.key_dim;
  to.value_dim = from.value_dim;
  to.bytes = from.bytes;
  write_struct("info", info, to, {offsetof(S, bytes)});
}

void write_info(const BackendInfo& from, kalmanet_backend_info* info) {
  using S = kalmanet_backend_info;
  S to = KALMANET_BACKEND_INFO_INIT;
  to.backend = static_cast<int32_t>(from.backend);
  to.available = from.available ? 1 : 0;
  const size_t size = std::min(from.detail.size(), sizeof to.detail - 1);
  std::memcpy(to.detail, from.detail.data(), size);
  write_struct("info", info, to, {offsetof(S, detail)});
}

}  // namespace kalmanet::api
