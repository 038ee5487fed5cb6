// Heads of short memory: where gates forget so much a token that every token's H and U are sums of
// its last 64 keys or fewer. A layer that was not trained yet has such heads (docs/gpu.md). Other
// kernels do them (short_system.hpp); this one says which pieces they are.
//
// What a token t loses with the keys before its last w is a matrix of trace d = e^{G_t - G_{t-w}}
// tr H_{t-w}. Beside lambda_t = a_t |H_t| it must not count, and |H_t| >= tr H_t / sqrt(K), |H_t|
// >= beta_t^2 |k_t|^2. So gates, lengths of keys and two traces of states say enough.
#pragma once

#include "cuda/state_view.hpp"

namespace kalmanet::cuda {

// Of x, at most: half of what rounding o to bfloat16 does to it.
inline constexpr float kShortTruncation = 0x1p-10f;
// Gates that forget less a token are not looked at: the other kernels do not cut their chunks, or
// into few.
inline constexpr float kShortestFade = 0.15f;
// What a chunk of the gradients' kernels may forget: e^{-G_j} must stay a float32.
inline constexpr float kMostChunkFade = 75.0f;

// What lies behind the plans: [piece][H] what the pieces that are not short forget, and whether
// another kernel than the usual one solved for x and z (backward); then the heads in the order in
// which blocks take them: those first whose chunks are cut most often, which take longest.
KALMANET_KERNEL float* fade_of(const GkaJob& job, int64_t piece_index, int64_t head) {
  const int64_t all = job.num_pieces * job.H, at = piece_index * job.H + head;
  return reinterpret_cast<float*>(job.short_plans + all) + at;
}
KALMANET_KERNEL int32_t* solved_again(const GkaJob& job, int64_t piece_index, int64_t head) {
  const int64_t all = job.num_pieces * job.H, at = piece_index * job.H + head;
  return reinterpret_cast<int32_t*>(job.short_plans + all) + all + at;
}
KALMANET_KERNEL int32_t* head_order(const GkaJob& job) {
  const int64_t all = job.num_pieces * job.H;
  return reinterpret_cast<int32_t*>(job.short_plans + all) + 2 * all;
}
// The head of a direct kernel's blocks `y`.
KALMANET_KERNEL int64_t head_of_block(const GkaJob& job, int64_t y) {
  return job.short_plans == nullptr ? y : head_order(job)[y];
}

struct ShortPlanLayout {
  static constexpr int kThreads = 256;
  static constexpr int kMost = 2 * static_cast<int>(kSegmentTokens);  // the piece before it, too
};

struct ShortPlanShared {
  float gate[ShortPlanLayout::kMost], since[ShortPlanLayout::kMost];
  float own[ShortPlanLayout::kMost], trace[ShortPlanLayout::kMost];  // beta_t^2 |k_t|^2, tr H_t
  int need[kSegmentTokens], window[ShortPlan::kBlocks];
  float fade;
};

struct ShortPlanRegisters {
  float squares[4], sum, since, trace, passed, passed2;
};

template <class Group>
struct ShortPlanBody {
  using L = ShortPlanLayout;
  using Registers = ShortPlanRegisters;
  static constexpr int kNone = 1 << 10;  // keys that would be too many

  Group& group;
  ShortPlanShared& shared;
  const GkaJob& job;
  Piece piece;
  int64_t head;
  ShortPlan* plan;
  StateView<float> start = {};  // H before the first token that is looked at
  int64_t from = 0;             // that token
  int count = 0;                // tokens, from there to the piece's end

  // (What is below e^-1000 is nothing, and sums of it must not be infinite.)
  KALMANET_KERNEL float gate_at(int64_t t) const {
    const float gate = scalar_at<float>(job.gk, piece.row, t, head, 0.0);
    return gate < -1000.0f ? -1000.0f : gate;
  }

  // Whether the piece's gates are worth a look. Ends with a barrier.
  KALMANET_KERNEL bool forgets() {
    group.with_warp(0, [&] {
      group.each([&](int lane, Registers& r) {
        r.sum = 0.0f;
        for (int64_t t = piece.begin + lane; t < piece.end; t += 32) r.sum += gate_at(t);
      });
      group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
      group.each([&](int lane, Registers& r) {
        if (lane == 0) shared.fade = -r.sum;
      });
    });
    group.barrier();
    const auto tokens = static_cast<float>(piece.end - piece.begin);
    return tokens > 0.0f && shared.fade >= kShortestFade * tokens;
  }

