// The library's own threads: a pool that sleeps when idle and spins for a moment between jobs, so
// that a decode step of a few microseconds is not dominated by waking threads up.
#include "kalmanet/executor.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/text.hpp"
#include "kalmanet/error.hpp"

namespace kalmanet {
namespace {

constexpr int kMaxThreads = 1024;
// A pause is 10 to 150 cycles, so this is 5 to 50 microseconds: longer than the gap between the
// operations of one decode step, shorter than anybody notices a core being busy.
constexpr int kSpins = 1000;

void pause_briefly() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The threads of one process do not survive a fork: the child counts one up and starts its own.
std::atomic<int> fork_count{0};

// True on a thread that is running a task of the pool: whatever it spreads runs on itself.
thread_local bool inside_task = false;

struct InsideTask {
  bool before = inside_task;
  InsideTask() { inside_task = true; }
  ~InsideTask() { inside_task = before; }
};

void run_inline(int64_t n, const std::function<void(int64_t)>& task) {
  for (int64_t i = 0; i < n; ++i) task(i);
}

// One call of run(): lives on the caller's stack.
struct Job {
  const std::function<void(int64_t)>* task;
  int64_t n;
  std::atomic<int64_t> next{0};
  std::mutex exception_mutex;
  std::exception_ptr exception;

  void work() noexcept {
    const InsideTask guard;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      try {
        (*task)(i);
      } catch (...) {
        next.store(n, std::memory_order_relaxed);  // what has not begun is not worth beginning
        const std::lock_guard lock(exception_mutex);
        if (!exception) exception = std::current_exception();
      }
    }
  }
};

// `concurrency` - 1 workers and whoever calls run().
class Workers {
 public:
  explicit Workers(int concurrency) : fork_count_(fork_count.load()) {
    try {
      for (int i = 1; i < concurrency; ++i) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
      // The system has no more threads to give: work with those that started.
    }
  }
  ~Workers() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      announced_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int concurrency() const noexcept { return static_cast<int>(threads_.size()) + 1; }
  bool survived_fork() const noexcept { return fork_count_ == fork_count.load(); }

  void run(int64_t n, const std::function<void(int64_t)>& task) {
    // A second thread of the host program that comes while a job runs does its own work itself: no
    // core would be free for it anyway.
    const std::unique_lock turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {
      run_inline(n, task);
      return;
    }
    Job job{&task, n, {}, {}, {}};
    const int helpers = static_cast<int>(std::min<int64_t>(n - 1, std::ssize(threads_)));
    int sleeping;
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      places_ = helpers;
      announced_.fetch_add(1);
      sleeping = sleeping_;
    }
    for (int i = 0; i < std::min(helpers, sleeping); ++i) wake_.notify_one();
    job.work();
    // Only those who joined are waited for: a worker that slept through a short job costs nothing.
    {
      const std::lock_guard lock(mutex_);
      job_ = nullptr;
      places_ = 0;
    }
    for (int i = 0; i < kSpins && active_.load(std::memory_order_acquire) > 0; ++i) pause_briefly();
    {
      std::unique_lock lock(mutex_);
      done_.wait(lock, [this] { return active_.load() == 0; });
    }
    if (job.exception) std::rethrow_exception(job.exception);
  }

 private:
  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && announced_.load(std::memory_order_acquire) == seen; ++i) {
        pause_briefly();
      }
      Job* job = nullptr;
      {
        std::unique_lock lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return stop_ || announced_.load() != seen; });
        --sleeping_;
        if (stop_) return;
        seen = announced_.load();
        if (places_ > 0) {
          --places_;
          active_.fetch_add(1);
          job = job_;
        }
      }
      if (job == nullptr) continue;
      job->work();
      const std::lock_guard lock(mutex_);
      // The last access to the job is above: its owner may return as soon as this reads zero.
      if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  const int fork_count_;
  std::mutex turn_;   // one job at a time
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  bool stop_ = false;
  Job* job_ = nullptr;
  int places_ = 0;    // helpers that may still join the job
  int sleeping_ = 0;  // workers inside wake_.wait
  std::atomic<uint64_t> announced_{0};
  std::atomic<int> active_{0};  // helpers at work
  std::vector<std::thread> threads_;
};

int allowed_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int initial_num_threads() {
  const char* value = std::getenv("KALMANET_NUM_THREADS");
  if (value == nullptr || *value == '\0') return std::min(allowed_processors(), kMaxThreads);
  int n = 0;
  const char* end = value + std::strlen(value);
  const auto [stopped, error] = std::from_chars(value, end, n);
  if (error != std::errc() || stopped != end || n < 1 || n > kMaxThreads) {
    throw Error(
        ErrorCode::invalid_argument, "KALMANET_NUM_THREADS",
        core::text("the environment variable is \"", value, "\"; must be a whole number in 1..",
                   kMaxThreads, ", or unset for one thread a processor"));
  }
  return n;
}

class Pool final : public Executor {
 public:
  explicit Pool(int num_threads) {
    [[maybe_unused]] static const int once =  // however many pools there are
        pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); });
    workers_ = std::make_unique<Workers>(num_threads);
  }
  ~Pool() override {
    if (!workers_->survived_fork()) static_cast<void>(workers_.release());  // as in replace()
  }
  int concurrency() const noexcept override { return workers_->concurrency(); }

  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    if (n <= 0) return;
    if (n == 1 || inside_task || concurrency() == 1) {
      run_inline(n, task);
      return;
    }
    if (!workers_->survived_fork()) replace(concurrency());
    workers_->run(n, task);
  }

  void replace(int num_threads) {
    // In a forked child the old threads are gone and their mutexes may be held for ever: leave
    // them.
    if (!workers_->survived_fork()) static_cast<void>(workers_.release());
    workers_ = std::make_unique<Workers>(num_threads);
  }

 private:
  std::unique_ptr<Workers> workers_;
};

void check_num_threads(int num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads) {
    throw Error(ErrorCode::invalid_argument, "num_threads",
                core::text("got ", num_threads, "; must be in 1..", kMaxThreads));
  }
}

// Never destroyed: the threads may outlive every static object.
Pool& pool() {
  static Pool& instance = *new Pool(initial_num_threads());
  return instance;
}

}  // namespace

Executor& default_executor() {
  return pool();
}

void set_num_threads(int num_threads) {
  check_num_threads(num_threads);
  if (inside_task) {
    throw Error(ErrorCode::invalid_argument, "num_threads",
                "set_num_threads was called from inside a task; call it while no work runs");
  }
  if (num_threads != pool().concurrency()) pool().replace(num_threads);
}

int num_threads() {
  return pool().concurrency();
}

std::unique_ptr<Executor> make_executor(int num_threads) {
  check_num_threads(num_threads);
  return std::make_unique<Pool>(num_threads);
}

}  // namespace kalmanet
