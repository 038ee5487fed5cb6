// Buffers that are no saved state, or were one: each is refused with a message that says why, the
// states are not touched, and nothing is read past the end (the sanitizers watch that).
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "api/c_call.hpp"
#include "core/crc32c.hpp"
#include "kalmanet/kalmanet.hpp"
#include "support/tensor.hpp"

namespace kalmanet {
namespace {

using testing::fails;
using testing::ok;
using Bytes = std::vector<std::byte>;

constexpr int64_t N = 2, H = 3, K = 4, V = 5;
constexpr size_t kHeader = 128, kPayload = N * H * K * (K + V) * sizeof(float);

// A good buffer, and places to load it to, full of NaN.
struct Victim {
  Bytes bytes = Bytes(kHeader + kPayload);
  std::vector<float> h = std::vector<float>(N * H * K * K, NAN);
  std::vector<float> u = std::vector<float>(N * H * K * V, NAN);

  Victim() {
    testing::Random random(5);
    std::vector<float> from_h(h.size()), from_u(u.size());
    for (auto* from : {&from_h, &from_u}) {
      for (float& e : *from) e = static_cast<float>(random.normal());
    }
    gka_save_state(dense(from_h.data(), {N, H, K, K}), dense(from_u.data(), {N, H, K, V}), bytes);
  }
  View h_view() { return dense(h.data(), {N, H, K, K}); }
  View u_view() { return dense(u.data(), {N, H, K, V}); }

  template <class Unsigned>
  void put(size_t at, Unsigned value) {
    for (size_t i = 0; i < sizeof value; ++i) {
      bytes[at + i] = static_cast<std::byte>(static_cast<uint8_t>(value >> (8 * i)));
    }
  }
  // As somebody would who wants to be believed.
  void seal() { put<uint32_t>(124, core::crc32c(std::span(bytes).first(124))); }

  // The load fails with that part in its message, in C++ and C, and nothing was written. The bytes
  // are handed over in memory of exactly their size, so that a read behind them shows.
  void expect_refused(const std::string& what, const std::string& part,
                      const std::string& argument = "buffer",
                      kalmanet_status status = KALMANET_INVALID_DATA) {
    const std::unique_ptr<std::byte[]> exact(new std::byte[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), exact.get());
    const kalmanet_tensor c_h = testing::c_tensor(h_view()), c_u = testing::c_tensor(u_view());
    EXPECT_TRUE(fails(kalmanet_gka_load_state(exact.get(), bytes.size(), &c_h, &c_u), status,
                      argument, part))
        << what;
    try {
      gka_load_state({exact.get(), bytes.size()}, h_view(), u_view());
      ADD_FAILURE() << what << ": loaded";
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(), kalmanet_last_error()) << what;
    }
    for (const auto* t : {&h, &u}) {
      for (float e : *t) ASSERT_TRUE(std::isnan(e)) << what << ": a state was written";
    }
  }
};

TEST(HostileState, TheGoodOneLoads) {
  Victim v;
  gka_load_state(v.bytes, v.h_view(), v.u_view());
  for (const auto* t : {&v.h, &v.u}) {
    for (float e : *t) ASSERT_FALSE(std::isnan(e));
  }
}

TEST(HostileState, EveryFlippedBitOfTheHeader) {
  const std::vector<std::pair<size_t, const char*>> says = {
      {8, "is no saved state"}, {12, "byte order mark"}, {16, "version"}, {128, "damaged header"}};
  size_t group = 0;
  for (size_t at = 0; at < kHeader; ++at) {
    if (at == says[group].first) ++group;
    for (int bit = 0; bit < 8; ++bit) {
      Victim v;
      v.bytes[at] ^= static_cast<std::byte>(1 << bit);
      v.expect_refused("bit " + std::to_string(bit) + " of header byte " + std::to_string(at),
                       says[group].second);
      EXPECT_THROW(gka_saved_state_info(v.bytes), Error) << at;
    }
  }
}

TEST(HostileState, EveryFlippedBitOfThePayload) {
  for (size_t at = kHeader; at < kHeader + kPayload; ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      Victim v;
      v.bytes[at] ^= static_cast<std::byte>(1 << bit);
      v.expect_refused("bit " + std::to_string(bit) + " of byte " + std::to_string(at),
                       "damaged values");
    }
  }
}

