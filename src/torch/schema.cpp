// The operators torch.ops.kalmanet.*: their schemas, the same on every device, and those without
// tensors. docs: include/kalmanet/*.hpp has the equations; shapes and letters are those of gka.hpp.
//
// Where an optional result was not asked for, or an input was absent, its place in the returned
// tuple is a tensor of zero elements. Every tensor stands before the `*`: PyTorch's vmap knows no
// keyword-only ones.
#include <torch/csrc/stable/library.h>

#include <string>

#include "kalmanet/kalmanet.hpp"
#include "torch/anchor.hpp"
#include "torch/views.hpp"

namespace kalmanet::torch_ops {
namespace {

// Pieces that several schemas share.
#define KN_GATES \
  "Tensor? g=None, Tensor? gk=None, Tensor? alpha=None, Tensor? beta=None, Tensor? ridge=None"
#define KN_SOLVER                                                                        \
  "float? scale=None, float ridge_ratio=0.02, str solver='chebyshev', int num_iter=30, " \
  "float tolerance=1e-05, int chunk_size=0, str arithmetic='standard'"
// `ridge` is a_t per token [B,T,H]; without it, ridge_ratio. num_iter = 0 is "auto". cu_seqlens:
// int64 on the CPU. arithmetic: "standard", or "bfloat16" products (gka_step: standard). backend:
// "auto", "cpu", "reference" (float64 oracle, also takes float64).
#define KN_SEQUENCE                         \
  "Tensor q, Tensor k, Tensor v, " KN_GATES \
  ", Tensor? h0=None, Tensor? u0=None, Tensor? cu_seqlens=None"

// What ran and could run, one line a backend.
std::string backend_info() {
  std::string text;
  for (const BackendInfo& info : backends()) {
    text += (text.empty() ? "" : "\n") + std::string(name(info.backend)) + ": " +
            (info.available ? "" : "not available; ") + info.detail;
  }
  return text;
}

// The instruction set that the CPU kernels use now.
std::string get_instruction_set() {
  return name(instruction_set());
}

// Forces one of them for the process; "" goes back to the environment's choice or the fastest.
void force_instruction_set(Text text) {
  if (text.empty()) return reset_instruction_set();
  for (const InstructionSet isa :
       {InstructionSet::baseline, InstructionSet::avx2, InstructionSet::avx512}) {
    if (text == name(isa)) return kalmanet::set_instruction_set(isa);
  }
  throw Error(ErrorCode::invalid_argument, "instruction_set",
              "is \"" + text + "\"; allowed are \"baseline\", \"avx2\", \"avx512\" and \"\"");
}

}  // namespace
}  // namespace kalmanet::torch_ops

