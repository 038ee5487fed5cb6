// Decode on a GPU: the step kernel and that of a few tokens at once against the float64 oracle,
// slots and drafts, and a step as a graph.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/device_case.hpp"
#include "cuda/gka_cases.hpp"
#include "cuda/gpu_fixture.hpp"
#include "support/decode.hpp"

namespace kalmanet::testing {
namespace {

using CudaGpuStep = CudaGpu;

template <class T, class G>
void run(Case<T, G>& c, GkaOptions options) {
  options.backend = Backend::cuda;
  DeviceCase<T, G> on_gpu(c);
  gka_step(on_gpu.inputs(), on_gpu.outputs(), options);
  on_gpu.download();
}

template <class T, class G = T>
void check(const CaseSpec& spec, const GkaOptions& options) {
  Case<T, G> c(spec), again(spec);
  for (Case<T, G>* each : {&c, &again}) {
    each->x = each->residual = Tensor<G>();
    run(*each, options);
  }
  const Where where{"gka_step", name(options.solver), describe(spec)};
  for_each_output(c, again, [&](const char* tensor, ConstView a, ConstView b) {
    EXPECT_TRUE(identical(where, tensor, a, b)) << "another run gives other bits";
  });
  expect_oracle(c, options, where);
}

TEST_F(CudaGpuStep, MatchesTheOracle) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (int64_t T : {1, 2, 3, 4, 5, 8, 11}) {
      GkaOptions options;
      options.solver = solver;
      CaseSpec spec = small_case(turn++);
      spec.K = spec.V = 128, spec.strided = false, spec.T = T;
      check<float>(spec, options);
      check<BFloat16, float>(spec, options);
      check<Float16>(spec, options);
    }
  }
}

// First tokens, small ridges, keys that are much alike, long and short memories: what float32 does
// not bear is solved for in float64.
TEST_F(CudaGpuStep, HardTokens) {
  int turn = 0;
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (double ridge : {0.1, 0.02, 0.005}) {
      for (double correlation : {0.0, 0.9}) {
        for (double memory : {3.0, 200.0}) {
          CaseSpec spec = small_case(3);
          spec.K = spec.V = 128, spec.strided = false;
          spec.B = 1, spec.T = turn % 2 == 0 ? 8 : 40;
          spec.h0 = spec.u0 = turn % 3 == 0;
          spec.ridge_tensor = false, spec.g = spec.gk = true;
          spec.memory = memory, spec.key_correlation = correlation;
          spec.seed = 300 + static_cast<uint64_t>(turn++);
          GkaOptions options;
          options.solver = solver;
          options.ridge_ratio = ridge;
          check<float>(spec, options);
          check<BFloat16, float>(spec, options);
        }
      }
    }
  }
}

// 3 sequences, and so many that one alone is done by another kernel (step_wide.hpp).
TEST_F(CudaGpuStep, NoAnswerDependsOnItsNeighbours) {
  for (const auto& [T, B] : {std::array<int64_t, 2>{1, 3}, {1, 200}, {4, 3}}) {
    CaseSpec spec = small_case(2);
    spec.K = spec.V = 128, spec.strided = false, spec.B = B, spec.T = T, spec.h0 = spec.u0 = true;
    Case<BFloat16> all(spec);
    all.x = all.residual = Tensor<BFloat16>();
    GkaOptions options;
    options.backend = Backend::cuda;
    DeviceCase<BFloat16> on_gpu(all);
    gka_step(on_gpu.inputs(), on_gpu.outputs(), options);
    on_gpu.download();
    const std::vector<double> together = all.o.values();
    const std::vector<double> h_together = all.h_final.values();
    const std::vector<double> u_together = all.u_final.values();
    // The last sequence alone: the same memory, one row of it.
    GkaInputs in = on_gpu.inputs();
    GkaOutputs out = on_gpu.outputs();
    const auto last = [B](auto& view) {
      if (!view.defined()) return;
      using Data = std::remove_reference_t<decltype(view.data)>;
      const auto* const at =
          static_cast<const char*>(view.data) + (B - 1) * view.stride[0] * size_of(view.dtype);
      view.data = const_cast<Data>(static_cast<const void*>(at));
      view.size[0] = 1;
    };
    last(in.q), last(in.k), last(in.v), last(in.g), last(in.gk), last(in.alpha), last(in.beta);
    last(in.ridge_ratio), last(in.h0), last(in.u0);
    last(out.o), last(out.h_final), last(out.u_final);
    gka_step(in, out, options);
    on_gpu.download();
    EXPECT_EQ(all.o.values(), together) << T << " tokens of " << B << " sequences";
    EXPECT_TRUE(all.h_final.values() == h_together && all.u_final.values() == u_together);
  }
}

