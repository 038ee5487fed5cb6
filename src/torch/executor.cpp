// PyTorch's parallel_for behind kalmanet's executor interface.
#include "torch/executor.hpp"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

namespace kalmanet::torch_ops {
namespace {

class TorchExecutor final : public Executor {
 public:
  int concurrency() const noexcept override {
    uint32_t threads = 1;
    // Asked directly: the C++ wrapper throws, and this function does not.
    if (torch_get_num_threads(&threads) != 0) return 1;
    return std::max<int>(1, static_cast<int>(threads));
  }

  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    const int64_t workers = std::min<int64_t>(n, concurrency());
    if (workers <= 1) {
      for (int64_t i = 0; i < n; ++i) task(i);
      return;
    }
    // parallel_for would cut [0, n) into equal pieces, but tasks are not equally long: each worker
    // takes the next task instead. Inside one of its own tasks parallel_for makes one call on this
    // thread, which then takes them all. Exceptions do not cross the C interface: the first is
    // kept.
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    const auto work = [&](int64_t, int64_t) {
      for (int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) {
        try {
          task(i);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(failure_mutex);
          if (!failure) failure = std::current_exception();
          next.store(n);
        }
      }
    };
    torch::stable::parallel_for(0, workers, 1, work);
    if (failure) std::rethrow_exception(failure);
  }
};

}  // namespace

Executor& torch_executor() {
  static TorchExecutor executor;
  return executor;
}

}  // namespace kalmanet::torch_ops
