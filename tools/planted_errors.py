"""The errors that tools/plant_errors plants: where, the right text, the wrong one, and the test
that must turn red."""

from typing import NamedTuple


class Planted(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    test: str = "cpu_gka_test"


ERRORS = [
    Planted(
        "chebyshev: momentum of the step before",
        "src/cpu/chebyshev.hpp",
        "w[t] = 1.0 / (1.0 - c.rho2[t] * w[t]);\n      momentum",
        "momentum",
    ),
    Planted(
        "chebyshev: one iteration too few",
        "src/cpu/chebyshev.hpp",
        "iteration < num_iter; ++iteration) {\n    for (int64_t t",
        "iteration < num_iter - 1; ++iteration) {\n    for (int64_t t",
    ),
    Planted(
        "bf16: the state's part does not decay",
        "src/cpu/bf16_chebyshev.hpp",
        "tile.scale_lanes(c.h_decay->since_start);",
        "",
    ),
    Planted(
        "bf16: a pair holds its even row twice",
        "src/cpu/bf16_chebyshev.hpp",
        "Vec::store(to + ld, rounded(odd));",
        "Vec::store(to + ld, rounded(even));",
    ),
    Planted(
        "bf16: nothing is rounded",
        "src/cpu/bf16_chebyshev.hpp",
        "return Vec::Half::load_bf16(bits);",
        "return a;",
    ),
    Planted(
        "chunk: a token does not see its own key",
        "src/cpu/chunk.hpp",
        "const S m = real && j <= t ?",
        "const S m = real && j < t ?",
    ),
    Planted(
        "chunk: the norm forgets the cross term",
        "src/cpu/chunk.hpp",
        "2.0 * e * cross",
        "1.0 * e * cross",
    ),
    Planted(
        "chunk: the state does not decay",
        "src/cpu/chunk.hpp",
        "rank_update<Vec>(to, {from, d.total}, cols",
        "rank_update<Vec>(to, {from, S{1}}, cols",
    ),
    Planted(
        "forward: alpha is ignored",
        "src/cpu/gka_forward.hpp",
        "Vec::fma(alpha, Vec::sub(Vec::load(x + at), q), q)",
        "Vec::load(x + at)",
    ),
    Planted(
        "forward: the read-out does not decay",
        "src/cpu/gka_forward.hpp",
        "tile.scale_lanes(c.u_decay->since_start);",
        "",
    ),
    Planted(
        "forward: first tokens in float32",
        "src/cpu/gka_forward.hpp",
        "bool ill = kHasWider<Vec> && job.starts_sequence && t0 == job.begin;",
        "bool ill = false;",
    ),
    Planted(
        "direct: a token sees the key after its own",
        "src/cpu/direct.hpp",
        "for (int64_t t = 0; t < j; ++t) d.s[",
        "for (int64_t t = 0; t + 1 < j; ++t) d.s[",
    ),
    Planted(
        "direct: one inner step too few",
        "src/cpu/direct.hpp",
        "for (int i = 0; i < steps; ++i) {",
        "for (int i = 0; i + 1 < steps; ++i) {",
    ),
    Planted(
        "direct: keys with the whole decay",
        "src/cpu/direct.hpp",
        "static_cast<Elem>(1.0 / std::sqrt(since))",
        "static_cast<Elem>(1.0 / since)",
    ),
    Planted(
        "direct: the shift on the wrong side",
        "src/cpu/direct.hpp",
        "d.shift[t] = shift - d.mu;",
        "d.shift[t] = d.mu - shift;",
    ),
    Planted(
        "direct: the backward goes on with another window's block",
        "src/cpu/gka_backward.hpp",
        "    work.solver.block.active = false;\n",
        "",
    ),
    Planted(
        "direct: the backward is not corrected",
        "src/cpu/direct.hpp",
        "if (!corrected || !kHasWider<Vec>)",
        "if (corrected || !kHasWider<Vec>)",
    ),
    Planted(
        "direct: corrected once whatever the cancellation",
        "src/cpu/direct.hpp",
        "left > kLargestCancellation; left *= kCorrectionTolerance",
        "left > kLargestCancellation; left = 0",
    ),
    Planted(
        "direct: the factor's rows without the last product",
        "src/cpu/block_cholesky.hpp",
        "d[i][j] = static_cast<double>(a[from * kLanes + at]) - block[at];",
        "d[i][j] = static_cast<double>(a[from * kLanes + at]);",
    ),
    Planted(
        "direct step: blocks below the next are not updated",
        "src/cpu/block_ldl.hpp",
        "for (int64_t i = next; i < n; i += kLanes) {\n    Elem* const rest",
        "for (int64_t i = next; i < n && i < next + kLanes; i += kLanes) {\n    Elem* const rest",
    ),
    Planted(
        "cg: directions are not conjugate",
        "src/cpu/cg.hpp",
        "static_cast<Elem>(next[t] / rr[t]);",
        "static_cast<Elem>(0.5 * next[t] / rr[t]);",
    ),
    Planted(
        "backward: no gradient through the norm",
        "src/cpu/gka_backward_gradients.hpp",
        "? 0.0 : b.z_dot_x[t] * c.ridge[t] / f;",
        "? 0.0 : 0.0;",
    ),
    Planted(
        "backward: bp_lambda is ignored",
        "src/cpu/gka_backward_gradients.hpp",
        "f == 0.0 || !job.bp_lambda ?",
        "f == 0.0 ?",
    ),
    Planted(
        "backward: the carried gradient is not transposed",
        "src/cpu/gka_backward_gradients.hpp",
        "tile.template accumulate<true>(d + n * c.Kp, c.Kp, c.K, c.k_lanes);",
        "tile.accumulate(d + n, c.Kp, c.K, c.k_lanes);",
    ),
    Planted(
        "backward: keys without the pairs of x and z",
        "src/cpu/gka_backward_gradients.hpp",
        "s[3 * block + at] = -decay * work.z_k[at];",
        "s[3 * block + at] = 0.0f;",
    ),
    Planted(
        "backward: the carried weight of H does not decay",
        "src/cpu/gka_backward_gradients.hpp",
        "double h_weight = -omega * total * total;",
        "double h_weight = -omega * total;",
    ),
    Planted(
        "backward: keys get nothing of the carried weight",
        "src/cpu/gka_backward_gradients.hpp",
        "work.h_sum[t] -= omega * total * d.to_end[t];",
        "",
    ),
    Planted(
        "backward: the gate gets nothing of the carried weight",
        "src/cpu/gka_backward_gradients.hpp",
        "+ work.omega * of_h);",
        ");",
    ),
    Planted(
        "backward: dbeta divided by beta twice",
        "src/cpu/gka_backward_gradients.hpp",
        "(dk_k[t] + dv_v[t]) / own);",
        "(dk_k[t] + dv_v[t]) / own / own);",
    ),
    Planted(
        "norm: blocks above the diagonal count once",
        "src/cpu/lanes.hpp",
        "return diagonal + 2.0 * above;",
        "return diagonal + 1.0 * above;",
    ),
    Planted(
        "segment states: kept a chunk late",
        "src/cpu/gka_forward.hpp",
        "(t0 + n - job.sequence_begin) % kSegmentTokens == 0",
        "(t0 - job.sequence_begin) % kSegmentTokens == 0",
    ),
    Planted(
        "segment states: another slot is read",
        "src/cpu/gka_backward.cpp",
        "unit.head).at(s.begin_of(i));",
        "unit.head).at(s.begin_of(1));",
    ),
    Planted(
        "gate gradient: a source too many",
        "src/cpu/gka_gate_gradient.hpp",
        "for (int64_t i = t + 1; i < n; ++i) before[i] += a[i][t];",
        "for (int64_t i = t + 1; i < n; ++i) before[i] += 1.001 * a[i][t];",
    ),
    Planted(
        "step: beta does not reach the values",
        "src/cpu/gka_step.hpp",
        "load_vector<Vec>(in.v, t, in.V, beta, v);",
        "load_vector<Vec>(in.v, t, in.V, S{1}, v);",
    ),
    Planted(
        "step: the residual of another ridge",
        "src/cpu/gka_step.hpp",
        "const Reg lam = Wide::set1(token.ridge * token.f);",
        "const Reg lam = Wide::set1(0.9 * token.ridge * token.f);",
    ),
    Planted(
        "step: the x that is certified is not the solver's",
        "src/cpu/gka_step.hpp",
        "x_out[c] = static_cast<S>(x[c]);",
        "x_out[c] = static_cast<S>(1.001) * static_cast<S>(x[c]);",
    ),
    Planted(
        "step: the norm of H counts what is below the diagonal once",
        "src/cpu/gka_step.hpp",
        "return 2.0 * Wide::sum(Wide::add(below",
        "return 1.0 * Wide::sum(Wide::add(below",
    ),
    Planted(
        "step: U is read out before the last row's update",
        "src/cpu/gka_step.hpp",
        "sum = Vec::fma(mc[r], a, sum);",
        "sum = Vec::fma(mc[r], r == kRows - 1 ? Vec::mul(decay, Vec::load(at)) : a, sum);",
    ),
    Planted(
        "step: packed blocks are not transposed for the columns",
        "src/cpu/packed_symmetric.hpp",
        "Vec::fma(b, Vec::set1(xi[r]), column[r % kColumns])",
        "Vec::fma(b, xj, column[r % kColumns])",
    ),
    Planted(
        "tasks: a segment starts from the state of the one before",
        "src/cpu/gka_split.cpp",
        "job.end = segments.end_of(i);",
        "job.end = segments.end_of(i) - 1;",
    ),
    Planted(
        "tasks: heads that share keys overwrite each other's gradient",
        "src/cpu/gka_backward.cpp",
        "job.dk.accumulate = head % problem.k_group != 0;",
        "job.dk.accumulate = false;",
    ),
    Planted(
        "dtypes: bfloat16 results are cut off, not rounded",
        "src/cpu/isa/half_baseline.hpp",
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
    ),
    Planted(
        "dtypes: ties of bfloat16 go up, not to even",
        "src/cpu/isa/half_baseline.hpp",
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "(bits + 0x8000) >> 16",
        "cpu_layer_test",
    ),
    Planted(
        "dtypes: float16 knows no subnormal numbers",
        "src/cpu/isa/half_baseline.hpp",
        "Bits result = magnitude < 0x38800000 ? small : normal;",
        "Bits result = magnitude < 0x38800000 ? Bits{} : normal;",
        "cpu_layer_test",
    ),
    Planted(
        "dtypes: sums over heads are rounded after every head",
        "src/cpu/gka_shared_gradients.hpp",
        """    if (!summed_ || (head + 1) % group_ != 0) return;
    const OutRows to = out_rows_of(gradient_, sequence_.row, head / group_);
    const int64_t width = gradient_.size[3];
    for (int64_t t = 0; t < sequence_.length(); ++t) {
      auto* row = static_cast<uint16_t*>(to.data) + (sequence_.begin + t) * to.token_stride;
""",
        """    if (!summed_) return;
    const OutRows to = out_rows_of(gradient_, sequence_.row, head / group_);
    const int64_t width = gradient_.size[3];
    for (int64_t t = 0; t < sequence_.length(); ++t) {
      auto* row = static_cast<uint16_t*>(to.data) + (sequence_.begin + t) * to.token_stride;
      convert.store(to.dtype, sums_.data() + t * width, width, row, to.stride);
      convert.load(to.dtype, row, to.stride, width, sums_.data() + t * width);
""",
    ),
    Planted(
        "dtypes: float64 decays by way of float32",
        "src/cpu/chunk.hpp",
        "static_cast<S>(row[j]) : 0;",
        "static_cast<float>(row[j]) : 0;",
    ),
    Planted(
        "dtypes: the convolution's float64 SiLU by float32's polynomial",
        "src/cpu/vec_math.hpp",
        "if constexpr (sizeof(typename Vec::Elem) == sizeof(double)) {",
        "if constexpr (sizeof(typename Vec::Elem) > sizeof(double)) {",
        "cpu_layer_test",
    ),
    Planted(
        "dtypes: the convolution's state in the wrong order",
        "src/cpu/conv_data.hpp",
        "p[c * width + w] = rows[w][c];",
        "p[c * width + w] = rows[width - 1 - w][c];",
        "cpu_layer_test",
    ),
    Planted(
        "layer step: what heads share is not kept",
        "src/cpu/layer_step.cpp",
        "keep_shared(k_, p_.k_group);",
        "",
    ),
    Planted(
        "layer step: the kept inputs are a token old",
        "src/cpu/layer_step.cpp",
        "work.past + (x.size[1] + w) * work.width",
        "work.past + (x.size[1] + w - 1) * work.width",
    ),
    Planted(
        "layer step: beta may vanish",
        "src/cpu/layer_step.cpp",
        "static_cast<S>(sigmoid(at(b)) + 1e-6)",
        "static_cast<S>(sigmoid(at(b)))",
    ),
    Planted(
        "layer step: H decays when it should not",
        "src/cpu/layer_step.cpp",
        "if (in_.a.defined() && options_.decay_h) in.gk",
        "if (in_.a.defined()) in.gk",
    ),
    Planted(
        "layer step: learned ridges are not clamped",
        "src/cpu/layer_step.cpp",
        "std::exp(std::clamp(at(ridge), low, high))",
        "std::exp(at(ridge))",
    ),
    Planted(
        "layer step: one norm for both meanings",
        "src/cpu/layer_step.cpp",
        "norm == QkNorm::official ? 1.0",
        "sum >= 0 ? 1.0",
    ),
    Planted(
        "layer step: all heads have the rate of the first",
        "src/cpu/layer_step.cpp",
        "element<S>(in_.A_log, h)",
        "element<S>(in_.A_log, 0)",
    ),
    Planted(
        "layer step: no gate on the output",
        "src/cpu/layer_step.cpp",
        "job.in.gate = gate.defined() ? w.gate : nullptr;",
        "job.in.gate = nullptr;",
    ),
    Planted(
        "layer step: a NaN ridge is let in",
        "src/core/validate_layer_step.cpp",
        'check_no_nan("ridge", in.ridge);',
        ";",
    ),
]
