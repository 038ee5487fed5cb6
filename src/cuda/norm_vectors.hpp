// The norms where their rows are dense and aligned: `lanes` neighbouring threads a row (a power of
// two), 16 bytes a load, each number loaded once and kept. norm_body.hpp has the formulas and is
// the plain twin, for everything else.
#pragma once

#include "cuda/norm_body.hpp"
#include "cuda/vectors.hpp"

namespace kalmanet::cuda {

// Numbers a thread has of a row: kLoads times 16 bytes, `lanes` apart.
template <DType kType>
inline constexpr int kNormCount = kType == DType::float32 ? 4 : 8;

template <DType kType, int kLoads>
struct NormVectorRegisters {
  Pack<kType, kNormCount<kType>> o[kLoads], gate[kLoads], dy[kLoads];
  float weight[kLoads][kNormCount<kType>], part[kLoads][kNormCount<kType>];
  // dy silu, and dy silu' w o: so that an exponential is taken once.
  float straight[kLoads][kNormCount<kType>], sideways[kLoads][kNormCount<kType>];
  float square, along, inverse;
};
struct NormVectorShared {
  alignas(16) float part[kNormThreads * 8];  // [rows at once][V]
};

template <DType kType, int kLoads, class Group>
struct NormVectors {
  static constexpr int kCount = kNormCount<kType>;
  using Registers = NormVectorRegisters<kType, kLoads>;
  using Numbers = Pack<kType, kCount>;

  Group& group;
  const NormJob& job;

