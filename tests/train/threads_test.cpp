// One thread for every test of this room: threads that wait for each other by spinning crawl where
// other tests share the cores. (That the number of threads changes no bit is the core's promise.)
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

namespace kalmanet::train {
namespace {

const bool kOneThread = (at::set_num_threads(1), true);

TEST(Threads, OneForThisProgram) {
  EXPECT_TRUE(kOneThread);
  EXPECT_EQ(at::get_num_threads(), 1);
}

}  // namespace
}  // namespace kalmanet::train
