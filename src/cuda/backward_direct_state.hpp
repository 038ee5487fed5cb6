// The backward's direct solver on matrix units (backward_direct_body.hpp): what it reads and writes
// besides, and dm_t = scale U_t do_t. U lies here by its own rows, not by those of U^T as in the
// forward.
#pragma once

#include "cuda/backward_direct_factor.hpp"
#include "cuda/backward_first_body.hpp"

namespace kalmanet::cuda::direct32 {

struct BackwardDirectShared : DirectShared {
  float side_scale[DirectLayout::kTokens];  // a power of two for alpha_t dm_t
  float z_x[DirectLayout::kTokens];
};

struct BackwardDirectRegisters : DirectRegisters {
  uint32_t raw_do[2][4];
  float other[4][4];
};

template <class Group>
struct BackwardDirectState : DirectFactor<Group> {
  using Base = DirectFactor<Group>;
  using Base::group, Base::job, Base::piece, Base::head, Base::states, Base::t0, Base::n,
      Base::k_power, Base::v_power, Base::q_power;
  using L = DirectLayout;
  using Registers = BackwardDirectRegisters;

  BackwardDirectShared& shared;
  const BackwardJob& backward;
  double before[2] = {1.0, 1.0};  // decays from the piece's start to the chunk's, of H and of U

