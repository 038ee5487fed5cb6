// The unit norm of the CPU room against a scalar float64 twin, on every instruction set.
#include <gtest/gtest.h>

#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/arrays.hpp"
#include "cpu/norm.hpp"

namespace kalmanet {
namespace {

using testing::Array;
using testing::ArrayOf;
using testing::BFloat16;
using testing::expect_close;
using testing::expect_same_bits;
using testing::Float16;
using testing::for_each_dtype;
using testing::for_each_instruction_set;
using testing::Layout;
using testing::ReversedExecutor;

// Of every output, relative: 17 unit roundoffs of the arithmetic (a row of 256 is summed in at most
// 64 terms a lane, four where nothing is wide). dx is the difference of two terms at most as large
// as dy / s: its error is relative to that.
constexpr double kBound = 1e-6;
template <class T>
constexpr double kBoundOf = std::is_same_v<T, double> ? 2 * 0x1p-29 * kBound : kBound;

struct Case {
  int64_t R, K;
  QkNorm kind = QkNorm::official;
  Layout layout = Layout::dense;
  double eps = 1e-6;
  float size = 1.0f;  // of the elements of x
  uint64_t seed = 1;

  std::string text() const {
    std::ostringstream s;
    s << "unit_norm R=" << R << " K=" << K << " kind=" << static_cast<int>(kind)
      << " layout=" << testing::name(layout) << " eps=" << eps << " size=" << size
      << " seed=" << seed;
    return s.str();
  }
};

template <class T>
struct Tensors {
  ArrayOf<T> x, dy, y, dx;
  UnitNormInputs options;

  explicit Tensors(const Case& c) {
    std::mt19937_64 random(c.seed);
    x = ArrayOf<T>({c.R, c.K}, c.layout).fill(random, c.size);
    dy = ArrayOf<T>({c.R, c.K}, c.layout).fill(random);
    y = ArrayOf<T>({c.R, c.K}, c.layout);
    dx = ArrayOf<T>({c.R, c.K}, c.layout);
    options.kind = c.kind;
    options.eps = c.eps;
  }
  UnitNormInputs inputs() const {
    UnitNormInputs in = options;
    in.x = x.view();
    return in;
  }
  void run(Executor& executor) {
    cpu::unit_norm_forward(inputs(), y.view(), executor);
    cpu::unit_norm_backward(inputs(), dy.view(), dx.view(), executor);
  }
};

// The definition and its gradient in float64, row-major.
struct Twin {
  Case c;
  std::vector<double> x, dy, y, dx, terms;  // terms: dy / s

  template <class T>
  Twin(const Case& case_, const Tensors<T>& t) : c(case_), x(t.x.values()), dy(t.dy.values()) {}

