// Speculative decoding from a pool of states, as an engine does it: every round drafts tokens of
// which some are right, the next round says how many were, and the last one commits. What comes out
// is held to the float64 oracle on the right tokens alone, in one go.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "support/expect.hpp"
#include "support/problem.hpp"

namespace kalmanet::testing {

struct DecodeSpec {
  int64_t B = 3, H = 2, K = 8, V = 8, num_slots = 7, draft = 4, rounds = 3;
  int64_t Hk = 0;  // 0: H
  bool gates = true, beta = true;
  uint64_t seed = 1;
};

// Memory that a call reads or writes, for who must copy it to another device first.
struct Memory {
  void* data;
  size_t bytes;
};

// One call: all that it points to lies in `memory`.
using DecodeStep = std::function<void(const GkaInputs&, const GkaOutputs&, const GkaOptions&,
                                      const std::vector<Memory>& memory)>;

template <class T>
class Decode {
  using S = StateOf<T>;

  // The tokens of one call, all sequences.
  struct Tokens {
    int64_t T_ = 0;
    std::vector<T> q, k, v, o;
    std::vector<S> g, gk, alpha, beta;
  };

 public:
  // `bound`: of o; `state_bound`: of the final states. The last of the B sequences has no slot.
  void run(const DecodeSpec& with, const DecodeStep& step, const GkaOptions& options, double bound,
           double state_bound, const Where& where) {
    spec = with;
    const int64_t B = spec.B, H = spec.H, K = spec.K, V = spec.V, D = spec.draft;
    CaseSpec tokens;
    tokens.B = B - 1, tokens.H = H, tokens.Hk = spec.Hk, tokens.K = K, tokens.V = V;
    tokens.T = length = (spec.rounds + 1) * D + 1;
    tokens.h0 = tokens.u0 = tokens.alpha = true;
    tokens.g = tokens.gk = spec.gates, tokens.beta = spec.beta;
    tokens.seed = spec.seed;
    const Case<T, S> right(tokens);
    tokens.seed += 1000;
    const Case<T, S> wrong(tokens);
    const Case<double> oracle = to_double(right);
    const size_t h_size = static_cast<size_t>(H * K * K), u_size = static_cast<size_t>(H * K * V);

    std::vector<int32_t> slots, accepted(static_cast<size_t>(B), 0);
    for (int64_t n = 0; n + 1 < B; ++n) {
      slots.push_back(static_cast<int32_t>((n * 2 + 1) % spec.num_slots));
    }
    slots.push_back(-1);
    std::vector<S> h(static_cast<size_t>(spec.num_slots) * h_size, S(0.25));
    std::vector<S> u(static_cast<size_t>(spec.num_slots) * u_size, S(-0.5));
    const std::vector<double> h0 = right.h0.values(), u0 = right.u0.values();
    for (size_t n = 0; n + 1 < slots.size(); ++n) {
      const size_t slot = static_cast<size_t>(slots[n]);
      for (size_t e = 0; e < h_size; ++e) h[slot * h_size + e] = static_cast<S>(h0[n * h_size + e]);
      for (size_t e = 0; e < u_size; ++e) u[slot * u_size + e] = static_cast<S>(u0[n * u_size + e]);
    }

    std::vector<int64_t> position(slots.size(), 0);
    std::vector<std::vector<double>> outputs(slots.size());  // of the right tokens so far
    Tokens last, now;
    for (int64_t round = 0; round <= spec.rounds; ++round) {
      const bool commits = round == spec.rounds;
      std::vector<int32_t> right_ones(slots.size(), 0);
      now = Tokens{commits ? 1 : D, {}, {}, {}, {}, {}, {}, {}, {}};
      for (size_t n = 0; n < slots.size(); ++n) {
        // (Without a slot the tokens do not matter: another sequence's.)
        const size_t from = n + 1 < slots.size() ? n : 0;
        right_ones[n] =
            static_cast<int32_t>(commits ? 1 : (round + 2 * static_cast<int64_t>(n)) % (D + 1));
        for (int64_t t = 0; t < now.T_; ++t) {
          take(now, t < right_ones[n] ? right : wrong, static_cast<int64_t>(from),
               position[from] + t);
        }
      }
      now.o.assign(static_cast<size_t>(B * now.T_ * H * V), T(NAN));
      GkaInputs in = inputs_of(now);
      GkaOutputs out;
      in.h0 = out.h_final = dense(h.data(), {spec.num_slots, H, K, K});
      in.u0 = out.u_final = dense(u.data(), {spec.num_slots, H, K, V});
      out.o = dense_of(now.o, {B, now.T_, H, V});
      in.slots = slots;
      in.is_draft = !commits;
      std::vector<Memory> memory;
      const auto add = [&](auto& v) { memory.push_back({v.data(), v.size() * sizeof(v[0])}); };
      const auto add_tokens = [&](Tokens& t) {
        add(t.q), add(t.k), add(t.v), add(t.g), add(t.gk), add(t.alpha), add(t.beta);
      };
      add_tokens(now), add(now.o), add(h), add(u), add(slots);
      if (round > 0) {
        const GkaInputs before = inputs_of(last);
        in.last_draft = {before.k, before.v, before.g, before.gk, before.beta};
        in.accepted = accepted;
        add_tokens(last), add(accepted);
      }
      step(in, out, options, memory);
      const size_t row = static_cast<size_t>(H * V);
      for (size_t n = 0; n < slots.size(); ++n) {
        for (size_t e = 0; e < static_cast<size_t>(now.T_) * row; ++e) {
          const double o = static_cast<double>(now.o[n * static_cast<size_t>(now.T_) * row + e]);
          ASSERT_TRUE(std::isfinite(o)) << text(where, "o");
          if (slots[n] < 0) {
            ASSERT_EQ(o, 0.0) << text(where, "o of a sequence without a slot");
          }
          if (e < static_cast<size_t>(right_ones[n]) * row) outputs[n].push_back(o);
        }
        position[n] += right_ones[n];
      }
      accepted = right_ones;
      std::swap(last, now);
    }
    for (size_t n = 0; n + 1 < slots.size(); ++n) {
      const size_t slot = static_cast<size_t>(slots[n]);
      const Expected want = expected(oracle, static_cast<int64_t>(n), position[n], options);
      const std::vector<double> h_got(h.begin() + static_cast<std::ptrdiff_t>(slot * h_size),
                                      h.begin() + static_cast<std::ptrdiff_t>((slot + 1) * h_size));
      const std::vector<double> u_got(u.begin() + static_cast<std::ptrdiff_t>(slot * u_size),
                                      u.begin() + static_cast<std::ptrdiff_t>((slot + 1) * u_size));
      EXPECT_TRUE(within(where, "o", outputs[n], want.o, bound)) << "sequence " << n;
      EXPECT_TRUE(within(where, "h", h_got, want.h, state_bound)) << "sequence " << n;
      EXPECT_TRUE(within(where, "u", u_got, want.u, state_bound)) << "sequence " << n;
    }
    for (int32_t slot = 0; slot < spec.num_slots; ++slot) {
      if (std::find(slots.begin(), slots.end(), slot) != slots.end()) continue;
      for (size_t e = 0; e < h_size; ++e) {
        ASSERT_EQ(h[static_cast<size_t>(slot) * h_size + e], S(0.25)) << text(where, "another h");
      }
      for (size_t e = 0; e < u_size; ++e) {
        ASSERT_EQ(u[static_cast<size_t>(slot) * u_size + e], S(-0.5)) << text(where, "another u");
      }
    }
  }

