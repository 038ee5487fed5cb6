// One pass of one solver again and again on one thread: what tools/profile samples.
//
//   kalmanet_profile [chebyshev|direct|auto|cg] [forward|forward_backward] [SECONDS] [MEMORY]
//                    [RIDGE_RATIO]
//
// K = V = 128, T = 4096, one head, float32; chebyshev and cg with 30 steps. MEMORY in tokens; 0:
// unlimited.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

#include "kalmanet/kalmanet.hpp"
#include "sequence.hpp"
#include "timing.hpp"

namespace kalmanet::bench {
namespace {

Solver solver_of(const std::string& text) {
  for (const Solver solver : {Solver::chebyshev, Solver::direct, Solver::automatic, Solver::cg}) {
    if (text == name(solver)) return solver;
  }
  throw std::runtime_error("the solver is \"" + text +
                           "\"; there are chebyshev, direct, auto and cg");
}

Pass pass_of(const std::string& text) {
  for (const Pass pass : {Pass::forward, Pass::forward_backward}) {
    if (text == name(pass)) return pass;
  }
  throw std::runtime_error("the pass is \"" + text + "\"; there are forward and forward_backward");
}

void run(int argc, char** argv) {
  const auto argument = [&](int i, const char* otherwise) {
    return std::string(i < argc ? argv[i] : otherwise);
  };
  Method method;
  method.solver = solver_of(argument(1, "direct"));
  const Pass pass = pass_of(argument(2, "forward"));
  const double seconds = std::stod(argument(3, "5")), memory = std::stod(argument(4, "256"));
  method.ridge_ratio = std::stod(argument(5, "0.02"));
  set_num_threads(1);
  Sequence sequence({{4096, 1, 128, 128}, DType::float32, memory > 0 ? memory : kUnlimited});
  sequence.run(pass, method);
  int calls = 0;
  double spent = 0;
  for (; spent < seconds; ++calls) {
    spent += cpu_seconds_of(Cpu::thread, [&] { sequence.run(pass, method); });
  }
  std::printf("%s %s on %s: %.2f us a token, %d calls\n", method.text().c_str(), name(pass),
              name(instruction_set()),
              1e6 * spent / calls / static_cast<double>(sequence.recipe.shape.T), calls);
}

}  // namespace
}  // namespace kalmanet::bench

int main(int argc, char** argv) {
  try {
    kalmanet::bench::run(argc, argv);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kalmanet_profile: %s\n", error.what());
    return 1;
  }
}
