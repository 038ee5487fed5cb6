// From views, head groups and packed sequences to the token loop of one head, and back.
#include "reference/oracle.hpp"

#include <algorithm>

#include "core/half.hpp"
#include "reference/token_loop.hpp"

namespace kalmanet::reference {
namespace {

double load(const ConstView& view, int64_t offset) {
  return core::load_element(view.dtype, view.data, offset);
}
void store(const View& view, int64_t offset, double value) {
  core::store_element(view.dtype, view.data, offset, value);
}

// Tokens of one sequence and head of a [B,T,H,D] or [B,T,H] tensor, as an array [length, D].
template <class Real>
Array<Real> read_tokens(const ConstView& view, const core::Sequence& s, int64_t head,
                        double absent) {
  const int64_t D = view.rank == 4 ? view.size[3] : 1;  // rank 3: d is 0 alone
  Array<Real> result(static_cast<size_t>(s.length() * D), static_cast<Real>(absent));
  if (!view.defined()) return result;
  for (int64_t t = 0; t < s.length(); ++t) {
    const int64_t row =
        s.row * view.stride[0] + (s.begin + t) * view.stride[1] + head * view.stride[2];
    for (int64_t d = 0; d < D; ++d) {
      result[static_cast<size_t>(t * D + d)] =
          static_cast<Real>(load(view, row + d * view.stride[3]));
    }
  }
  return result;
}

template <class Real>
void write_tokens(const View& view, const core::Sequence& s, int64_t head,
                  const Array<Real>& values) {
  if (!view.defined()) return;
  const int64_t D = view.rank == 4 ? view.size[3] : 1;  // rank 3: d is 0 alone
  for (int64_t t = 0; t < s.length(); ++t) {
    const int64_t row =
        s.row * view.stride[0] + (s.begin + t) * view.stride[1] + head * view.stride[2];
    for (int64_t d = 0; d < D; ++d) {
      store(view, row + d * view.stride[3], values[static_cast<size_t>(t * D + d)]);
    }
  }
}

// One head of one sequence's state [N,H,rows,columns]; zeros where absent.
template <class Real>
Array<Real> read_state(const ConstView& view, int64_t n, int64_t head, int64_t rows,
                       int64_t columns) {
  Array<Real> result(static_cast<size_t>(rows * columns), Real(0));
  if (!view.defined()) return result;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      result[static_cast<size_t>(i * columns + j)] =
          static_cast<Real>(load(view, n * view.stride[0] + head * view.stride[1] +
                                           i * view.stride[2] + j * view.stride[3]));
    }
  }
  return result;
}

template <class Real>
void write_state(const View& view, int64_t n, int64_t head, int64_t rows, int64_t columns,
                 const Array<Real>& values) {
  if (!view.defined()) return;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      store(view,
            n * view.stride[0] + head * view.stride[1] + i * view.stride[2] + j * view.stride[3],
            values[static_cast<size_t>(i * columns + j)]);
    }
  }
}

// Solver steps of each token: fixed, or by the smallest ridge ratio of the token's chunk. Chunks
// are counted from the sequence's first token.
template <class Real>
std::vector<int> choose_num_iter(const core::GkaProblem& p, const Array<Real>& a) {
  const int64_t T = std::ssize(a);
  if (p.options.solver == Solver::direct || p.options.solver == Solver::automatic) {
    return std::vector<int>(a.size(), 0);
  }
  if (p.options.num_iter != kAutoNumIter) return std::vector<int>(a.size(), p.options.num_iter);
  const int64_t C = p.options.chunk_size ? p.options.chunk_size : kDefaultChunkSize;
  std::vector<int> steps;
  for (int64_t begin = 0; begin < T; begin += C) {
    const int64_t end = std::min(T, begin + C);
    const double smallest = *std::min_element(a.begin() + begin, a.begin() + end);
    steps.resize(static_cast<size_t>(end), chebyshev_num_iter(smallest, p.options.tolerance));
  }
  return steps;
}

template <class Real>
struct LoadedHead {
  Head<Real> head;
  Array<Real> k, v, beta;  // as given, beta not yet multiplied in
};