  // (long double: beside the float64 kernels)
  long double divisor(const double* row) const {
    long double square = 0;
    for (int64_t i = 0; i < c.K; ++i) square += static_cast<long double>(row[i]) * row[i];
    return c.kind == QkNorm::fla ? std::sqrt(square + c.eps) : std::sqrt(square) + c.eps;
  }
  void forward() {
    y.resize(x.size());
    for (int64_t r = 0; r < c.R; ++r) {
      const long double s = divisor(&x[r * c.K]);
      for (int64_t i = r * c.K; i < (r + 1) * c.K; ++i) y[i] = static_cast<double>(x[i] / s);
    }
  }
  void backward() {
    dx.resize(x.size());
    terms.resize(x.size());
    for (int64_t r = 0; r < c.R; ++r) {
      const double *row = &x[r * c.K], *g = &dy[r * c.K];
      const long double s = divisor(row);
      long double dot = 0, square = 0;
      for (int64_t i = 0; i < c.K; ++i) {
        dot += static_cast<long double>(row[i]) * g[i];
        square += static_cast<long double>(row[i]) * row[i];
      }
      const long double n = c.kind == QkNorm::fla ? s : std::sqrt(square);
      for (int64_t i = 0; i < c.K; ++i) {
        const long double along = square > 0 ? row[i] * dot / (n * s * s) : 0;
        dx[r * c.K + i] = static_cast<double>(g[i] / s - along);
        terms[r * c.K + i] = static_cast<double>(g[i] / s);
      }
    }
  }
  double loss() {
    forward();
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
    return sum;
  }
};

template <class T>
void check_dtype(const Case& c) {
  Twin twin(c, Tensors<T>(c));
  twin.forward();
  twin.backward();
  for_each_instruction_set([&] {
    Tensors<T> t(c);
    t.run(default_executor());
    const std::string where = c.text() + " " + name(DTypeOf<T>::value);
    expect_close("y", t.y, twin.y, kBoundOf<T>, where);
    expect_close("dx", t.dx, twin.dx, kBoundOf<T>, where, twin.terms);
  });
}
void check(const Case& c) {
  for_each_dtype([&]<class T>(T) { check_dtype<T>(c); });
}

TEST(UnitNormTwin, GradientAgainstFiniteDifferences) {
  for (const Case& c :
       {Case{3, 5}, Case{2, 7, QkNorm::fla}, Case{2, 3, QkNorm::official, Layout::dense, 0.5},
        Case{2, 3, QkNorm::fla, Layout::dense, 0.5}}) {
    Twin twin(c, Tensors<float>(c));
    twin.backward();
    for (size_t i = 0; i < twin.x.size(); ++i) {
      const double h = 1e-6, before = twin.x[i];
      twin.x[i] = before + h;
      const double above = twin.loss();
      twin.x[i] = before - h;
      const double below = twin.loss();
      twin.x[i] = before;
      EXPECT_NEAR(twin.dx[i], (above - below) / (2 * h), 1e-8) << c.text() << " element " << i;
    }
  }
}

TEST(UnitNorm, OddSizes) {
  uint64_t seed = 1;
  for (int64_t K : {2, 5, 16, 32, 60, 64, 100, 128, 200, 256}) {
    for (int64_t R : {1, 3, 63, 65, 300}) {
      for (QkNorm kind : {QkNorm::official, QkNorm::fla}) {
        check({R, K, kind, Layout::dense, 1e-6, 1.0f, ++seed});
      }
    }
  }
  check({20000, 32});  // many tasks
  check({0, 16});
}

// With one element a row dx is eps / s^2 times dy, a difference of terms 1e6 times as large.
TEST(UnitNorm, RowsOfOneElement) {
  const Case c{50, 1};
  Twin twin(c, Tensors<float>(c));
  twin.forward();
  twin.backward();
  for_each_instruction_set([&] {
    Tensors<float> t(c);
    t.run(default_executor());
    expect_close("y", t.y, twin.y, kBound, c.text());
    for (int64_t r = 0; r < c.R; ++r) {
      EXPECT_NEAR(t.dx.at(r, 0), twin.dx[r], kBound * std::abs(twin.terms[r])) << "row " << r;
    }
  });
}

TEST(UnitNorm, AnyStrides) {
  for (Layout layout : {Layout::padded, Layout::spread, Layout::transposed, Layout::mirrored}) {
    for (QkNorm kind : {QkNorm::official, QkNorm::fla}) {
      check({70, 20, kind, layout});
      check({3, 129, kind, layout});
    }
  }
}

// Where eps decides, and where it does not. (float16 holds none of the first and the last.)
TEST(UnitNorm, SizesAgainstEps) {
  for (float size : {1e-15f, 1e-7f, 1e-3f, 1e3f, 1e12f}) {
    for (QkNorm kind : {QkNorm::official, QkNorm::fla}) {
      const Case c{20, 64, kind, Layout::dense, 1e-6, size};
      check_dtype<float>(c);
      check_dtype<double>(c);
      check_dtype<BFloat16>(c);
    }
  }
}

TEST(UnitNorm, RowOfZerosStaysZeroAndItsNormIsAConstant) {
  for (QkNorm kind : {QkNorm::official, QkNorm::fla}) {
    const double scale = kind == QkNorm::official ? 1e6 : 1e3;  // 1 / eps, 1 / sqrt(eps)
    for_each_instruction_set([&] {
      Tensors<float> t(Case{3, 40, kind});
      for (int64_t i = 0; i < 40; ++i) t.x.at(1, i) = 0.0f;
      t.run(default_executor());
      for (int64_t i = 0; i < 40; ++i) {
        EXPECT_EQ(t.y.at(1, i), 0.0f) << "element " << i;
        const double want = scale * t.dy.at(1, i);
        EXPECT_NEAR(t.dx.at(1, i), want, 1e-6 * std::abs(want)) << "element " << i;
      }
    });
  }
}

TEST(UnitNorm, AnyNumberOfThreadsGivesTheSameBits) {
  const int before = num_threads();
  for_each_dtype([&]<class T>(T) {
    for_each_instruction_set([&] {
      const Case c{9000, 5};
      Tensors<T> one(c);
      set_num_threads(1);
      one.run(default_executor());
      const auto compare = [&](Executor& executor, const std::string& how) {
        Tensors<T> t(c);
        t.run(executor);
        expect_same_bits("y", t.y, one.y, c.text() + ", " + how);
        expect_same_bits("dx", t.dx, one.dx, c.text() + ", " + how);
      };
      for (int threads : {2, 3}) {
        set_num_threads(threads);
        compare(default_executor(), std::to_string(threads) + " threads");
      }
      ReversedExecutor reversed;
      compare(reversed, "tasks in reverse");
    });
  });
  set_num_threads(before);
}

}  // namespace
}  // namespace kalmanet
