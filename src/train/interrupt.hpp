// Ctrl-C as a request: the loop finishes its step, saves and returns.
#pragma once

#include <csignal>

namespace kalmanet::train {

// While one lives, SIGINT and SIGTERM only set a flag; a second one ends the process as usual.
// The handlers before are put back at the end.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  static bool requested();
  static void clear();

 private:
  struct sigaction old_int_{}, old_term_{};
};

}  // namespace kalmanet::train
