// Processor time: what a measurement on a shared machine can be judged by.
#pragma once

#include <ctime>

namespace kalmanet::train {

// Seconds that all threads of this program have computed so far. Unlike the clock on the wall it
// does not go on while other programs have the cores.
inline double processor_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace kalmanet::train
