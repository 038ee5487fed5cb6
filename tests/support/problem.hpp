// Seeded random GKA problems for tests: a CaseSpec says what, a Case owns all the tensors.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "kalmanet/gka.hpp"
#include "support/tensor.hpp"

namespace kalmanet::testing {

struct CaseSpec {
  int64_t B = 1, T = 16, H = 2;
  int64_t Hq = 0, Hk = 0, Hv = 0;  // 0: H
  int64_t K = 8, V = 8;
  bool g = false, gk = false;
  bool same_gate = false;  // gk is the very tensor g (needs g and gk)
  bool alpha = false, beta = false;
  bool ridge_tensor = false;  // a_t log-uniform in [ridge_ratio, 4 ridge_ratio]
  bool h0 = false, u0 = false;
  double ridge_ratio = 0.02;
  double memory = 32;        // typical decay length of the gates in tokens; 0: gates of all zeros
  double memory_ratio = 1;   // of a head's memory to that of the head before it
  double gate_spread = 0.5;  // of the logarithm of a token's decay (a normal deviate's)
  std::vector<int64_t> lengths;  // packed sequences; B is 1 and T their sum then
  bool strided = false;          // awkward layouts with gaps (tensor.hpp), each tensor its own
  int64_t row_gap = 0;           // elements after each row of the plain layout
  uint64_t seed = 1;
  bool unit_keys = true;       // keys of norm 1 (else of about 1, each its own); queries likewise
  double key_size = 1;         // what keys are multiplied by
  double key_correlation = 0;  // mean inner product of two unit keys of a head, 0..1

  int64_t num_q_heads() const { return Hq ? Hq : H; }
  int64_t num_k_heads() const { return Hk ? Hk : H; }
  int64_t num_v_heads() const { return Hv ? Hv : H; }
  int64_t num_sequences() const { return lengths.empty() ? B : std::ssize(lengths); }
};

// One line for failure messages.
inline std::string describe(const CaseSpec& s) {
  std::ostringstream out;
  out << "B=" << s.B << " T=" << s.T << " H=" << s.H << " (q " << s.num_q_heads() << ", k "
      << s.num_k_heads() << ", v " << s.num_v_heads() << ") K=" << s.K << " V=" << s.V
      << " ridge_ratio=" << s.ridge_ratio << (s.ridge_tensor ? "..x4 per token" : "");
  for (const auto& [on, text] : {std::pair{s.g, " g"},
                                 {s.gk, " gk"},
                                 {s.same_gate, " (one gate)"},
                                 {s.alpha, " alpha"},
                                 {s.beta, " beta"},
                                 {s.h0, " h0"},
                                 {s.u0, " u0"},
                                 {s.strided, " strided"}}) {
    if (on) out << text;
  }
  if (s.g || s.gk) out << " memory=" << s.memory;
  if (s.row_gap != 0) out << " row_gap=" << s.row_gap;
  if (s.memory_ratio != 1) out << " memory_ratio=" << s.memory_ratio;
  if (s.gate_spread != 0.5) out << " gate_spread=" << s.gate_spread;
  if (s.key_correlation != 0) out << " key_correlation=" << s.key_correlation;
  if (s.key_size != 1) out << " key_size=" << s.key_size;
  if (!s.unit_keys) out << " keys of any length";
  if (!s.lengths.empty()) {
    out << " packed:";
    for (int64_t n : s.lengths) out << ' ' << n;
  }
  out << " seed=" << s.seed;
  return out.str();
}

// All tensors of one problem: random inputs, random output gradients, and room (NaN until written)
// for outputs and input gradients. The views that inputs(), outputs()... return point into the
// Case. G: what the per-token tensors and x are made of, T or (beside 16-bit T) float.
template <class T, class G = T>
struct Case {
  using S = StateOf<T>;
  CaseSpec spec;
  Tensor<T> q, k, v;
  Tensor<G> g, gk, alpha, beta, ridge_ratio;
  Tensor<S> h0, u0;
  Tensor<T> o;
  Tensor<S> h_final, u_final;
  Tensor<G> x, residual;
  Tensor<T> d_o;
  Tensor<S> d_h_final, d_u_final;
  Tensor<T> dq, dk, dv;
  Tensor<G> dg, dgk, dalpha, dbeta, d_ridge_ratio;
  Tensor<S> d_h0, d_u0;
  std::vector<int64_t> cu_seqlens;

