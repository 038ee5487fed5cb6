// Saved states: what goes in comes out, bit for bit, through C++ and C; and buffers that lie, of
// every kind, are refused with a message and without touching anything.
#include "kalmanet/state.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "api/c_call.hpp"
#include "core/crc32c.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/tensor.hpp"

namespace kalmanet {
namespace {

using testing::ok;
using testing::Random;
using testing::Tensor;
using Bytes = std::vector<std::byte>;

template <class T>
struct States {
  Tensor<T> h, u;
  States(int64_t N, int64_t H, int64_t K, int64_t V, bool awkward, uint64_t seed) {
    Random layout(seed), random(seed + 1);
    h = Tensor<T>({N, H, K, K}, awkward, layout);
    u = Tensor<T>({N, H, K, V}, awkward, layout);
    for (Tensor<T>* t : {&h, &u}) t->fill([&](int64_t) { return random.normal(); });
  }
};

template <class T>
Bytes saved(const States<T>& s) {
  const ConstView h = s.h.view(), u = s.u.view();
  Bytes bytes(static_cast<size_t>(
      gka_saved_state_bytes(h.dtype, h.size[0], h.size[1], h.size[2], u.size[3])));
  EXPECT_EQ(gka_save_state(h, u, bytes), std::ssize(bytes));
  return bytes;
}

template <class T>
void expect_round_trip(int64_t N, int64_t H, int64_t K, int64_t V) {
  const std::string what = std::string(name(DTypeOf<T>::value)) + " N=" + std::to_string(N) +
                           " H=" + std::to_string(H) + " K=" + std::to_string(K) +
                           " V=" + std::to_string(V);
  Bytes dense;
  for (bool awkward : {false, true}) {
    const States<T> from(N, H, K, V, awkward, 11);
    const Bytes bytes = saved(from);
    if (!awkward) dense = bytes;
    EXPECT_EQ(bytes, dense) << "strides do not show, " << what;
    const GkaSavedStateInfo info = gka_saved_state_info(bytes);
    EXPECT_EQ(info.version, 1u);
    EXPECT_EQ(info.dtype, DTypeOf<T>::value);
    EXPECT_EQ(std::vector<int64_t>(
                  {info.num_sequences, info.num_heads, info.key_dim, info.value_dim, info.bytes}),
              std::vector<int64_t>({N, H, K, V, std::ssize(bytes)}));
    for (bool awkward_to : {false, true}) {
      States<T> to(N, H, K, V, awkward_to, 12);
      gka_load_state(bytes, to.h.view(), to.u.view());
      const testing::Where where{"load_state", "", what};
      EXPECT_TRUE(testing::identical(where, "h", to.h.view(), from.h.view()));
      EXPECT_TRUE(testing::identical(where, "u", to.u.view(), from.u.view()));
      EXPECT_TRUE(to.h.gaps_intact() && to.u.gaps_intact()) << what;
    }
  }
}

TEST(SavedState, WhatGoesInComesOut) {
  expect_round_trip<float>(1, 1, 1, 1);
  expect_round_trip<float>(2, 3, 7, 5);
  expect_round_trip<double>(3, 2, 4, 9);
  expect_round_trip<float>(1, 2, 64, 48);
  expect_round_trip<float>(0, 2, 8, 8);  // an empty batch
}

TEST(SavedState, EveryBitOfEveryNumber) {
  const std::vector<uint32_t> patterns = {0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000,
                                          0x00000001, 0x7F800000, 0xFF800000, 0x12345678};
  std::vector<float> h(4), u(4), h_back(4), u_back(4);
  std::memcpy(h.data(), patterns.data(), 16);
  std::memcpy(u.data(), patterns.data() + 4, 16);
  Bytes bytes(128 + 32);
  gka_save_state(dense(h.data(), {1, 1, 2, 2}), dense(u.data(), {1, 1, 2, 2}), bytes);
  gka_load_state(bytes, dense(h_back.data(), {1, 1, 2, 2}), dense(u_back.data(), {1, 1, 2, 2}));
  EXPECT_EQ(std::memcmp(h.data(), h_back.data(), 16), 0);
  EXPECT_EQ(std::memcmp(u.data(), u_back.data(), 16), 0);
}

// The format is a promise: these are its bytes. Whoever changes them raises the version.
TEST(SavedState, TheBytesOfVersionOne) {
  const std::vector<float> h = {1, 2, 2, 5}, u = {-1, 0.5};
  Bytes bytes(128 + 24);
  gka_save_state(dense(h.data(), {1, 1, 2, 2}), dense(u.data(), {1, 1, 2, 1}), bytes);
  const std::vector<uint8_t> fields = {
      0x89, 'K', 'N', 'S', 'T', '\r', '\n', 0x1A,  // magic
      4,    3,   2,   1,                           // byte order
      1,    0,   0,   0,                           // version
      128,  0,   0,   0,                           // header
      0,    0,   0,   0,                           // dtype
      1,    0,   0,   0,   0,   0,    0,    0,     // N
      1,    0,   0,   0,   0,   0,    0,    0,     // H
      2,    0,   0,   0,   0,   0,    0,    0,     // K
      1,    0,   0,   0,   0,   0,    0,    0,     // V
      24,   0,   0,   0,   0,   0,    0,    0,     // payload
  };
  const std::vector<uint8_t> payload = {
      0, 0, 0x80, 0x3F, 0, 0, 0, 0x40, 0, 0, 0, 0x40, 0, 0, 0xA0, 0x40,  // h
      0, 0, 0x80, 0xBF, 0, 0, 0, 0x3F,                                   // u
  };
  std::vector<uint8_t> got;
  for (std::byte b : bytes) got.push_back(std::to_integer<uint8_t>(b));
  EXPECT_EQ(std::vector<uint8_t>(got.begin(), got.begin() + 64), fields);
  EXPECT_EQ(std::vector<uint8_t>(got.begin() + 64, got.begin() + 120), std::vector<uint8_t>(56));
  EXPECT_EQ(std::vector<uint8_t>(got.begin() + 128, got.end()), payload);
  // Computed apart, from the two lists above, one bit at a time.
  EXPECT_EQ(std::vector<uint8_t>(got.begin() + 120, got.begin() + 128),
            (std::vector<uint8_t>{0x2F, 0x61, 0x5A, 0xDD, 0x9E, 0x31, 0xC8, 0xDB}));
}

TEST(SavedState, OneBehindTheOther) {
  const States<float> a(1, 2, 5, 3, false, 1), b(2, 1, 4, 4, false, 2);
  Bytes both = saved(a);
  const Bytes second = saved(b);
  const auto at = static_cast<size_t>(gka_saved_state_info(both).bytes);
  both.insert(both.end(), second.begin(), second.end());
  States<float> to_a(1, 2, 5, 3, false, 3), to_b(2, 1, 4, 4, false, 4);
  gka_load_state(both, to_a.h.view(), to_a.u.view());
  gka_load_state(std::span(both).subspan(at), to_b.h.view(), to_b.u.view());
  EXPECT_TRUE(testing::identical({"load_state", "", "second"}, "u", to_b.u.view(), b.u.view()));
}

// A stream goes on from a loaded state as if nothing had happened.
TEST(SavedState, AStreamGoesOn) {
  testing::CaseSpec spec;
  spec.T = 40;
  spec.K = 12;
  spec.g = spec.gk = true;
  testing::Case<float> whole(spec), parts(spec);
  gka_step(whole.inputs(), whole.outputs());
  GkaInputs in = parts.inputs();
  GkaOutputs out = parts.outputs();
  const auto cut = [](auto& view, int64_t begin, int64_t count) {
    if (!view.defined()) return;
    auto* data = static_cast<const float*>(view.data) + begin * view.stride[1];
    view.data = const_cast<float*>(data);
    view.size[1] = count;
  };
  const auto piece = [&](int64_t begin, int64_t count) {
    GkaInputs i = in;
    GkaOutputs o = out;
    for (ConstView* v : {&i.q, &i.k, &i.v, &i.g, &i.gk}) cut(*v, begin, count);
    for (View* v : {&o.o, &o.x, &o.residual}) cut(*v, begin, count);
    gka_step(i, o);
  };
  piece(0, 17);
  Bytes bytes(static_cast<size_t>(gka_saved_state_bytes(DType::float32, 1, 2, 12, 8)));
  gka_save_state(out.h_final, out.u_final, bytes);
  States<float> fresh(1, 2, 12, 8, true, 5);
  gka_load_state(bytes, fresh.h.view(), fresh.u.view());
  in.h0 = fresh.h.view();
  in.u0 = fresh.u.view();
  piece(17, 23);
  const testing::Where where{"step", "", "saved after 17 of 40"};
  testing::for_each_output(parts, whole, [&](const char* t, const auto& got, const auto& want) {
    EXPECT_TRUE(testing::identical(where, t, got, want));
  });
}

TEST(SavedState, TheCInterfaceIsTheSame) {
  const States<float> from(2, 3, 7, 5, true, 21);
  const Bytes expected = saved(from);
  int64_t size = 0, written = 0;
  ASSERT_TRUE(ok(kalmanet_gka_saved_state_bytes(KALMANET_FLOAT32, 2, 3, 7, 5, &size)));
  ASSERT_EQ(size, std::ssize(expected));
  Bytes bytes(static_cast<size_t>(size) + 10, std::byte{0x55});
  const kalmanet_tensor h = testing::c_tensor(from.h.view()), u = testing::c_tensor(from.u.view());
  ASSERT_TRUE(ok(kalmanet_gka_save_state(&h, &u, bytes.data(), bytes.size(), &written)));
  EXPECT_EQ(written, size);
  EXPECT_EQ(Bytes(bytes.begin(), bytes.begin() + size), expected);
  EXPECT_EQ(Bytes(bytes.begin() + size, bytes.end()), Bytes(10, std::byte{0x55}));
  kalmanet_gka_saved_state_info info = KALMANET_GKA_SAVED_STATE_INFO_INIT;
  ASSERT_TRUE(ok(kalmanet_gka_read_saved_state_info(bytes.data(), 128, &info)));
  EXPECT_EQ(info.version, 1u);
  EXPECT_EQ(info.dtype, KALMANET_FLOAT32);
  EXPECT_EQ(info.num_sequences, 2);
  EXPECT_EQ(info.num_heads, 3);
  EXPECT_EQ(info.key_dim, 7);
  EXPECT_EQ(info.value_dim, 5);
  EXPECT_EQ(info.bytes, size);
  States<float> to(2, 3, 7, 5, false, 22);
  const kalmanet_tensor to_h = testing::c_tensor(to.h.view()),
                        to_u = testing::c_tensor(to.u.view());
  ASSERT_TRUE(ok(kalmanet_gka_load_state(bytes.data(), bytes.size(), &to_h, &to_u)));
  const testing::Where where{"kalmanet_gka_load_state", "", "N=2 H=3 K=7 V=5"};
  EXPECT_TRUE(testing::identical(where, "h", to.h.view(), from.h.view()));
  EXPECT_TRUE(testing::identical(where, "u", to.u.view(), from.u.view()));
  // At any address.
  Bytes shifted(bytes.size() + 1);
  ASSERT_TRUE(ok(kalmanet_gka_save_state(&h, &u, shifted.data() + 1, bytes.size(), nullptr)));
  ASSERT_TRUE(ok(kalmanet_gka_load_state(shifted.data() + 1, bytes.size(), &to_h, &to_u)));
}

}  // namespace
}  // namespace kalmanet