TEST(HostileState, EveryLengthThatIsTooShort) {
  for (size_t size = 0; size < kHeader + kPayload; ++size) {
    Victim v;
    v.bytes.resize(size);
    v.expect_refused(std::to_string(size) + " bytes", size < kHeader
                                                          ? "the header of a saved state alone"
                                                          : "of a saved state of 992 (truncated)");
  }
}

TEST(HostileState, AnythingElse) {
  testing::Random random(9);
  for (int i = 0; i < 2000; ++i) {
    Victim v;
    v.bytes.resize(static_cast<size_t>(random.integer(1, 2000)));
    for (std::byte& b : v.bytes) b = static_cast<std::byte>(random.bits());
    v.expect_refused("random bytes " + std::to_string(i) + ", seed 9", "is no saved state");
  }
  for (size_t size : {size_t{8}, size_t{128}, size_t{4096}}) {
    Victim v;
    v.bytes.assign(size, std::byte{0});
    v.expect_refused("zeros", "is no saved state");
  }
}

// A header with whatever in its fields, sealed with the right checksum.
struct Lie {
  const char* what;
  std::function<void(Victim&)> tell;
  const char* part;
};

TEST(HostileState, HeadersThatLieUnderTheirOwnSeal) {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  const std::vector<Lie> lies = {
      {"big endian", [](Victim& v) { v.put<uint32_t>(8, 0x04030201); }, "is big endian"},
      {"version 0", [](Victim& v) { v.put<uint32_t>(12, 0); }, "version 0"},
      {"version 2", [](Victim& v) { v.put<uint32_t>(12, 2); },
       "version 2; this library reads version 1"},
      {"no header", [](Victim& v) { v.put<uint32_t>(16, 0); }, "a header of 0 bytes"},
      {"a longer header", [](Victim& v) { v.put<uint32_t>(16, 132); }, "a header of 132 bytes"},
      {"a huge header", [](Victim& v) { v.put<uint32_t>(16, 0xFFFFFFFF); }, "4294967295 bytes"},
      {"bfloat16", [](Victim& v) { v.put<uint32_t>(20, 2); }, "dtype bfloat16 (2)"},
      {"an unknown dtype", [](Victim& v) { v.put<uint32_t>(20, 77); }, "unknown dtype (77)"},
      {"a dtype beyond int", [](Victim& v) { v.put<uint32_t>(20, 0x80000000); }, "unknown dtype"},
      {"a negative N", [](Victim& v) { v.put<uint64_t>(24, kHuge); }, "N = -1"},
      {"N beyond memory", [](Victim& v) { v.put<uint64_t>(24, uint64_t{1} << 40); }, "payload"},
      {"N beyond 63 bits", [](Victim& v) { v.put<uint64_t>(24, kMost); }, "63 bits"},
      {"N that overflows to its payload",
       [](Victim& v) { v.put<uint64_t>(24, uint64_t{N} + (uint64_t{1} << 62)); }, "63 bits"},
      {"no heads", [](Victim& v) { v.put<uint64_t>(32, 0); }, "H = 0"},
      {"H beyond 63 bits", [](Victim& v) { v.put<uint64_t>(32, kMost); }, "63 bits"},
      {"K = 0", [](Victim& v) { v.put<uint64_t>(40, 0); }, "K = 0"},
      {"K = 257", [](Victim& v) { v.put<uint64_t>(40, 257); }, "K = 257"},
      {"a huge K", [](Victim& v) { v.put<uint64_t>(40, kHuge); }, "K = -1"},
      {"V = 0", [](Victim& v) { v.put<uint64_t>(48, 0); }, "V = 0"},
      {"a huge V", [](Victim& v) { v.put<uint64_t>(48, kMost); }, "V = 9223372036854775807"},
      {"a payload that is too short", [](Victim& v) { v.put<uint64_t>(56, kPayload - 4); },
       "says 860 bytes of payload where its sizes make 864"},
      {"a huge payload", [](Victim& v) { v.put<uint64_t>(56, kHuge); }, "18446744073709551615"},
      {"a reserved byte", [](Victim& v) { v.bytes[119] = std::byte{1}; }, "reserved byte 119"},
      {"one more head, payload and all",
       [](Victim& v) {
         v.put<uint64_t>(32, H + 1);
         v.put<uint64_t>(56, N * (H + 1) * K * (K + V) * sizeof(float));
       },
       "of a saved state of 1280 (truncated)"},
      {"another payload checksum", [](Victim& v) { v.put<uint32_t>(120, 1); }, "damaged values"},
  };
  for (const Lie& lie : lies) {
    Victim v;
    lie.tell(v);
    v.seal();
    v.expect_refused(lie.what, lie.part);
  }
}