  Case() = default;
  explicit Case(CaseSpec s) : spec(std::move(s)) {
    if (!spec.lengths.empty()) {
      spec.B = 1;
      cu_seqlens.push_back(0);
      for (int64_t n : spec.lengths) cu_seqlens.push_back(cu_seqlens.back() + n);
      spec.T = cu_seqlens.back();
    }
    Random layout(spec.seed + 0x1000), random(spec.seed);
    const int64_t B = spec.B, L = spec.T, H = spec.H, K = spec.K, V = spec.V;
    const int64_t N = spec.num_sequences();
    const auto make = [&]<class E>(Tensor<E>& tensor, std::vector<int64_t> sizes) -> Tensor<E>& {
      const int64_t gap = sizes.size() == 4 ? spec.row_gap : 0;
      return tensor = Tensor<E>(std::move(sizes), spec.strided, layout, gap);
    };
    const std::vector<int64_t> scalar = {B, L, H}, state_h = {N, H, K, K}, state_u = {N, H, K, V};

    make(q, {B, L, spec.num_q_heads(), K}).assign(vectors(B * L, spec.num_q_heads(), K, 0, random));
    make(k, {B, L, spec.num_k_heads(), K})
        .assign(vectors(B * L, spec.num_k_heads(), K, spec.key_correlation, random, spec.key_size));
    make(v, {B, L, spec.num_v_heads(), V}).fill([&](int64_t) { return random.normal(); });
    // Around 1/memory: by default mostly within a factor of e either way.
    const auto decay = [&](int64_t i) {
      const double spread = std::exp(spec.gate_spread * random.normal());
      const double memory = spec.memory * std::pow(spec.memory_ratio, static_cast<double>(i % H));
      return spec.memory > 0 ? -spread / memory : 0.0;
    };
    if (spec.g) make(g, scalar).fill(decay);
    if (spec.gk && !spec.same_gate) make(gk, scalar).fill(decay);
    if (spec.alpha) make(alpha, scalar).fill([&](int64_t) { return random.uniform(); });
    if (spec.beta) make(beta, scalar).fill([&](int64_t) { return random.uniform(0.2, 1); });
    if (spec.ridge_tensor) {
      make(ridge_ratio, scalar).fill([&](int64_t) {
        // Rounding to float32 must not fall below the ratio that bounds are chosen by.
        return spec.ridge_ratio * std::exp(random.uniform(1e-6, std::log(4.0)));
      });
    }
    if (spec.h0) make(h0, state_h);
    if (spec.u0) make(u0, state_u);
    fill_states(random);

    make(o, {B, L, H, V});
    make(x, {B, L, H, K});
    make(residual, scalar);
    make(h_final, state_h);
    make(u_final, state_u);
    const auto normal = [&](int64_t) { return random.normal(); };
    make(d_o, {B, L, H, V}).fill(normal);
    make(d_h_final, state_h).fill(normal);
    make(d_u_final, state_u).fill(normal);

    make(dq, {B, L, spec.num_q_heads(), K});
    make(dk, {B, L, spec.num_k_heads(), K});
    make(dv, {B, L, spec.num_v_heads(), V});
    if (spec.g) make(dg, scalar);
    if (spec.gk) make(dgk, scalar);
    if (spec.alpha) make(dalpha, scalar);
    if (spec.beta) make(dbeta, scalar);
    make(d_ridge_ratio, scalar);
    if (spec.h0) make(d_h0, state_h);
    if (spec.u0) make(d_u0, state_u);
  }

  GkaInputs inputs() const {
    GkaInputs in;
    in.q = q.view();
    in.k = k.view();
    in.v = v.view();
    in.g = g.view();
    in.gk = spec.same_gate ? g.view() : gk.view();
    in.alpha = alpha.view();
    in.beta = beta.view();
    in.ridge_ratio = ridge_ratio.view();
    in.h0 = h0.view();
    in.u0 = u0.view();
    in.cu_seqlens = cu_seqlens;
    return in;
  }
  GkaOptions options() const {
    GkaOptions options;
    options.ridge_ratio = spec.ridge_ratio;
    return options;
  }
  GkaOutputs outputs() {
    return {o.view(), h_final.view(), u_final.view(), x.view(), residual.view(), {}};
  }
  GkaOutputGrads output_grads() const { return {d_o.view(), d_h_final.view(), d_u_final.view()}; }
  GkaInputGrads grads() {
    GkaInputGrads out;
    out.dq = dq.view();
    out.dk = dk.view();
    out.dv = dv.view();
    out.dg = dg.view();
    out.dgk = dgk.view();
    out.dalpha = dalpha.view();
    out.dbeta = dbeta.view();
    out.d_ridge_ratio = d_ridge_ratio.view();
    out.d_h0 = d_h0.view();
    out.d_u0 = d_u0.view();
    return out;
  }

  // Forgets what was computed: outputs and gradients are NaN again.
  void clear_results() {
    const auto clear = [](auto&... tensors) { (tensors.clear(), ...); };
    clear(o, h_final, u_final, x, residual, dq, dk, dv, dg, dgk, dalpha, dbeta, d_ridge_ratio, d_h0,
          d_u0);
  }
  // No gap between the elements of any result was written to.
  bool gaps_intact() const {
    const auto intact = [](const auto&... tensors) { return (tensors.gaps_intact() && ...); };
    return intact(o, h_final, u_final, x, residual, dq, dk, dv, dg, dgk, dalpha, dbeta,
                  d_ridge_ratio, d_h0, d_u0);
  }