 private:
  struct Expected {
    std::vector<double> o, h, u;
  };
  // The oracle's answer for the first `tokens` tokens of sequence n.
  Expected expected(const Case<double>& c, int64_t n, int64_t tokens, GkaOptions options) const {
    const auto part = [&](const Tensor<double>& tensor) {  // of sequence n
      const std::vector<double> all = tensor.values();
      const size_t each = all.size() / static_cast<size_t>(spec.B - 1);
      const auto begin = all.begin() + n * static_cast<std::ptrdiff_t>(each);
      return std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(each));
    };
    const std::vector<double> q = part(c.q), k = part(c.k), v = part(c.v), g = part(c.g),
                              gk = part(c.gk), alpha = part(c.alpha), beta = part(c.beta),
                              h0 = part(c.h0), u0 = part(c.u0);
    const int64_t H = spec.H, K = spec.K, V = spec.V, Hk = spec.Hk ? spec.Hk : H;
    Expected want{std::vector<double>(static_cast<size_t>(tokens * H * V)),
                  std::vector<double>(h0.size()), std::vector<double>(u0.size())};
    GkaInputs in;
    in.q = dense_of(q, {1, tokens, H, K}), in.k = dense_of(k, {1, tokens, Hk, K});
    in.v = dense_of(v, {1, tokens, H, V}), in.alpha = dense_of(alpha, {1, tokens, H});
    if (spec.gates) in.g = dense_of(g, {1, tokens, H}), in.gk = dense_of(gk, {1, tokens, H});
    if (spec.beta) in.beta = dense_of(beta, {1, tokens, H});
    in.h0 = dense_of(h0, {1, H, K, K}), in.u0 = dense_of(u0, {1, H, K, V});
    GkaOutputs out;
    out.o = dense_of(want.o, {1, tokens, H, V});
    out.h_final = dense_of(want.h, {1, H, K, K});
    out.u_final = dense_of(want.u, {1, H, K, V});
    options.backend = Backend::reference;
    gka_forward(in, out, options);
    return want;
  }

