// Threads of the C ABI: pools, and the caller's own threads behind the library's Executor.
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "api/c_error.hpp"
#include "api/c_structs.hpp"
#include "core/check.hpp"
#include "core/text.hpp"
#include "kalmanet/error.hpp"
#include "kalmanet/executor.hpp"

namespace kalmanet::api {
namespace {

constexpr int32_t kMaxConcurrency = 1024;

// True on a thread that is running a task for a callback: whatever it spreads runs on itself, so
// that the caller's pool is never entered from inside.
thread_local bool inside_task = false;

// One call of the caller's `run`. It trusts the callback with nothing: an index that comes twice or
// from nowhere is not run, and one that does not come is noticed.
class CallbackJob {
 public:
  CallbackJob(int64_t n, const std::function<void(int64_t)>& task)
      : n_(n), task_(task), claimed_(static_cast<size_t>((n + kBits - 1) / kBits)) {}

  // What the callback calls; no exception may leave it.
  static void call(void* job, int64_t i) noexcept { static_cast<CallbackJob*>(job)->run(i); }

  // To be called when `run` has returned.
  void finish(int32_t status) {
    {
      const std::lock_guard lock(mutex_);
      if (failure_) std::rethrow_exception(failure_);
    }
    const int64_t done = done_.load(std::memory_order_acquire);
    if (status != 0) {
      throw CallbackFailed(core::text("run: returned ", status, " (", done, " of ", n_,
                                      " tasks were run); 0 means success"));
    }
    if (done != n_) {
      throw CallbackFailed(core::text("run: returned when ", done, " of ", n_,
                                      " tasks were done; it must call task(task_data, i) for "
                                      "every i and wait for them"));
    }
  }

 private:
  static constexpr int64_t kBits = 64;

  void run(int64_t i) noexcept {
    const bool before = inside_task;
    inside_task = true;
    try {
      claim(i);
      if (!failed_.load(std::memory_order_relaxed)) task_(i);
      done_.fetch_add(1, std::memory_order_release);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);  // what has not begun is not worth beginning
    }
    inside_task = before;
  }

  void claim(int64_t i) {
    if (i < 0 || i >= n_) {
      throw CallbackFailed(
          core::text("run: called task ", i, " of a job of ", n_, "; tasks are 0..", n_ - 1));
    }
    const uint64_t bit = uint64_t{1} << (i % kBits);
    if (claimed_[static_cast<size_t>(i / kBits)].fetch_or(bit) & bit) {
      throw CallbackFailed(core::text("run: called task ", i, " twice; each must be called once"));
    }
  }

  const int64_t n_;
  const std::function<void(int64_t)>& task_;
  std::vector<std::atomic<uint64_t>> claimed_;  // a bit a task
  std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr failure_;
};

class CallbackExecutor final : public Executor {
 public:
  explicit CallbackExecutor(const kalmanet_executor_callbacks& callbacks) : callbacks_(callbacks) {}

  int concurrency() const noexcept override { return callbacks_.concurrency; }

  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    if (n <= 0) return;
    if (inside_task) {
      for (int64_t i = 0; i < n; ++i) task(i);
      return;
    }
    CallbackJob job(n, task);
    job.finish(callbacks_.run(callbacks_.user_data, n, &CallbackJob::call, &job));
  }

 private:
  const kalmanet_executor_callbacks callbacks_;
};

// Hands a new handle out; nothing leaks if there is no memory for it.
void hand_out(std::shared_ptr<Executor> made, kalmanet_executor** executor) {
  *executor = new kalmanet_executor{std::move(made)};
}

}  // namespace
}  // namespace kalmanet::api

using namespace kalmanet;

kalmanet_status kalmanet_set_num_threads(int32_t num_threads) {
  return api::guarded([&] { set_num_threads(num_threads); });
}

kalmanet_status kalmanet_get_num_threads(int32_t* count) {
  return api::guarded([&] {
    api::require(count, "num_threads");
    *count = num_threads();
  });
}

kalmanet_status kalmanet_executor_create_pool(int32_t num_threads, kalmanet_executor** executor) {
  return api::guarded([&] {
    api::require(executor, "executor");
    api::hand_out(make_executor(num_threads), executor);
  });
}

kalmanet_status kalmanet_executor_create_callback(const kalmanet_executor_callbacks* callbacks,
                                                  kalmanet_executor** executor) {
  return api::guarded([&] {
    api::require(executor, "executor");
    const kalmanet_executor_callbacks from = api::read_callbacks(callbacks);
    if (from.run == nullptr) {
      core::fail(ErrorCode::invalid_argument, "run", "is a null pointer; it is required");
    }
    if (from.concurrency < 1 || from.concurrency > api::kMaxConcurrency) {
      core::fail(ErrorCode::invalid_argument, "concurrency",
                 core::text("got ", from.concurrency, "; must be in 1..", api::kMaxConcurrency));
    }
    api::hand_out(std::make_shared<api::CallbackExecutor>(from), executor);
  });
}

void kalmanet_executor_destroy(kalmanet_executor* executor) {
  delete executor;
}