  // Gates and lengths of keys. Ends with a barrier.
  KALMANET_KERNEL void load() {
    KALMANET_LOOP
    for (int first = 0; first < count; first += L::kThreads / 32 * 4) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int u = 0; u < 4; ++u) {
          const int i = first + u * 8 + thread / 32;
          uint32_t raw[2] = {0, 0};
          if (i < count) {
            load8(static_cast<const uint16_t*>(job.k.data) +
                      offset_of(job.k, piece.row, from + i, head / job.k_group) + thread % 32 * 4,
                  raw);
          }
          const float a = low_bfloat16(raw[0]), b = high_bfloat16(raw[0]);
          const float c = low_bfloat16(raw[1]), d = high_bfloat16(raw[1]);
          r.squares[u] = (a * a + b * b) + (c * c + d * d);
        }
      });
      KALMANET_UNROLL
      for (int u = 0; u < 4; ++u) {
        group.template sum_lanes<32>([u](Registers& r) -> float& { return r.squares[u]; });
        group.each([&](int thread, Registers& r) {
          const int i = first + u * 8 + thread / 32;
          if (i >= count || thread % 32 != 0) return;
          const float beta = scalar_at<float>(job.beta, piece.row, from + i, head, 1.0);
          shared.own[i] = beta * beta * r.squares[u];
        });
      }
    }
    group.each([&](int thread, Registers&) {
      for (int i = thread; i < count; i += L::kThreads) shared.gate[i] = gate_at(from + i);
    });
    group.barrier();
  }

  // G_t and tr H_t: by the first warp, a lane so many tokens one after the other. Ends with a
  // barrier.
  KALMANET_KERNEL void scan() {
    const int each = (count + 31) / 32;
    group.with_warp(0, [&] {
      group.each([&](int lane, Registers& r) {
        r.sum = 0.0f;
        for (int i = lane; i < job.K && start.data != nullptr; i += 32) {
          r.sum += start.data[start.at(i, i)];
        }
        r.since = r.trace = 0.0f;
        for (int i = lane * each; i < (lane + 1) * each && i < count; ++i) {
          r.since += shared.gate[i];
          r.trace = expf(shared.gate[i]) * r.trace + shared.own[i];
        }
      });
      group.template sum_lanes<32>([](Registers& r) -> float& { return r.sum; });
      KALMANET_LOOP
      for (int step = 1; step < 32; step *= 2) {
        pass(step);
        group.each([&](int lane, Registers& r) {
          if (lane < step) return;
          r.trace += expf(r.since) * r.passed2;
          r.since += r.passed;
        });
      }
      pass(1);
      group.each([&](int lane, Registers& r) {
        float since = lane == 0 ? 0.0f : r.passed;
        float trace = lane == 0 ? r.sum : r.passed2 + expf(r.passed) * r.sum;
        for (int i = lane * each; i < (lane + 1) * each && i < count; ++i) {
          since += shared.gate[i];
          trace = expf(shared.gate[i]) * trace + shared.own[i];
          shared.since[i] = since;
          shared.trace[i] = trace;
        }
      });
    });
    group.barrier();
  }
  KALMANET_KERNEL void pass(int step) {
    group.shuffle([](Registers& r) -> float& { return r.passed; },
                  [](Registers& r) { return r.since; },
                  [step](int thread) { return thread - step; });
    group.shuffle([](Registers& r) -> float& { return r.passed2; },
                  [](Registers& r) { return r.trace; },
                  [step](int thread) { return thread - step; });
  }

  // How many keys token i of those looked at needs. (Not a number: too many.)
  KALMANET_KERNEL int keys_of(int i) const {
    const float trace = shared.trace[i];
    // Sums of squares of products of keys must stay float32.
    if (!(trace == 0.0f || (trace > 1e-12f && trace < 1e12f))) return kNone;
    const float norm = fmaxf(shared.own[i], trace * 0.088f);
    const float ridge = scalar_at<float>(job.ridge, piece.row, from + i, head, job.ridge_ratio);
    for (int keys = 16; keys <= ShortPlan::kTokens; keys += 16) {
      const int last = i - keys;  // of what is left out; none before the sequence
      const float left_out =
          last < 0 ? 0.0f : expf(shared.since[i] - shared.since[last]) * shared.trace[last];
      if (left_out <= kShortTruncation * ridge * norm) return keys;
    }
    return kNone;
  }

  // Where the gradients' kernels cut. Returns whether they can.
  KALMANET_KERNEL bool cut() const {
    const int first = static_cast<int>(piece.begin - from), n = count - first;
    const auto before = [&](int i) { return first + i == 0 ? 0.0f : shared.since[first + i - 1]; };
    plan->chunks = 0;
    bool whole = true;
    for (int i = 0; i < n; i += ShortPlan::kTokens) {
      const int last = i + ShortPlan::kTokens < n ? i + ShortPlan::kTokens : n;
      if (before(i) - before(last) > kMostChunkFade) whole = false;
    }
    if (whole) return true;
    int chunks = 0, begin = 0;
    plan->begin[0] = 0;
    // (Also of the tokens of which the state before the piece is made.)
    for (int i = first < ShortPlan::kTokens ? -first : -ShortPlan::kTokens; i < n; ++i) {
      if (!(shared.gate[first + i] >= -kMostChunkFade)) return false;
      if (i < 0) continue;
      const bool full = i - begin == ShortPlan::kTokens;
      if (!full && before(begin) - before(i + 1) <= kMostChunkFade) continue;
      begin = i;
      if (++chunks == ShortPlan::kMostChunks) return false;
      plan->begin[chunks] = i;
    }
    plan->begin[++chunks] = n;
    plan->chunks = chunks;
    return true;
  }

  // Returns whether the memory is short. (In one thread.)
  KALMANET_KERNEL bool decide(bool backward) {
    for (int block = 0; block < ShortPlan::kBlocks; ++block) {
      plan->window[block] = shared.window[block];
      if (shared.window[block] > ShortPlan::kTokens) return false;
    }
    return !backward || cut();
  }

  // `before`: the piece before this one, which is not its sequence's first.
  KALMANET_KERNEL bool run(const Piece& before) {
    if (!forgets()) return false;
    // (With states to start from the first tokens are no sums of keys.)
    if (piece.first && (job.h0.data != nullptr || job.u0.data != nullptr)) return false;
    from = piece.first ? piece.begin : before.begin;
    count = static_cast<int>(piece.end - from);
    if (!piece.first) {
      start = before.first ? state_view<float>(job.h0, before.sequence, head)
                           : slot_view<float>(job, before.slot, head, false);
    }
    load();
    scan();
    group.each([&](int thread, Registers&) {
      const int first = static_cast<int>(piece.begin - from);
      for (int t = thread; t < count - first; t += L::kThreads) {
        shared.need[t] = keys_of(first + t);
      }
    });
    group.barrier();
    group.each([&](int block, Registers&) {
      if (block >= ShortPlan::kBlocks) return;
      const int n = count - static_cast<int>(piece.begin - from);
      int most = 0;
      for (int t = block * ShortPlan::kTokens; t < (block + 1) * ShortPlan::kTokens && t < n; ++t) {
        most = shared.need[t] > most ? shared.need[t] : most;
      }
      shared.window[block] = most;
    });
    group.barrier();
    return true;
  }
};