template <class Real>
LoadedHead<Real> load_head(const core::GkaProblem& p, const core::Sequence& s, int64_t h) {
  LoadedHead<Real> loaded;
  Head<Real>& in = loaded.head;
  in.T = s.length();
  in.K = p.K;
  in.V = p.V;
  in.q = read_tokens<Real>(p.inputs.q, s, h / p.q_group, 0);
  loaded.k = in.k = read_tokens<Real>(p.inputs.k, s, h / p.k_group, 0);
  loaded.v = in.v = read_tokens<Real>(p.inputs.v, s, h / p.v_group, 0);
  loaded.beta = read_tokens<Real>(p.inputs.beta, s, h, 1);
  for (int64_t t = 0; t < in.T; ++t) {
    for (int64_t i = 0; i < in.K; ++i) in.k[t * in.K + i] *= loaded.beta[t];
    for (int64_t i = 0; i < in.V; ++i) in.v[t * in.V + i] *= loaded.beta[t];
  }
  in.g = read_tokens<Real>(p.inputs.g, s, h, 0);
  in.gk = read_tokens<Real>(p.inputs.gk, s, h, 0);
  in.alpha = read_tokens<Real>(p.inputs.alpha, s, h, 1);
  in.a = read_tokens<Real>(p.inputs.ridge_ratio, s, h, p.options.ridge_ratio);
  in.h0 = read_state<Real>(p.inputs.h0, s.index, h, p.K, p.K);
  in.u0 = read_state<Real>(p.inputs.u0, s.index, h, p.K, p.V);
  in.scale = static_cast<Real>(p.scale);
  in.solver = p.options.solver;
  in.num_iter = choose_num_iter(p, in.a);
  in.bp_lambda = p.options.bp_lambda;
  return loaded;
}

GkaReport make_report(const core::GkaProblem& p, const std::vector<std::vector<int>>& num_iters) {
  GkaReport report;
  report.backend = Backend::reference;
  report.instruction_set = InstructionSet::baseline;
  report.chunk_size = p.options.chunk_size ? p.options.chunk_size : kDefaultChunkSize;
  bool first = true;
  for (const std::vector<int>& steps : num_iters) {
    for (int r : steps) {
      report.min_iterations = first ? r : std::min(report.min_iterations, r);
      report.max_iterations = std::max(report.max_iterations, r);
      first = false;
    }
  }
  return report;
}

// Sums head h's [length, D] values into its group's place of an array [B,T,groups,D].
template <class Real>
void add_group(const View& view, const core::Sequence& s, const std::vector<Array<Real>>& heads,
               int64_t group) {
  if (!view.defined()) return;
  for (int64_t g = 0; g < view.size[2]; ++g) {
    Array<Real> sum = heads[static_cast<size_t>(g * group)];
    for (int64_t h = g * group + 1; h < (g + 1) * group; ++h) {
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += heads[static_cast<size_t>(h)][i];
    }
    write_tokens(view, s, g, sum);
  }
}

}  // namespace

template <class Real>
GkaReport forward(const core::GkaProblem& p, const GkaOutputs& outputs) {
  std::vector<std::vector<int>> num_iters(static_cast<size_t>(p.N * p.H));
  p.executor->run(p.N * p.H, [&](int64_t task) {
    const core::Sequence& s = p.sequences[static_cast<size_t>(task / p.H)];
    const int64_t h = task % p.H;
    const Head<Real> in = load_head<Real>(p, s, h).head;
    const HeadOutputs<Real> out = forward(in);
    write_tokens(outputs.o, s, h, out.o);
    write_tokens(outputs.x, s, h, out.x);
    write_tokens(outputs.residual, s, h, out.residual);
    write_state(outputs.h_final, s.index, h, p.K, p.K, out.h);
    write_state(outputs.u_final, s.index, h, p.K, p.V, out.u);
    num_iters[static_cast<size_t>(task)] = in.num_iter;
  });
  return make_report(p, num_iters);
}

