// The token loop of the layer and of its gradient.
#include "reference/token_loop.hpp"

#include <algorithm>
#include <cmath>

namespace kalmanet::reference {
namespace {

// The two running states of one head.
template <class Real>
struct State {
  Array<Real> H, U;
};

// H = e^{gk_t} H + k_t k_t^T,   U = e^{g_t} U + k_t v_t^T
template <class Real>
void advance(const Head<Real>& in, int64_t t, State<Real>& s) {
  const Real decay_h = std::exp(in.gk[t]), decay_u = std::exp(in.g[t]);
  const Real *k = &in.k[t * in.K], *v = &in.v[t * in.V];
  for (int64_t i = 0; i < in.K; ++i) {
    for (int64_t j = 0; j < in.K; ++j) {
      s.H[i * in.K + j] = decay_h * s.H[i * in.K + j] + k[i] * k[j];
    }
    for (int64_t j = 0; j < in.V; ++j) {
      s.U[i * in.V + j] = decay_u * s.U[i * in.V + j] + k[i] * v[j];
    }
  }
}

template <class Real>
Real dot(const Real* a, const Real* b, int64_t n) {
  Real sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class Real>
bool vanished(Real f) {
  return f <= static_cast<Real>(kVanishedNorm);
}

// The states after token t for falling t, recomputed from one kept every kStride tokens: all of
// them together would not fit (T K (K + V) numbers).
template <class Real>
class StateTape {
 public:
  explicit StateTape(const Head<Real>& in) : in_(in) {
    State<Real> s{in.h0, in.u0};
    for (int64_t t = 0; t < in.T; ++t) {
      if (t % kStride == 0) kept_.push_back(s);
      advance(in, t, s);
    }
  }
  const State<Real>& after(int64_t t) {
    const int64_t block = t / kStride;
    if (block != block_) {
      block_ = block;
      states_.clear();
      State<Real> s = kept_[block];
      for (int64_t u = block * kStride; u < std::min(in_.T, (block + 1) * kStride); ++u) {
        advance(in_, u, s);
        states_.push_back(s);
      }
    }
    return states_[t - block * kStride];
  }
  // Stays valid beside after(t): both are of one block, or this one is kept anyway.
  const State<Real>& before(int64_t t) {
    return t % kStride == 0 ? kept_[t / kStride] : after(t - 1);
  }

 private:
  static constexpr int64_t kStride = 32;
  const Head<Real>& in_;
  std::vector<State<Real>> kept_;    // before token 0, kStride, 2 kStride...
  std::vector<State<Real>> states_;  // after each token of block_
  int64_t block_ = -1;
};

}  // namespace

template <class Real>
HeadOutputs<Real> forward(const Head<Real>& in) {
  const int64_t T = in.T, K = in.K, V = in.V;
  HeadOutputs<Real> out;
  out.o.assign(T * V, Real(0));
  out.x.assign(T * K, Real(0));
  out.residual.assign(T, Real(0));
  State<Real> s{in.h0, in.u0};
  Array<Real> m(K), Mx(K);
  for (int64_t t = 0; t < T; ++t) {
    advance(in, t, s);
    const Real f = frobenius_norm(s.H);
    const Real lambda = in.a[t] * f;
    const Real* q = &in.q[t * K];
    Real* x = &out.x[t * K];
    solve(in.solver, in.num_iter[t], s.H, f, lambda, q, x, K);  // x_t = (H_t + lambda_t I)^-1 q_t

    // m_t = q_t + alpha_t (x_t - q_t),   o_t = scale U_t^T m_t
    for (int64_t i = 0; i < K; ++i) m[i] = q[i] + in.alpha[t] * (x[i] - q[i]);
    Real* o = &out.o[t * V];
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < V; ++j) o[j] += in.scale * m[i] * s.U[i * V + j];
    }

    const Real q_norm = std::sqrt(dot(q, q, K));
    if (!vanished(f) && q_norm != 0) {
      apply_system(s.H, lambda, x, Mx.data(), K);
      for (int64_t i = 0; i < K; ++i) Mx[i] -= q[i];
      out.residual[t] = std::sqrt(dot(Mx.data(), Mx.data(), K)) / q_norm;
    }
  }
  out.h = std::move(s.H);
  out.u = std::move(s.U);
  return out;
}