// A good buffer for other states than those it is loaded to.
TEST(HostileState, StatesThatDoNotFit) {
  struct Misfit {
    const char* what;
    std::function<void(View& h, View& u)> make;
    ErrorCode code;
    const char* argument;
    const char* part;
  };
  const auto shape = ErrorCode::invalid_shape;
  const std::vector<Misfit> misfits = {
      {"no h", [](View& h, View&) { h = {}; }, ErrorCode::invalid_argument, "h", "required"},
      {"no u", [](View&, View& u) { u = {}; }, ErrorCode::invalid_argument, "u", "required"},
      {"another N", [](View& h, View&) { h.size[0] = 1; }, shape, "h", "[2, 3, 4, 4] (as saved)"},
      {"another H", [](View&, View& u) { u.size[1] = 2; }, shape, "u", "[2, 3, 4, 5] (as saved)"},
      {"another K", [](View& h, View&) { h.size[2] = 3; }, shape, "h", "[2, 3, 4, 4] (as saved)"},
      {"another V", [](View&, View& u) { u.size[3] = 4; }, shape, "u", "[2, 3, 4, 5] (as saved)"},
      {"rank 3", [](View& h, View&) { h.rank = 3; }, shape, "h", "[N, H, K, K]"},
      {"float64", [](View& h, View&) { h.dtype = DType::float64; }, ErrorCode::invalid_dtype, "h",
       "must be float32 (as saved)"},
      {"expanded", [](View& h, View&) { h.stride[0] = 0; }, shape, "h", "must not share memory"},
      {"one memory", [](View& h, View& u) { u.data = h.data; }, ErrorCode::invalid_argument, "u",
       "shares its memory with h"},
  };
  for (const Misfit& misfit : misfits) {
    Victim v;
    View h = v.h_view(), u = v.u_view();
    misfit.make(h, u);
    try {
      gka_load_state(v.bytes, h, u);
      ADD_FAILURE() << misfit.what << ": loaded";
    } catch (const Error& e) {
      EXPECT_EQ(static_cast<int>(e.code()), static_cast<int>(misfit.code)) << e.what();
      EXPECT_EQ(e.argument(), misfit.argument) << e.what();
      EXPECT_NE(std::string(e.what()).find(misfit.part), std::string::npos) << e.what();
    }
    for (const auto* t : {&v.h, &v.u}) {
      for (float e : *t) ASSERT_TRUE(std::isnan(e)) << misfit.what << ": a state was written";
    }
  }
}

TEST(HostileState, SavingWhatDoesNotFit) {
  Victim v;
  std::fill(v.h.begin(), v.h.end(), 1.0f);
  const auto refused = [&](auto change, size_t size, const char* argument, const char* part,
                           kalmanet_status status) {
    View h = v.h_view(), u = v.u_view();
    change(h, u);
    const kalmanet_tensor c_h = testing::c_tensor(h), c_u = testing::c_tensor(u);
    Bytes bytes(size, std::byte{0x77});
    int64_t written = -5;
    EXPECT_TRUE(fails(kalmanet_gka_save_state(&c_h, &c_u, bytes.data(), size, &written), status,
                      argument, part));
    EXPECT_EQ(written, -5);
    EXPECT_EQ(bytes, Bytes(size, std::byte{0x77}));
  };
  const auto as_is = [](View&, View&) {};
  const size_t whole = kHeader + kPayload;
  for (size_t size : {size_t{0}, kHeader, whole - 1}) {
    refused(as_is, size, "buffer", "this state takes 992", KALMANET_INVALID_ARGUMENT);
  }
  refused([](View& h, View&) { h = {}; }, whole, "h", "required", KALMANET_INVALID_ARGUMENT);
  refused([](View&, View& u) { u = {}; }, whole, "u", "required", KALMANET_INVALID_ARGUMENT);
  refused([](View& h, View&) { h.size[3] = 3; }, whole, "h", "[2, 3, 4, 3]",
          KALMANET_INVALID_SHAPE);
  refused([](View&, View& u) { u.size[1] = 2; }, whole, "u", "as h", KALMANET_INVALID_SHAPE);
  refused([](View&, View& u) { u.dtype = DType::float64; }, whole, "u", "must be float32",
          KALMANET_INVALID_DTYPE);
  refused([](View& h, View& u) { h.dtype = u.dtype = DType::bfloat16; }, whole, "state",
          "float32 or float64", KALMANET_INVALID_DTYPE);
}