template <class Real>
GkaReport step(const core::GkaProblem& p, const GkaOutputs& outputs) {
  std::vector<std::vector<int>> num_iters(static_cast<size_t>(p.N * p.H));
  p.executor->run(p.N * p.H, [&](int64_t task) {
    const core::Sequence& s = p.sequences[static_cast<size_t>(task / p.H)];
    const int64_t h = task % p.H;
    Head<Real> in = load_head<Real>(p, s, h).head;
    HeadOutputs<Real> out;
    if (s.accepted > 0) {
      // As a problem of its own, whose queries nobody asks about: k in their place.
      core::GkaProblem draft = p;
      const GkaDraft& last = p.inputs.last_draft;
      draft.inputs.q = draft.inputs.k = last.k;
      draft.inputs.v = last.v;
      draft.inputs.g = last.g, draft.inputs.gk = last.gk, draft.inputs.beta = last.beta;
      draft.inputs.alpha = draft.inputs.ridge_ratio = {};
      draft.q_group = p.k_group;
      out = forward(load_head<Real>(draft, {s.index, s.row, 0, s.accepted}, h).head);
      in.h0 = out.h;
      in.u0 = out.u;
    }
    const Array<Real> h_before = in.h0, u_before = in.u0;
    out = forward(in);
    write_tokens(outputs.o, s, h, out.o);
    write_tokens(outputs.x, s, h, out.x);
    write_tokens(outputs.residual, s, h, out.residual);
    const bool is_draft = p.inputs.is_draft;
    write_state(outputs.h_final, s.index, h, p.K, p.K, is_draft ? h_before : out.h);
    write_state(outputs.u_final, s.index, h, p.K, p.V, is_draft ? u_before : out.u);
    num_iters[static_cast<size_t>(task)] = in.num_iter;
  });
  return make_report(p, num_iters);
}

template <class Real>
GkaReport backward(const core::GkaProblem& p, const ConstView& saved_x,
                   const GkaOutputGrads& output_grads, const GkaInputGrads& grads) {
  std::vector<std::vector<int>> num_iters(static_cast<size_t>(p.N * p.H));
  for (const core::Sequence& s : p.sequences) {
    const size_t H = static_cast<size_t>(p.H);
    std::vector<Array<Real>> dq(H), dk(H), dv(H);  // kept until a group's heads can be summed
    p.executor->run(p.H, [&](int64_t h) {
      const LoadedHead<Real> loaded = load_head<Real>(p, s, h);
      const Head<Real>& in = loaded.head;
      const Array<Real> x = saved_x.defined() ? read_tokens<Real>(saved_x, s, h, 0) : forward(in).x;
      const HeadOutputGrads<Real> d_out = {
          read_tokens<Real>(output_grads.d_o, s, h, 0),
          read_state<Real>(output_grads.d_h_final, s.index, h, p.K, p.K),
          read_state<Real>(output_grads.d_u_final, s.index, h, p.K, p.V)};
      HeadGrads<Real> out = backward(in, x, d_out);

      // k and v went in times beta: dbeta = dk . k + dv . v, and dk, dv are multiplied by it.
      Array<Real> dbeta(static_cast<size_t>(in.T), Real(0));
      for (int64_t t = 0; t < in.T; ++t) {
        for (int64_t i = 0; i < in.K; ++i) {
          dbeta[t] += out.dk[t * in.K + i] * loaded.k[t * in.K + i];
          out.dk[t * in.K + i] *= loaded.beta[t];
        }
        for (int64_t i = 0; i < in.V; ++i) {
          dbeta[t] += out.dv[t * in.V + i] * loaded.v[t * in.V + i];
          out.dv[t * in.V + i] *= loaded.beta[t];
        }
      }
      write_tokens(grads.dg, s, h, out.dg);
      write_tokens(grads.dgk, s, h, out.dgk);
      write_tokens(grads.dalpha, s, h, out.dalpha);
      write_tokens(grads.dbeta, s, h, dbeta);
      write_tokens(grads.d_ridge_ratio, s, h, out.da);
      write_state(grads.d_h0, s.index, h, p.K, p.K, out.dh0);
      write_state(grads.d_u0, s.index, h, p.K, p.V, out.du0);
      dq[static_cast<size_t>(h)] = std::move(out.dq);
      dk[static_cast<size_t>(h)] = std::move(out.dk);
      dv[static_cast<size_t>(h)] = std::move(out.dv);
      num_iters[static_cast<size_t>(s.index * p.H + h)] = in.num_iter;
    });
    add_group(grads.dq, s, dq, p.q_group);
    add_group(grads.dk, s, dk, p.k_group);
    add_group(grads.dv, s, dv, p.v_group);
  }
  return make_report(p, num_iters);
}

template GkaReport forward<float>(const core::GkaProblem&, const GkaOutputs&);
template GkaReport forward<double>(const core::GkaProblem&, const GkaOutputs&);
template GkaReport step<double>(const core::GkaProblem&, const GkaOutputs&);
template GkaReport backward<float>(const core::GkaProblem&, const ConstView&, const GkaOutputGrads&,
                                   const GkaInputGrads&);
template GkaReport backward<double>(const core::GkaProblem&, const ConstView&,
                                    const GkaOutputGrads&, const GkaInputGrads&);

}  // namespace kalmanet::reference