// Every call's memory to the GPU and back.
class Upload {
 public:
  Upload(GkaInputs& in, GkaOutputs& out, const std::vector<Memory>& memory) : memory_(memory) {
    for (const Memory& m : memory_) {
      device_.push_back(cuda::allocate(static_cast<int64_t>(m.bytes), nullptr));
      cuda::copy_to_device(device_.back(), m.data, static_cast<int64_t>(m.bytes), nullptr);
    }
    for (ConstView* view :
         {&in.q, &in.k, &in.v, &in.g, &in.gk, &in.alpha, &in.beta, &in.h0, &in.u0, &in.last_draft.k,
          &in.last_draft.v, &in.last_draft.g, &in.last_draft.gk, &in.last_draft.beta}) {
      if (view->defined()) view->data = there(view->data);
    }
    for (View* view : {&out.o, &out.h_final, &out.u_final}) view->data = there(view->data);
    for (std::span<const int32_t>* numbers : {&in.slots, &in.accepted}) {
      if (!numbers->empty()) {
        *numbers = {static_cast<const int32_t*>(there(numbers->data())), numbers->size()};
      }
    }
  }
  ~Upload() {
    for (void* memory : device_) cuda::release(memory, nullptr);
  }
  void download() const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      cuda::copy_to_host(memory_[i].data, device_[i], static_cast<int64_t>(memory_[i].bytes),
                         nullptr);
    }
  }
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;

 private:
  void* there(const void* data) const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      const auto* const begin = static_cast<const char*>(memory_[i].data);
      const auto* const at = static_cast<const char*>(data);
      if (at >= begin && at < begin + memory_[i].bytes) {
        return static_cast<char*>(device_[i]) + (at - begin);
      }
    }
    ADD_FAILURE() << "memory that the test does not know";
    return nullptr;
  }
  std::vector<Memory> memory_;
  std::vector<void*> device_;
};

void on_gpu(GkaInputs in, GkaOutputs out, GkaOptions options, const std::vector<Memory>& memory) {
  options.backend = Backend::cuda;
  const Upload upload(in, out, memory);
  gka_step(in, out, options);
  upload.download();
}

TEST_F(CudaGpuStep, DraftsMatchTheOracle) {
  for (Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (int64_t draft : {1, 3, 4, 6, 8}) {
      GkaOptions options;
      options.solver = solver;
      DecodeSpec spec;
      spec.K = spec.V = 128, spec.draft = draft, spec.B = 4, spec.num_slots = 9;
      spec.seed = static_cast<uint64_t>(draft);
      const Where where{"drafts", name(solver), std::to_string(draft) + " tokens"};
      Decode<float>().run(spec, on_gpu, options, 2e-5, 2e-6, where);
      Decode<BFloat16>().run(spec, on_gpu, options, 4e-3, 2e-6, where);
      Decode<Float16>().run(spec, on_gpu, options, 6e-4, 2e-6, where);
      spec.K = 100, spec.V = 60, spec.Hk = 1;
      Decode<BFloat16>().run(spec, on_gpu, options, 4e-3, 2e-6, where);
      Decode<double>().run(spec, on_gpu, options, 1e-9, 1e-13, where);
    }
  }
}

void check_cuda(cudaError_t status) {
  ASSERT_EQ(status, cudaSuccess) << cudaGetErrorString(status);
}