 private:
  // count x heads vectors of size dim: unit (or not) and, within a head, correlated.
  std::vector<double> vectors(int64_t count, int64_t heads, int64_t dim, double correlation,
                              Random& random, double size = 1) const {
    const auto unit = [&](double* y) {
      double sum = 0;
      for (int64_t i = 0; i < dim; ++i) {
        y[i] = random.normal();
        sum += y[i] * y[i];
      }
      for (int64_t i = 0; i < dim; ++i) y[i] /= std::sqrt(sum);
    };
    std::vector<double> common(static_cast<size_t>(heads * dim)), all, y(static_cast<size_t>(dim));
    for (int64_t h = 0; h < heads; ++h) unit(&common[static_cast<size_t>(h * dim)]);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        unit(y.data());
        double sum = 0;
        for (int64_t d = 0; d < dim; ++d) {
          double& e = y[static_cast<size_t>(d)];
          e = std::sqrt(1 - correlation) * e +
              std::sqrt(correlation) * common[static_cast<size_t>(h * dim + d)];
          sum += e * e;
        }
        const double length = size * (spec.unit_keys ? 1.0 : std::exp(0.5 * random.normal()));
        for (double e : y) all.push_back(e * length / std::sqrt(sum));
      }
    }
    return all;
  }

  // As if up to 40 (K for the smaller) earlier pairs had been seen: H is positive semi-definite.
  void fill_states(Random& random) {
    if (!spec.h0 && !spec.u0) return;
    const int64_t K = spec.K, V = spec.V, pairs = std::min<int64_t>(40, 2 * K);
    std::vector<double> h, u;
    for (int64_t s = 0; s < spec.num_sequences() * spec.H; ++s) {
      const std::vector<double> keys =
          vectors(pairs, 1, K, spec.key_correlation, random, spec.key_size);
      std::vector<double> hs(static_cast<size_t>(K * K)), us(static_cast<size_t>(K * V));
      for (int64_t p = 0; p < pairs; ++p) {
        const double* key = &keys[static_cast<size_t>(p * K)];
        std::vector<double> value(static_cast<size_t>(V));
        for (double& e : value) e = random.normal();
        for (int64_t i = 0; i < K; ++i) {
          for (int64_t j = 0; j < K; ++j) hs[static_cast<size_t>(i * K + j)] += key[i] * key[j];
          for (int64_t j = 0; j < V; ++j) {
            us[static_cast<size_t>(i * V + j)] += key[i] * value[static_cast<size_t>(j)];
          }
        }
      }
      h.insert(h.end(), hs.begin(), hs.end());
      u.insert(u.end(), us.begin(), us.end());
    }
    if (spec.h0) h0.assign(h);
    if (spec.u0) u0.assign(u);
  }
};

// The same problem, values and layouts in float64, results included.
template <class T, class G>
Case<double> to_double(const Case<T, G>& c) {
  Case<double> d;
  d.spec = c.spec;
  d.cu_seqlens = c.cu_seqlens;
  const auto copy = [&](auto member_d, auto member_f) {
    d.*member_d = (c.*member_f).template as<double>();
  };
  using D = Case<double>;
  using F = Case<T, G>;
  copy(&D::q, &F::q), copy(&D::k, &F::k), copy(&D::v, &F::v);
  copy(&D::g, &F::g), copy(&D::gk, &F::gk), copy(&D::alpha, &F::alpha), copy(&D::beta, &F::beta);
  copy(&D::ridge_ratio, &F::ridge_ratio), copy(&D::h0, &F::h0), copy(&D::u0, &F::u0);
  copy(&D::o, &F::o), copy(&D::h_final, &F::h_final), copy(&D::u_final, &F::u_final);
  copy(&D::x, &F::x), copy(&D::residual, &F::residual);
  copy(&D::d_o, &F::d_o), copy(&D::d_h_final, &F::d_h_final), copy(&D::d_u_final, &F::d_u_final);
  copy(&D::dq, &F::dq), copy(&D::dk, &F::dk), copy(&D::dv, &F::dv), copy(&D::dg, &F::dg);
  copy(&D::dgk, &F::dgk), copy(&D::dalpha, &F::dalpha), copy(&D::dbeta, &F::dbeta);
  copy(&D::d_ridge_ratio, &F::d_ridge_ratio), copy(&D::d_h0, &F::d_h0), copy(&D::d_u0, &F::d_u0);
  return d;
}

// |a - b| / |b| over all elements; |a| where b is zero; infinite where sizes differ or a number is
// not finite (so that NaN never passes for a small error).
template <class A, class B>
double relative_error(std::span<const A> a, std::span<const B> b) {
  if (a.size() != b.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double e = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += e * e;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  return std::isfinite(error) ? error : INFINITY;
}
inline double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
  return relative_error(std::span<const double>(a), std::span<const double>(b));
}
inline double relative_error(const ConstView& a, const ConstView& b) {
  return relative_error(values(a), values(b));
}

}  // namespace kalmanet::testing