template <class Real>
HeadGrads<Real> backward(const Head<Real>& in, const Array<Real>& x_all,
                         const HeadOutputGrads<Real>& output_grads) {
  const int64_t T = in.T, K = in.K, V = in.V;
  HeadGrads<Real> out;
  out.dq.assign(T * K, Real(0));
  out.dk.assign(T * K, Real(0));
  out.dv.assign(T * V, Real(0));
  out.dg.assign(T, Real(0));
  out.dgk.assign(T, Real(0));
  out.dalpha.assign(T, Real(0));
  out.da.assign(T, Real(0));

  Array<Real> D = output_grads.dh, E = output_grads.du;
  Array<Real> m(K), dm(K), alpha_dm(K), z(K);
  StateTape<Real> states(in);
  for (int64_t t = T - 1; t >= 0; --t) {
    const auto& [H_prev, U_prev] = states.before(t);
    const auto& [H, U] = states.after(t);
    const Real *q = &in.q[t * K], *k = &in.k[t * K], *v = &in.v[t * V], *x = &x_all[t * K];
    const Real* d_o = &output_grads.d_o[t * V];
    const Real alpha = in.alpha[t], a = in.a[t];
    const Real f = frobenius_norm(H), lambda = a * f;

    // dm_t = scale U_t do_t,   dalpha_t = dm_t . (x_t - q_t)
    for (int64_t i = 0; i < K; ++i) {
      dm[i] = in.scale * dot(&U[i * V], d_o, V);
      out.dalpha[t] += dm[i] * (x[i] - q[i]);
      m[i] = q[i] + alpha * (x[i] - q[i]);
      alpha_dm[i] = alpha * dm[i];
    }
    // z_t = (H_t + lambda_t I)^-1 (alpha_t dm_t), zero like x_t where f_t has vanished
    solve(in.solver, in.num_iter[t], H, f, lambda, alpha_dm.data(), z.data(), K);
    const Real zx = dot(z.data(), x, K);

    // dq_t = (1 - alpha_t) dm_t + z_t,   da_t = -(z_t . x_t) f_t
    for (int64_t i = 0; i < K; ++i) out.dq[t * K + i] = (1 - alpha) * dm[i] + z[i];
    out.da[t] = -zx * f;

    // E += scale m_t do_t^T,   D += -z_t x_t^T - (z_t . x_t) a_t H_t / f_t
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < V; ++j) E[i * V + j] += in.scale * m[i] * d_o[j];
    }
    if (!vanished(f)) {
      const Real through_f = in.bp_lambda ? zx * a / f : Real(0);
      for (int64_t i = 0; i < K; ++i) {
        for (int64_t j = 0; j < K; ++j) D[i * K + j] -= z[i] * x[j] + through_f * H[i * K + j];
      }
    }

    // dk_t = (D + D^T) k_t + E v_t,   dv_t = E^T k_t
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < K; ++j) {
        out.dk[t * K + i] += D[i * K + j] * k[j];
        out.dk[t * K + j] += D[i * K + j] * k[i];
      }
      out.dk[t * K + i] += dot(&E[i * V], v, V);
      for (int64_t j = 0; j < V; ++j) out.dv[t * V + j] += E[i * V + j] * k[i];
    }
    // dgk_t = e^{gk_t} <D, H_{t-1}>,   dg_t = e^{g_t} <E, U_{t-1}>
    const Real decay_h = std::exp(in.gk[t]), decay_u = std::exp(in.g[t]);
    out.dgk[t] = decay_h * dot(D.data(), H_prev.data(), K * K);
    out.dg[t] = decay_u * dot(E.data(), U_prev.data(), K * V);
    // D *= e^{gk_t},   E *= e^{g_t}
    for (Real& d : D) d *= decay_h;
    for (Real& e : E) e *= decay_u;
  }
  out.dh0 = std::move(D);
  out.du0 = std::move(E);
  return out;
}

template HeadOutputs<float> forward(const Head<float>&);
template HeadOutputs<double> forward(const Head<double>&);
template HeadGrads<float> backward(const Head<float>&, const Array<float>&,
                                   const HeadOutputGrads<float>&);
template HeadGrads<double> backward(const Head<double>&, const Array<double>&,
                                    const HeadOutputGrads<double>&);

}  // namespace kalmanet::reference