// Captured once, replayed with other slots, accepted lengths and tokens: nothing is allocated,
// nothing asks the host.
TEST_F(CudaGpuStep, ADraftAsAGraph) {
  for (int64_t T : {1, 4}) {
    constexpr int64_t B = 3, H = 2, K = 128, num_slots = 6;
    CaseSpec spec;
    spec.B = B, spec.H = H, spec.T = T, spec.K = spec.V = K, spec.g = spec.gk = true;
    const Case<BFloat16, float> first(spec);
    spec.seed = 5, spec.B = num_slots, spec.h0 = spec.u0 = true;
    const Case<BFloat16, float> pool(spec);
    using Numbers = std::vector<double>;
    const auto bfloat16 = [](const Numbers& from) {
      std::vector<BFloat16> to;
      for (double e : from) to.push_back(BFloat16(e));
      return to;
    };
    std::vector<BFloat16> q = bfloat16(first.q.values()), k = bfloat16(first.k.values());
    std::vector<BFloat16> v = bfloat16(first.v.values()), o(v.size());
    std::vector<float> g, h, u;
    for (double e : first.g.values()) g.push_back(static_cast<float>(e));
    for (double e : pool.h0.values()) h.push_back(static_cast<float>(e));
    for (double e : pool.u0.values()) u.push_back(static_cast<float>(e));
    std::vector<int32_t> slots = {4, 0, 2}, accepted = {0, 1, static_cast<int32_t>(T)};
    GkaInputs in;
    GkaOutputs out;
    const auto tokens = [&](std::vector<BFloat16>& from) {
      return dense(static_cast<void*>(from.data()), DType::bfloat16, {B, T, H, K});
    };
    in.q = tokens(q), in.k = tokens(k), in.v = tokens(v), out.o = tokens(o);
    in.g = in.gk = dense(g.data(), {B, T, H});
    in.h0 = out.h_final = dense(h.data(), {num_slots, H, K, K});
    in.u0 = out.u_final = dense(u.data(), {num_slots, H, K, K});
    in.slots = slots, in.accepted = accepted, in.is_draft = true;
    in.last_draft = {in.k, in.v, in.g, in.gk, {}};
    const std::vector<Memory> memory = {
        {q.data(), q.size() * 2}, {k.data(), k.size() * 2},         {v.data(), v.size() * 2},
        {o.data(), o.size() * 2}, {g.data(), g.size() * 4},         {h.data(), h.size() * 4},
        {u.data(), u.size() * 4}, {slots.data(), slots.size() * 4}, {accepted.data(), 12}};
    const std::vector<float> h_start = h;
    GkaOptions options;
    options.backend = Backend::cuda;

    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    check_cuda(cudaStreamCreate(&stream));
    options.stream = stream;
    GkaInputs there = in;
    GkaOutputs results = out;
    const Upload upload(there, results, memory);
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    gka_step(there, results, options);
    check_cuda(cudaStreamEndCapture(stream, &graph));
    size_t nodes = 0;
    check_cuda(cudaGraphGetNodes(graph, nullptr, &nodes));
    EXPECT_EQ(nodes, 1u) << "a step is one kernel and nothing else";
    check_cuda(cudaGraphInstantiate(&replay, graph, 0));
    std::vector<float> h_plain = h_start, u_plain = u;
    for (const std::array<int32_t, 6>& turn :
         {std::array<int32_t, 6>{4, 0, 2, 0, 1, 1}, {1, 3, -1, 1, 0, 0}, {0, 4, 5, 1, 1, 0}}) {
      std::copy(turn.begin(), turn.begin() + 3, slots.begin());
      std::copy(turn.begin() + 3, turn.end(), accepted.begin());
      check_cuda(cudaMemcpy(const_cast<int32_t*>(there.slots.data()), slots.data(), 12,
                            cudaMemcpyHostToDevice));
      check_cuda(cudaMemcpy(const_cast<int32_t*>(there.accepted.data()), accepted.data(), 12,
                            cudaMemcpyHostToDevice));
      check_cuda(cudaGraphLaunch(replay, stream));
      check_cuda(cudaStreamSynchronize(stream));
      upload.download();
      const std::vector<float> h_graph = h, u_graph = u;
      std::vector<uint16_t> o_graph(o.size()), o_plain(o.size());
      std::memcpy(o_graph.data(), o.data(), o.size() * 2);
      // The same as a plain call.
      h = h_plain, u = u_plain;
      on_gpu(in, out, {}, memory);
      std::memcpy(o_plain.data(), o.data(), o.size() * 2);
      EXPECT_EQ(h, h_graph);
      EXPECT_EQ(u, u_graph);
      EXPECT_EQ(o_plain, o_graph);
      h_plain = h, u_plain = u;
    }
    cudaGraphExecDestroy(replay), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  }
}

}  // namespace
}  // namespace kalmanet::testing