TEST(HostileState, SizesThatNoStateHas) {
  int64_t bytes = -5;
  const auto refused = [&](int32_t dtype, int64_t n, int64_t heads, int64_t k, int64_t v,
                           kalmanet_status status, const char* part) {
    EXPECT_TRUE(fails(kalmanet_gka_saved_state_bytes(dtype, n, heads, k, v, &bytes), status,
                      "state", part));
    EXPECT_EQ(bytes, -5);
  };
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  refused(0, -1, 1, 1, 1, KALMANET_INVALID_SHAPE, "N = -1");
  refused(0, 1, 0, 1, 1, KALMANET_INVALID_SHAPE, "H = 0");
  refused(0, 1, 1, 257, 1, KALMANET_INVALID_SHAPE, "K = 257");
  refused(0, 1, 1, 1, 0, KALMANET_INVALID_SHAPE, "V = 0");
  refused(0, kMost, 1, 1, 1, KALMANET_INVALID_SHAPE, "63 bits");
  refused(0, kMost / 8 - 15, 1, 1, 1, KALMANET_INVALID_SHAPE, "63 bits");  // the header tips it
  refused(0, 3037000500, 3037000500, 256, 256, KALMANET_INVALID_SHAPE, "63 bits");
  refused(KALMANET_FLOAT16, 1, 1, 1, 1, KALMANET_INVALID_DTYPE, "float16");
  refused(-3, 1, 1, 1, 1, KALMANET_INVALID_DTYPE, "unknown dtype (-3)");
  EXPECT_TRUE(ok(kalmanet_gka_saved_state_bytes(0, kMost / 8 - 16, 1, 1, 1, &bytes)));
  EXPECT_TRUE(fails(kalmanet_gka_saved_state_bytes(0, 1, 1, 1, 1, nullptr),
                    KALMANET_INVALID_ARGUMENT, "bytes", "null"));
}

TEST(HostileState, NullPointers) {
  Victim v;
  const kalmanet_tensor h = testing::c_tensor(v.h_view()), u = testing::c_tensor(v.u_view());
  kalmanet_gka_saved_state_info info = KALMANET_GKA_SAVED_STATE_INFO_INIT;
  // A null buffer counts as empty, whatever its size is said to be.
  EXPECT_TRUE(fails(kalmanet_gka_load_state(nullptr, 1000, &h, &u), KALMANET_INVALID_DATA, "buffer",
                    "holds 0 bytes"));
  EXPECT_TRUE(fails(kalmanet_gka_read_saved_state_info(nullptr, 1000, &info), KALMANET_INVALID_DATA,
                    "buffer", "holds 0 bytes"));
  EXPECT_TRUE(fails(kalmanet_gka_save_state(&h, &u, nullptr, 1000, nullptr),
                    KALMANET_INVALID_ARGUMENT, "buffer", "holds 0 bytes"));
  EXPECT_TRUE(fails(kalmanet_gka_load_state(v.bytes.data(), v.bytes.size(), nullptr, &u),
                    KALMANET_INVALID_ARGUMENT, "h", "required"));
  EXPECT_TRUE(fails(kalmanet_gka_save_state(&h, nullptr, v.bytes.data(), v.bytes.size(), nullptr),
                    KALMANET_INVALID_ARGUMENT, "u", "required"));
  EXPECT_TRUE(fails(kalmanet_gka_read_saved_state_info(v.bytes.data(), v.bytes.size(), nullptr),
                    KALMANET_INVALID_ARGUMENT, "info", "null"));
  info.struct_size = 7;
  EXPECT_TRUE(fails(kalmanet_gka_read_saved_state_info(v.bytes.data(), v.bytes.size(), &info),
                    KALMANET_INVALID_ARGUMENT, "info", "struct_size is 7"));
}

}  // namespace
}  // namespace kalmanet
