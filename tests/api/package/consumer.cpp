// A program of somebody else's on the C++ interface: a forward, an exception across the library's
// border, and an executor of its own.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <kalmanet/kalmanet.hpp>

namespace {

class InOrder final : public kalmanet::Executor {
 public:
  int concurrency() const noexcept override { return 2; }
  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    for (int64_t i = 0; i < n; ++i) task(i);
  }
};

}  // namespace

int main() {
  const float one = 1, two = 2;
  float o = 0;
  InOrder executor;
  kalmanet::GkaInputs in;
  in.q = in.k = kalmanet::dense(&one, {1, 1, 1, 1});
  in.v = kalmanet::dense(&two, {1, 1, 1, 1});
  kalmanet::GkaOutputs out;
  out.o = kalmanet::dense(&o, {1, 1, 1, 1});
  kalmanet::GkaOptions options;
  options.executor = &executor;
  options.num_iter = kalmanet::kAutoNumIter;
  kalmanet::gka_forward(in, out, options);
  if (std::abs(o - 2 / 1.02) > 1e-4) return 1;
  try {
    in.v.rank = 3;
    kalmanet::gka_forward(in, out, options);
    return 1;
  } catch (const kalmanet::Error& e) {
    if (e.code() != kalmanet::ErrorCode::invalid_shape || e.argument() != "v") return 1;
  }
  std::printf("kalmanet %s from C++\n", kalmanet::version());
}