STABLE_TORCH_LIBRARY(kalmanet, m) {
  // save_x: keep what the backward would compute again; x, and segment_states where the backend is
  // the CPU's and the chunks fit. bp_lambda is the gradient's: the forward takes it for the
  // autograd formula to find.
  m.def("gka_forward(" KN_SEQUENCE ", *, " KN_SOLVER
        ", bool save_x=False, bool want_residual=False, str backend='auto', bool bp_lambda=True)"
        " -> (Tensor o, Tensor h_final, Tensor u_final, Tensor x, Tensor residual,"
        " Tensor segment_states)");
  m.def("gka_backward(Tensor d_o, " KN_SEQUENCE
        ", Tensor? x=None, Tensor? segment_states=None, Tensor? dh=None, Tensor? du=None, "
        "*, " KN_SOLVER
        ", bool bp_lambda=True, str backend='auto')"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dgk, Tensor dalpha, Tensor dbeta,"
        " Tensor dridge, Tensor dh0, Tensor du0)");
  // With slots, h and u are pools [num_slots,...]; slots and accepted: int32 on q's device.
  m.def("gka_step(Tensor q, Tensor k, Tensor v, Tensor(a!) h, Tensor(b!) u, " KN_GATES
        ", Tensor? cu_seqlens=None, Tensor? slots=None, Tensor? draft_k=None,"
        " Tensor? draft_v=None, Tensor? draft_g=None, Tensor? draft_gk=None,"
        " Tensor? draft_beta=None, Tensor? accepted=None, *, " KN_SOLVER
        ", bool want_residual=False, str backend='auto', bool is_draft=False)"
        " -> (Tensor o, Tensor residual)");
  // What a layer does between its projections (layer_step.hpp); the states h, u and conv_* are
  // updated in place. No chunk_size, arithmetic or backend: it runs one way.
  m.def(
      "layer_step(Tensor q, Tensor k, Tensor v, Tensor(a!) h, Tensor(b!) u, Tensor(c!) conv_q,"
      " Tensor(d!) conv_k, Tensor(e!)? conv_v, Tensor conv_q_weight, Tensor conv_k_weight,"
      " Tensor? conv_v_weight, Tensor o_norm, Tensor? gate=None, Tensor? b=None,"
      " Tensor? alpha=None, Tensor? a=None, Tensor? ridge=None, Tensor? A_log=None,"
      " Tensor? dt_bias=None, *, float? scale=None, float ridge_ratio=0.02,"
      " str solver='chebyshev', int num_iter=30, float tolerance=1e-05, bool decay_h=True,"
      " float fixed_alpha=1.0, str qk_norm='official', float min_ridge=0.00012,"
      " float max_ridge=0.135, float norm_eps=1e-06, bool want_residual=False)"
      " -> (Tensor o, Tensor residual)");
  m.def(
      "causal_conv_forward(Tensor x, Tensor weight, Tensor? state=None, Tensor? cu_seqlens=None,"
      " *, bool silu=True, bool want_final_state=False) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? state=None,"
      " Tensor? cu_seqlens=None, Tensor? d_final_state=None, *, bool silu=True)"
      " -> (Tensor dx, Tensor dweight, Tensor dstate)");
  m.def("causal_conv_step(Tensor x, Tensor weight, Tensor(a!) state, *, bool silu=True) -> Tensor");
  m.def(
      "gated_rms_norm_forward(Tensor o, Tensor? gate, Tensor weight, *, float eps=1e-06)"
      " -> Tensor");
  m.def(
      "gated_rms_norm_backward(Tensor dy, Tensor o, Tensor? gate, Tensor weight, *,"
      " float eps=1e-06) -> (Tensor d_o, Tensor d_gate, Tensor d_weight)");
  m.def("unit_norm_forward(Tensor x, *, str kind='official', float eps=1e-06) -> Tensor");
  m.def(
      "unit_norm_backward(Tensor dy, Tensor x, *, str kind='official', float eps=1e-06)"
      " -> Tensor");
  // A saved state (docs/state-format.md) as uint8 [bytes]; the bytes of the one that `buffer`
  // begins with, as the 8 bytes of an int64; and that one read: h and u.
  m.def("save_state(Tensor h, Tensor u) -> Tensor");
  m.def("saved_state_bytes(Tensor buffer) -> Tensor");
  m.def("load_state(Tensor buffer) -> (Tensor h, Tensor u)");
  m.def("backend_info() -> str");
  m.def("instruction_set() -> str");
  m.def("set_instruction_set(str instruction_set) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kalmanet, CompositeExplicitAutograd, m) {
  m.impl("backend_info", TORCH_BOX(&kalmanet::torch_ops::backend_info));
  m.impl("instruction_set", TORCH_BOX(&kalmanet::torch_ops::get_instruction_set));
  m.impl("set_instruction_set", TORCH_BOX(&kalmanet::torch_ops::force_instruction_set));
}

// Registration happens when the library is loaded; a C++ program calls this so that the linker
// keeps the library (anchor.hpp).
extern "C" KALMANET_API int kalmanet_torch_anchor() {
  return KALMANET_VERSION_MAJOR;
}