  KALMANET_KERNEL int rows_at_once() const { return kNormThreads >> job.lane_bits; }
  KALMANET_KERNEL int row_of(int thread) const { return thread >> job.lane_bits; }
  KALMANET_KERNEL int column(int thread, int load) const {
    return (load * job.lanes + (thread & (job.lanes - 1))) * kCount;
  }
  KALMANET_KERNEL void load(const Array& a, int64_t row, int thread, Numbers (&to)[kLoads]) const {
    KALMANET_UNROLL
    for (int i = 0; i < kLoads; ++i) to[i].load(a.data, row * a.stride[0] + column(thread, i));
  }
  // The thread's numbers of a row <- f(load, number).
  template <class F>
  KALMANET_KERNEL void store(const Array& a, int64_t row, int thread, F&& f) const {
    KALMANET_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      float x[kCount];
      KALMANET_UNROLL
      for (int v = 0; v < kCount; ++v) x[v] = f(i, v);
      Numbers out;
      out.set(x);
      out.store(a.data, row * a.stride[0] + column(thread, i));
    }
  }
  template <class F>
  KALMANET_KERNEL static void each_number(F&& f) {
    KALMANET_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      KALMANET_UNROLL
      for (int v = 0; v < kCount; ++v) f(i, v);
    }
  }
  KALMANET_KERNEL void load_weight(int thread, Registers& r) const {
    KALMANET_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      load_neighbours(job.weight, column(thread, i), r.weight[i]);
    }
  }
  KALMANET_KERNEL Silu<float> silu(const Registers& r, int i, int v) const {
    if (job.gate.data == nullptr) return {1, 0};
    const float g = r.gate[i][v], s = quick_sigmoid<kType>(g);
    return {g * s, s * (1 + g * (1 - s))};
  }

  // ---- rows [block * rows_at_once(), ...)

  KALMANET_KERNEL void forward(int64_t block) const {
    const int64_t first = block * rows_at_once();
    group.each([&](int thread, Registers& r) {
      r.square = 0;
      const int64_t row = first + row_of(thread);
      if (row >= job.R) return;
      load(job.o, row, thread, r.o);
      if (job.gate.data != nullptr) load(job.gate, row, thread, r.gate);
      load_weight(thread, r);
      each_number([&](int i, int v) { r.square += r.o[i][v] * r.o[i][v]; });
    });
    group.sum_neighbours(job.lanes, [](Registers& r) -> float& { return r.square; });
    group.each([&](int thread, Registers& r) {
      const int64_t row = first + row_of(thread);
      if (row >= job.R) return;
      r.inverse = inverse_of(r.square);
      store(job.y, row, thread, [&](int i, int v) {
        return r.o[i][v] * r.inverse * r.weight[i][v] * silu(r, i, v).value;
      });
    });
  }

  template <bool kBackward>
  KALMANET_KERNEL void unit(int64_t block) const {
    const int64_t first = block * rows_at_once();
    const bool fla = job.unit == UnitNorm::fla;
    group.each([&](int thread, Registers& r) {
      r.square = r.along = 0;
      const int64_t row = first + row_of(thread);
      if (row >= job.R) return;
      load(job.o, row, thread, r.o);
      if (kBackward) load(job.dy, row, thread, r.dy);
      each_number([&](int i, int v) {
        r.square += r.o[i][v] * r.o[i][v];
        if (kBackward) r.along += r.o[i][v] * r.dy[i][v];
      });
    });
    group.sum_neighbours(job.lanes, [](Registers& r) -> float& { return r.square; });
    if constexpr (kBackward) {
      group.sum_neighbours(job.lanes, [](Registers& r) -> float& { return r.along; });
    }
    group.each([&](int thread, Registers& r) {
      const int64_t row = first + row_of(thread);
      if (row >= job.R) return;
      set_unit_norm(fla, static_cast<float>(job.eps), r);
      store(kBackward ? job.d_o : job.y, row, thread, [&](int i, int v) {
        return kBackward ? r.dy[i][v] * r.inverse - r.o[i][v] * r.along : r.o[i][v] * r.inverse;
      });
    });
  }

  // ---- rows [block * kNormVectorRows, ...)

  KALMANET_KERNEL void backward(NormVectorShared& shared, int64_t block) const {
    group.each([&](int thread, Registers& r) {
      load_weight(thread, r);
      each_number([&](int i, int v) { r.part[i][v] = 0; });
    });
    const int64_t end = (block + 1) * kNormVectorRows;
    KALMANET_LOOP
    for (int64_t first = block * kNormVectorRows; first < end && first < job.R;
         first += rows_at_once()) {
      backward_rows(first);
    }
    if (job.parts == nullptr) return;
    group.each([&](int thread, Registers& r) {
      each_number([&](int i, int v) {
        shared.part[row_of(thread) * job.V + column(thread, i) + v] = r.part[i][v];
      });
    });
    group.barrier();
    group.each([&](int thread, Registers&) {
      if (thread >= job.V) return;
      double sum = 0;
      for (int i = 0; i < rows_at_once(); ++i) {
        sum += static_cast<double>(shared.part[i * job.V + thread]);
      }
      job.parts[block * job.V + thread] = sum;
    });
  }

 private:
  // 1 / V, a power of two.
  KALMANET_KERNEL float mean_of_one() const {
    return power_of_two(-job.lane_bits) * (1.0f / static_cast<float>(kCount * kLoads));
  }
  // To two units in the last place.
  KALMANET_KERNEL float inverse_of(float square) const {
    const float mean = square * mean_of_one() + static_cast<float>(job.eps);
#ifdef __CUDACC__
    return rsqrtf(mean);
#else
    return 1.0f / std::sqrt(mean);
#endif
  }

  KALMANET_KERNEL void backward_rows(int64_t first) const {
    group.each([&](int thread, Registers& r) {
      r.square = r.along = 0;
      const int64_t row = first + row_of(thread);
      if (row >= job.R) return;
      load(job.o, row, thread, r.o);
      load(job.dy, row, thread, r.dy);
      if (job.gate.data != nullptr) load(job.gate, row, thread, r.gate);
      each_number([&](int i, int v) {
        const Silu<float> s = silu(r, i, v);
        const float o = r.o[i][v], dy = r.dy[i][v];
        r.straight[i][v] = dy * s.value;
        r.sideways[i][v] = dy * s.slope * r.weight[i][v] * o;
        r.square += o * o;
        r.along += r.straight[i][v] * r.weight[i][v] * o;
      });
    });
    group.sum_neighbours(job.lanes, [](Registers& r) -> float& { return r.square; });
    group.sum_neighbours(job.lanes, [](Registers& r) -> float& { return r.along; });
    group.each([&](int thread, Registers& r) {
      const int64_t row = first + row_of(thread);
      if (row >= job.R) return;
      const float inverse = inverse_of(r.square);
      const float mean = inverse * inverse * r.along * mean_of_one();
      if (job.d_o.data != nullptr) {
        store(job.d_o, row, thread, [&](int i, int v) {
          return inverse * (r.straight[i][v] * r.weight[i][v] - r.o[i][v] * mean);
        });
      }
      if (job.d_gate.data != nullptr) {
        store(job.d_gate, row, thread, [&](int i, int v) { return r.sideways[i][v] * inverse; });
      }
      each_number([&](int i, int v) { r.part[i][v] += r.straight[i][v] * r.o[i][v] * inverse; });
    });
  }
};

}  // namespace kalmanet::cuda