  template <class E>
  static View dense_of(std::vector<E>& v, std::initializer_list<int64_t> sizes) {
    return dense(static_cast<void*>(v.data()), DTypeOf<E>::value, sizes);
  }
  template <class E>
  static ConstView dense_of(const std::vector<E>& v, std::initializer_list<int64_t> sizes) {
    return dense(static_cast<const void*>(v.data()), DTypeOf<E>::value, sizes);
  }

  // Token t of sequence n of `from` behind what is there.
  void take(Tokens& to, const Case<T, S>& from, int64_t n, int64_t t) const {
    const auto append = [&](auto& list, const auto& tensor) {
      if (!tensor.defined()) return;
      const std::vector<double> all = tensor.values();
      const size_t row = all.size() / static_cast<size_t>((spec.B - 1) * length);
      const size_t begin = static_cast<size_t>(n * length + t) * row;
      using E = std::decay_t<decltype(list[0])>;
      for (size_t e = begin; e < begin + row; ++e) list.push_back(static_cast<E>(all[e]));
    };
    append(to.q, from.q), append(to.k, from.k), append(to.v, from.v), append(to.g, from.g);
    append(to.gk, from.gk), append(to.alpha, from.alpha), append(to.beta, from.beta);
  }
  GkaInputs inputs_of(const Tokens& t) const {
    const int64_t B = spec.B, H = spec.H, L = t.T_;
    GkaInputs in;
    in.q = dense_of(t.q, {B, L, H, spec.K});
    in.k = dense_of(t.k, {B, L, spec.Hk ? spec.Hk : H, spec.K});
    in.v = dense_of(t.v, {B, L, H, spec.V});
    in.alpha = dense_of(t.alpha, {B, L, H});
    if (spec.gates) in.g = dense_of(t.g, {B, L, H}), in.gk = dense_of(t.gk, {B, L, H});
    if (spec.beta) in.beta = dense_of(t.beta, {B, L, H});
    return in;
  }

  DecodeSpec spec;
  int64_t length = 0;  // of the right tokens
};

}  // namespace kalmanet::testing
