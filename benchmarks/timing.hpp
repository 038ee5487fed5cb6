// Clock, medians, and what every case is told.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <ctime>
#include <thread>
#include <vector>

namespace kalmanet::bench {

struct Settings {
  bool quick = false;      // seconds instead of minutes: is everything still there?
  bool spoil = false;      // hand wrong answers to the gates, which must refuse them
  bool peer_only = false;  // only say how fast OpenBLAS is
  int threads = 2;
};

template <class Work>
double seconds_of(Work&& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Processor time of the calling thread, or of the whole process: what other programs take meanwhile
// does not count.
enum class Cpu { thread, process };
template <class Work>
double cpu_seconds_of(Cpu which, Work&& work) {
  const clockid_t clock = which == Cpu::thread ? CLOCK_THREAD_CPUTIME_ID : CLOCK_PROCESS_CPUTIME_ID;
  const auto now = [&] {
    timespec t{};
    clock_gettime(clock, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  const double begin = now();
  work();
  return now() - begin;
}

// OpenBLAS's threads wait busily for 2^26 cycles (26 ms at 2.6 GHz) after a product, which would
// take a core away from whoever is timed next.
inline void let_threads_sleep() {
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
}

// One figure over the rounds.
struct Samples {
  std::vector<double> values;

  void add(double value) { values.push_back(value); }
  double median() const {
    std::vector<double> v = values;
    std::sort(v.begin(), v.end());
    const size_t n = v.size();
    return n == 0 ? 0.0 : 0.5 * (v[(n - 1) / 2] + v[n / 2]);
  }
  double min() const {
    return values.empty() ? 0.0 : *std::min_element(values.begin(), values.end());
  }
  double max() const {
    return values.empty() ? 0.0 : *std::max_element(values.begin(), values.end());
  }
};

}  // namespace kalmanet::bench
