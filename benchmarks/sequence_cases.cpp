// Whole sequences: solvers, ridges, memories, dtypes, head sizes and instruction sets.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cases.hpp"
#include "groups.hpp"
#include "kalmanet/kalmanet.hpp"
#include "sequence.hpp"

namespace kalmanet::bench {
namespace {

constexpr int kChebyshevSteps = 30;

Method method(Solver solver, InstructionSet isa, int num_iter = kChebyshevSteps) {
  Method m;
  m.solver = solver;
  m.num_iter = num_iter;
  m.isa = isa;
  return m;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

std::string memory_text(double memory) {
  return std::isinf(memory) ? "unlimited" : number(memory);
}

struct Sizes {
  Shape large, medium, one_head, wide, narrow;
  explicit Sizes(bool quick)
      : large(quick ? Shape{256, 1, 64, 64} : Shape{8192, 4, 128, 128}),
        medium(quick ? Shape{256, 1, 64, 64} : Shape{4096, 4, 128, 128}),
        one_head(quick ? Shape{256, 1, 64, 64} : Shape{8192, 1, 128, 128}),
        wide(quick ? Shape{128, 1, 256, 256} : Shape{2048, 4, 256, 256}),
        narrow(quick ? Shape{256, 1, 64, 64} : Shape{8192, 4, 64, 64}) {}
};

// Every solver at ridge ratio 0.02. The bars of the page compare chebyshev(30) with direct.
Group solvers(const Sizes& sizes, InstructionSet isa, Pass pass, double memory) {
  Group group{"solvers/memory:" + memory_text(memory), pass, {}};
  const Recipe recipe{sizes.large, DType::float32, memory};
  for (const Solver solver : {Solver::chebyshev, Solver::direct, Solver::automatic, Solver::cg}) {
    // cg only for the paper's comparison, once.
    if (solver == Solver::cg && std::isinf(memory)) continue;
    const Method m = method(solver, isa);
    group.variants.push_back({m.text(), recipe, m});
  }
  return group;
}

// direct at one ridge ratio after the other: its cost must not depend on it.
Group ridges(const Sizes& sizes, InstructionSet isa, Pass pass, double memory) {
  Group group{"ridges/memory:" + memory_text(memory), pass, {}};
  for (const double ridge : {0.1, 0.02, 0.005, 0.001}) {
    Method m = method(Solver::direct, isa);
    m.ridge_ratio = ridge;
    group.variants.push_back({number(ridge), {sizes.large, DType::float32, memory}, m});
  }
  return group;
}

// A learned ridge: one ratio a token and head, 0.005 to 0.05; Chebyshev at the same accuracy.
Group learned(const Sizes& sizes, InstructionSet isa, Pass pass, double memory) {
  Group group{"learned/memory:" + memory_text(memory), pass, {}, 3, 2};
  const Recipe recipe{sizes.large, DType::float32, memory, 0.005, 0.05};
  for (Method m : {method(Solver::chebyshev, isa, kAutoNumIter), method(Solver::direct, isa)}) {
    m.tolerance = 1e-5;
    group.variants.push_back({m.text(), recipe, m});
  }
  return group;
}

Group dtypes(const Sizes& sizes, InstructionSet isa, Pass pass) {
  Group group{"dtypes", pass, {}, 3, 2};
  for (const Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
      const Method m = method(solver, isa);
      group.variants.push_back({m.text() + " " + name(dtype), {sizes.medium, dtype, 256}, m});
    }
  }
  return group;
}

Group head_sizes(const Sizes& sizes, InstructionSet isa, Pass pass) {
  Group group{"head_sizes", pass, {}, 3, 2};
  for (const Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (const Shape& shape : {sizes.narrow, sizes.medium, sizes.wide}) {
      const Method m = method(solver, isa);
      const Recipe recipe{shape, DType::float32, 256};
      group.variants.push_back({m.text() + " " + shape.text(), recipe, m});
    }
  }
  return group;
}

// One long sequence with one head: what all cores have to share.
Group one_head(const Sizes& sizes, InstructionSet isa, Pass pass) {
  Group group{"one_head", pass, {}, 5, 2};
  for (const Solver solver : {Solver::chebyshev, Solver::direct}) {
    const Method m = method(solver, isa);
    group.variants.push_back({m.text(), {sizes.one_head, DType::float32, 256}, m});
  }
  return group;
}

Group instruction_sets(const Sizes& sizes, Pass pass) {
  Group group{"instruction_sets", pass, {}, 3, 2};
  const std::vector<InstructionSet> sets = available_instruction_sets();
  for (const Solver solver : {Solver::chebyshev, Solver::direct}) {
    for (size_t i = sets.size(); i-- > 0;) {  // fastest first
      const Method m = method(solver, sets[i]);
      const Recipe recipe{sizes.medium, DType::float32, 256};
      group.variants.push_back({m.text() + " " + name(sets[i]), recipe, m});
    }
  }
  return group;
}

}  // namespace

void register_sequence_cases(const Settings& settings) {
  const Sizes sizes(settings.quick);
  const InstructionSet fastest = available_instruction_sets().back();
  for (const Pass pass : {Pass::forward, Pass::forward_backward}) {
    // The order follows the tensors, which cases in a row share.
    register_group(solvers(sizes, fastest, pass, 256), settings);
    register_group(ridges(sizes, fastest, pass, 256), settings);
    register_group(solvers(sizes, fastest, pass, kUnlimited), settings);
    register_group(ridges(sizes, fastest, pass, kUnlimited), settings);
    register_group(learned(sizes, fastest, pass, 256), settings);
    register_group(learned(sizes, fastest, pass, kUnlimited), settings);
    register_group(dtypes(sizes, fastest, pass), settings);
    register_group(head_sizes(sizes, fastest, pass), settings);
    register_group(one_head(sizes, fastest, pass), settings);
    register_group(instruction_sets(sizes, pass), settings);
  }
}

}  // namespace kalmanet::bench
