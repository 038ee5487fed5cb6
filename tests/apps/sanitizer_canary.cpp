// Errors on purpose, each of which must end the program with a sanitizer's report:
//   sanitizer_canary heap | freed | undefined | none
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

int main(int argc, char** argv) {
  const std::string error = argc > 1 ? argv[1] : "none";
  const size_t four = std::strlen("four") + (argc > 5 ? 1 : 0);  // not known to the compiler
  if (error == "heap") {
    const auto block = std::make_unique<char[]>(four);
    std::memset(block.get(), 'x', four);
    std::printf("%d\n", block[four]);
  } else if (error == "freed") {
    auto block = std::make_unique<char[]>(four);
    const volatile char* gone = block.get();
    block.reset();
    std::printf("%d\n", gone[0]);
  } else if (error == "undefined") {
    volatile int largest = std::numeric_limits<int>::max();
    std::printf("%d\n", largest + static_cast<int>(four));
  }
  return 0;
}
