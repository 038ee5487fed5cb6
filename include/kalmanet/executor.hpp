// How work is spread over threads: a small interface, so that a host can lend its own pool.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "kalmanet/export.hpp"

namespace kalmanet {

class KALMANET_API Executor {
 public:
  virtual ~Executor() = default;
  // How many tasks can run at the same time (>= 1).
  virtual int concurrency() const noexcept = 0;
  // Calls task(i) once for every i in [0, n), in any order and on any thread, and returns when all
  // are done. A task's exception is rethrown here (tasks not begun are left out then). Called from
  // inside one of its own tasks, it runs the new ones on the calling thread.
  virtual void run(int64_t n, const std::function<void(int64_t)>& task) = 0;
};

// The library's own threads, started at first use: KALMANET_NUM_THREADS of them, or as many as the
// process may run on. Results never depend on the number (bit for bit).
KALMANET_API Executor& default_executor();
// Replaces the number of the library's own threads (>= 1; throws Error otherwise). Not to be called
// while work runs.
KALMANET_API void set_num_threads(int num_threads);
KALMANET_API int num_threads();

// A pool of its own, of `num_threads` threads (the one that calls run() included), beside the
// process-wide one: for a host that wants two sizes at a time. Throws Error outside 1..1024.
KALMANET_API std::unique_ptr<Executor> make_executor(int num_threads);

}  // namespace kalmanet
