// Signal handlers that set a flag (see interrupt.hpp).
#include "train/interrupt.hpp"

namespace kalmanet::train {
namespace {

volatile std::sig_atomic_t requested_ = 0;

extern "C" void on_interrupt(int) {
  requested_ = 1;
}

}  // namespace

InterruptGuard::InterruptGuard() {
  requested_ = 0;
  struct sigaction action{};
  action.sa_handler = on_interrupt;
  sigemptyset(&action.sa_mask);
  // One shot: the second signal finds the default handler and ends the process.
  action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
  sigaction(SIGINT, &action, &old_int_);
  sigaction(SIGTERM, &action, &old_term_);
}

InterruptGuard::~InterruptGuard() {
  sigaction(SIGINT, &old_int_, nullptr);
  sigaction(SIGTERM, &old_term_, nullptr);
}

bool InterruptGuard::requested() {
  return requested_ != 0;
}
void InterruptGuard::clear() {
  requested_ = 0;
}

}  // namespace kalmanet::train
