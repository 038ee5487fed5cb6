// gka_step's slots and drafts: what a caller can get wrong about them, as far as the host sees it.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "core/text.hpp"

namespace kalmanet::core {
namespace {

bool has_draft(const GkaInputs& in) {
  const GkaDraft& d = in.last_draft;
  return present(d.k) || present(d.v) || present(d.g) || present(d.gk) || present(d.beta);
}

// Numbers in a GPU's memory are its kernels' to look at.
bool readable(const GkaProblem& p) {
  return p.options.backend != Backend::cuda;
}

void check_slots(const GkaProblem& p, const GkaOutputs& out) {
  const GkaInputs& in = p.inputs;
  const int64_t n = std::ssize(in.slots);
  if (n != p.N) {
    fail(ErrorCode::invalid_shape, "slots",
         text("has ", n, " entries; must be one a sequence, ", p.N));
  }
  const auto in_place = [&](const char* argument, const View& to, const ConstView& from) {
    if (!from.defined() && p.num_states > 0) {
      fail(ErrorCode::invalid_argument, argument, "must be the pool of states that slots is for");
    }
    if (to.defined() && to.data != from.data) {
      fail(ErrorCode::invalid_argument, argument,
           "beside slots the states are updated in place: pass the pool itself, or nothing");
    }
  };
  in_place("h_final", out.h_final, in.h0);
  in_place("u_final", out.u_final, in.u0);
  if (!readable(p)) return;
  std::vector<int32_t> taken;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t slot = in.slots[static_cast<size_t>(i)];
    if (slot >= p.num_states) {
      fail(ErrorCode::invalid_argument, "slots",
           text("slots[", i, "] is ", slot, "; the pool has ", p.num_states,
                " (negative: a sequence without states)"));
    }
    if (slot >= 0) taken.push_back(slot);
  }
  std::sort(taken.begin(), taken.end());
  const auto twice = std::adjacent_find(taken.begin(), taken.end());
  if (twice != taken.end()) {
    fail(ErrorCode::invalid_argument, "slots",
         text("two sequences have slot ", *twice, "; each needs its own"));
  }
}

void check_draft(const GkaProblem& p) {
  const GkaInputs& in = p.inputs;
  const GkaDraft& draft = in.last_draft;
  if (!in.cu_seqlens.empty()) {
    fail(ErrorCode::unsupported, "last_draft",
         "is for batches, not for packed sequences; pass q, k, v as [B,T,...] without cu_seqlens");
  }
  if (p.T == 0) {
    fail(ErrorCode::invalid_shape, "q", "has no tokens; with last_draft at least one is needed");
  }
  check_required("last_draft.k", draft.k,
                 {{"B", p.B}, {"T'", {}}, {"Hk", in.k.size[2]}, {"K", p.K}}, "as k");
  const int64_t drafted = draft.k.size[1];
  check_required("last_draft.v", draft.v,
                 {{"B", p.B}, {"T'", drafted}, {"Hv", in.v.size[2]}, {"V", p.V}}, "as v");
  check_dtype("last_draft.k", draft.k, p.dtype, "as k");
  check_dtype("last_draft.v", draft.v, p.dtype, "as v");
  const auto scalar = [&](const char* argument, const ConstView& view, const char* name,
                          const ConstView& own) {
    if (present(view) != present(own)) {
      fail(ErrorCode::invalid_argument, argument,
           text("must be there where ", name, " is, and absent where it is not"));
    }
    if (!present(view)) return;
    check_tensor(argument, view, {{"B", p.B}, {"T'", drafted}, {"H", p.H}});
    check_dtype_or_float32(argument, view, p.dtype, "q");
  };
  scalar("last_draft.g", draft.g, "g", in.g);
  scalar("last_draft.gk", draft.gk, "gk", in.gk);
  scalar("last_draft.beta", draft.beta, "beta", in.beta);
  if (std::ssize(in.accepted) != p.B) {
    fail(ErrorCode::invalid_shape, "accepted",
         text("has ", std::ssize(in.accepted), " entries; must be one a sequence, ", p.B));
  }
  if (!readable(p)) return;
  for (int64_t i = 0; i < p.B; ++i) {
    const int32_t n = in.accepted[static_cast<size_t>(i)];
    if (n < 0 || n > drafted) {
      fail(ErrorCode::invalid_argument, "accepted",
           text("accepted[", i, "] is ", n, "; must be in 0..", drafted,
                ", the tokens of last_draft"));
    }
  }
}

}  // namespace

void refuse_decode(const GkaInputs& in, const char* operation) {
  const auto refuse = [&](const char* argument) {
    fail(ErrorCode::invalid_argument, argument,
         text("is an input of gka_step; leave it absent in ", operation));
  };
  if (!in.slots.empty()) refuse("slots");
  if (has_draft(in)) refuse("last_draft");
  if (!in.accepted.empty()) refuse("accepted");
  if (in.is_draft) refuse("is_draft");
}

GkaProblem validate_step(const GkaInputs& inputs, const GkaOutputs& outputs,
                         const GkaOptions& options) {
  GkaProblem p = validate_forward(inputs, outputs, options);
  if (outputs.segment_states.rank > 0 || outputs.segment_states.defined()) {
    fail(ErrorCode::invalid_argument, "segment_states",
         "is an output of gka_forward; leave it absent in gka_step");
  }
  if (!inputs.slots.empty()) check_slots(p, outputs);
  if (has_draft(inputs)) {
    check_draft(p);
  } else if (!inputs.accepted.empty()) {
    fail(ErrorCode::invalid_argument, "accepted",
         "says how many tokens of last_draft, which is absent; pass both or neither");
  }
  if (!readable(p)) return p;
  for (Sequence& sequence : p.sequences) {
    const size_t i = static_cast<size_t>(sequence.index);
    if (!inputs.accepted.empty()) sequence.accepted = inputs.accepted[i];
    if (!inputs.slots.empty()) sequence.index = inputs.slots[i];
  }
  std::erase_if(p.sequences, [](const Sequence& sequence) { return sequence.index < 0; });
  p.N = std::ssize(p.sequences);
  return p;
}

}  // namespace kalmanet::core
