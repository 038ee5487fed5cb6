// Groups: ways to compute something that are timed turn by turn in the same rounds, so that
// whatever else the machine does hits all of them and the ratios between them hold.
#pragma once

#include <string>
#include <vector>

#include "sequence.hpp"
#include "timing.hpp"

namespace kalmanet::bench {

struct Variant {
  std::string name;
  Recipe recipe;
  Method method;
};

struct Group {
  std::string name;  // "solvers", "dtypes", ...; its case is "sequence/<name>/<pass>"
  Pass pass = Pass::forward;
  std::vector<Variant> variants;  // what is compared; the first is what others are compared with
  int rounds = 5;                 // by the clock, all threads
  int one_thread_rounds = 3;      // by processor time, one thread
};

// Registers the case. A round runs OpenBLAS's matrix product and then every variant. The counters,
// each after "<index> <variant>:" (at most ten variants): ms (its _min and _max), gflop, mbytes,
// gflops, ratio (to OpenBLAS, a round; median), speed (the first variant's time over this one's,
// likewise), one_ms, one_gflops, one_ratio, one_speed (one thread, by its processor time),
// steps_min, steps_max, factorizations (a chunk), workspace (bytes).
void register_group(const Group& group, const Settings& settings);

// Operations of a pass, counted as flops.hpp says.
double counted_flops(const Recipe& recipe, const Method& method, Pass pass);

}  // namespace kalmanet::bench