// The work of block (piece_index, head): its plan, and what is short is not left over.
template <class Group>
KALMANET_KERNEL void run_short_plan(Group& group, ShortPlanShared& shared, const GkaJob& job,
                                    int64_t piece_index, int64_t head, bool backward) {
  const Piece piece = piece_of(job, piece_index);
  const int64_t at = piece_index * job.H + head;
  ShortPlan* const plan = job.short_plans + at;
  ShortPlanBody<Group> body{group, shared, job, piece, head, plan};
  const bool may_be = body.run(piece.first ? piece : piece_of(job, piece_index - 1));
  group.each([&](int thread, ShortPlanRegisters&) {
    if (thread != 0) return;
    plan->is_short = may_be && body.decide(backward) ? 1 : 0;
    if (plan->is_short != 0) job.left_over[at] = 0;
    // (A fade that is not a number is none: all that count are in one order.)
    *fade_of(job, piece_index, head) =
        plan->is_short == 0 && shared.fade > 0.0f ? shared.fade : 0.0f;
    *solved_again(job, piece_index, head) = 0;
  });
}

struct HeadOrderShared {
  static constexpr int kMost = 1024;  // heads; more are left in their own order
  float fade[kMost];
};
struct HeadOrderRegisters {};

// The order of heads, by one block, after all plans.
template <class Group>
KALMANET_KERNEL void run_head_order(Group& group, HeadOrderShared& shared, const GkaJob& job) {
  const auto heads = static_cast<int>(job.H);
  const bool sorts = heads <= HeadOrderShared::kMost;
  group.each([&](int thread, HeadOrderRegisters&) {
    for (int h = thread; h < heads && sorts; h += ShortPlanLayout::kThreads) {
      float sum = 0.0f;  // (of some pieces: a head is what it is)
      for (int64_t i = 0; i < job.num_pieces && i < 64; ++i) sum += *fade_of(job, i, h);
      shared.fade[h] = sum;
    }
  });
  group.barrier();
  group.each([&](int thread, HeadOrderRegisters&) {
    for (int h = thread; h < heads; h += ShortPlanLayout::kThreads) {
      int place = sorts ? 0 : h;
      for (int other = 0; other < heads && sorts; ++other) {
        const float a = shared.fade[other], b = shared.fade[h];
        if (a > b || (!(a < b) && other < h)) ++place;
      }
      head_order(job)[place] = h;
    }
  });
}

}  // namespace kalmanet::cuda