  // A thread's elements of a matrix of the workspace, [place][K], in the layout of y. (Not of
  // tokens that are computed elsewhere: another block writes them meanwhile.)
  template <class Of>
  KALMANET_KERNEL void store_rows(void* rows, Of&& of) {
    const int width = key_dims<Group>(job);
    float* const to = static_cast<float*>(rows) + place_of(backward, piece, t0, head) * width;
    const auto stride = static_cast<int>(job.H) * width;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = this->token_of(thread, tile, i);
          const int dim = Base::state_row(thread, i);
          if (t < n && reaches<Group>(width, dim) && !this->exact(t))
            to[t * stride + dim] = of(r, tile, i);
        }
      }
    });
  }
  template <class Of>
  KALMANET_KERNEL void load_rows(const void* rows, Of&& of) {
    const int width = key_dims<Group>(job);
    const float* const from =
        static_cast<const float*>(rows) + place_of(backward, piece, t0, head) * width;
    const auto stride = static_cast<int>(job.H) * width;
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = this->token_of(thread, tile, i);
          const int dim = Base::state_row(thread, i);
          of(r)[tile][i] = t < n && reaches<Group>(width, dim) ? from[t * stride + dim] : 0.0f;
        }
      }
    });
  }

  // U before the piece into scratch, by its own rows.
  KALMANET_KERNEL void load_u() {
    const StateView<float> from = piece.first ? state_view<float>(job.u0, piece.sequence, head)
                                              : slot_view<float>(job, piece.slot, head, true);
    group.each([&](int thread, Registers& r) {
      r.sum = 0;
      for (int tile = 0; tile < 16; ++tile) {
        float v[4];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = Base::state_row(thread, i), column = Base::state_column(thread, tile, i);
          v[i] = from.data == nullptr || !has_element<Group>(job, true, row, column)
                     ? 0.0f
                     : from.data[from.at(row, column)];
        }
        store4(this->state_at(true, thread, tile), v);
        r.sum += (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]);
      }
    });
    this->put_squares(true);
  }

  // do_t as right factor, in the gains' memory. Begins and ends with a barrier; returns the power
  // of two that it is scaled by.
  KALMANET_KERNEL float put_output_gradients() {
    group.barrier();
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 2; ++i) {
        KALMANET_UNROLL
        for (int j = 0; j < 4; ++j) r.raw[0][i][j] = r.raw_do[i][j];
      }
    });
    this->stage_tile(0);
    group.barrier();
    const float power = this->put_tile(0, 1, shared.gains[0], nullptr);
    this->fetch_state(true);
    group.barrier();
    return power;
  }

  // dm_t = scale (e^{G_t} (U_0 do_t + sum_{j<=t} u_j k_j (v_j . do_t))) into z's place, G and u
  // those of U. V's rows are in right's memory. Ends with a barrier.
  KALMANET_KERNEL void gradient_of_mix(float do_power) {
    const double u2 = this->squares_of_state(true);
    const float u_power = u2 > 0.0 ? static_cast<float>(256.0 / sqrt(u2)) : 1.0f;
    this->clear_y();
    KALMANET_UNROLL
    for (int k = 0; k < 8; ++k) {
      if (!reaches<Group>(this->dims, k * 16)) break;
      group.each([&](int thread, Registers& r) {
        this->template pack_state<true>(r.h[2 * k], r.h[2 * k + 1], u_power, r.a);
        this->load_right(shared.gains[0], thread, k, r.b[0]);
      });
      this->add_tiles(1, 0);
      this->add_tiles(0, 0);
    }
    this->template multiply_tokens<false, false>(shared.right, nullptr, shared.gains[0], nullptr);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int j = this->tile_row(thread, i), t = this->tile_column(thread, i);
        r.g[0][i] = j <= t ? r.g[0][i] * (shared.value_weight[j] * shared.start[1][t]) : 0.0f;
      }
    });
    this->put_middle();
    const float unit = shared.largest_beta2 / k_power / v_power, per_unit = 1.0f / (u_power * unit);
    group.each([&](int thread, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          r.y[tile][i] *= shared.start[1][this->token_of(thread, tile, i)] * per_unit;
        }
      }
    });
    group.barrier();
    this->template add_middle<false>([&](DirectRegisters& r, int thread, int k) {
      const Left left = shared.columns[(thread / 32 * 2 + k) * 32 + thread % 32];
      KALMANET_UNROLL
      for (int i = 0; i < 4; ++i) r.a[0][i] = left.part[i];
    });
    const float factor = static_cast<float>(job.scale) / do_power * unit;
    group.each([&](int, Registers& r) {
      KALMANET_UNROLL
      for (int tile = 0; tile < 4; ++tile) {
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) r.y[tile][i] *= factor;
      }
    });
    store_rows(backward.z, [](Registers& r, int tile, int i) { return r.y[tile][i]; });
    group.barrier();
  }

  // H <- total H + K^T diag(weights) K, or U <- total U + K^T diag(weights) V, in scratch, and the
  // squares of its elements.
  KALMANET_KERNEL void advance_state(bool u) {
    const float* const weight = shared.since_end[u ? 1 : 0];
    const Left* const rights = u ? shared.values : shared.columns;
    const float unit = shared.largest_beta2 / k_power / (u ? v_power : k_power);
    const float keep = shared.total[u ? 1 : 0] / unit;
    this->fetch_state(u);
    group.each([&](int thread, Registers& r) {
      r.sum = 0;
      KALMANET_UNROLL
      for (int k = 0; k < 2; ++k) {
        const Left raw = shared.columns[(thread / 32 * 2 + k) * 32 + thread % 32];
        KALMANET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int j = k * 16 + thread % 4 * 2 + i / 2 * 8;
          r.z[0][k][i] = split_float16(low_float16(raw.part[i]) * weight[j],
                                       high_float16(raw.part[i]) * weight[j + 1], r.z[1][k][i]);
        }
      }
    });
    KALMANET_UNROLL
    for (int tile = 0; tile < 16; tile += 2) {
      group.each([&](int thread, Registers& r) {
        KALMANET_UNROLL
        for (int j = 0; j < 2; ++j) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.g[j][i] = keep * r.h[tile + j][i];
        }
        KALMANET_UNROLL
        for (int k = 0; k < 2; ++k) {
          const Left right = rights[(tile + k) * 32 + thread % 32];
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) r.b[k][i % 2][i / 2] = right.part[i];
        }
      });
      KALMANET_UNROLL
      for (int at = 0; at < 8; ++at) {
        const int k = at / 4, part = 1 - at / 2 % 2, j = at % 2;
        const auto g = [j](Registers& r) -> float (&)[4] { return r.g[j]; };
        group.multiply_add_float16(
            g, g, [part, k](Registers& r) -> uint32_t (&)[4] { return r.z[part][k]; },
            [k, j](Registers& r) -> uint32_t (&)[2] { return r.b[k][j]; });
      }
      group.each([&](int thread, Registers& r) {
        float squares = 0;
        KALMANET_UNROLL
        for (int j = 0; j < 2; ++j) {
          KALMANET_UNROLL
          for (int i = 0; i < 4; ++i) {
            r.g[j][i] *= unit;
            squares += r.g[j][i] * r.g[j][i];
          }
          store4(this->state_at(u, thread, tile + j), r.g[j]);
        }
        r.sum += squares;
      });
    }
    this->put_squares(u);
  }
};

}  // namespace kalmanet::cuda::direct32
