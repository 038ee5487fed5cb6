// This program's allocator, counted: how much memory a piece of code holds at its worst, and what
// happens when there is none. Replaces malloc and its relatives of glibc for the whole program
// (only one source file of a program may include this).
#pragma once

#include <errno.h>
#include <malloc.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace kalmanet::testing {

// Bytes handed out and not yet freed, and the most there were.
inline std::atomic<int64_t> live_bytes{0}, peak_bytes{0};
// After this many more allocations on this thread all later ones fail; < 0: none does.
inline thread_local int64_t fail_after = -1;

inline bool allocation_fails() {
  if (fail_after > 0) --fail_after;
  return fail_after == 0;
}
inline void* count(void* memory) {
  if (memory == nullptr) return nullptr;
  const auto size = static_cast<int64_t>(malloc_usable_size(memory));
  const int64_t now = live_bytes.fetch_add(size) + size;
  int64_t peak = peak_bytes.load();
  while (now > peak && !peak_bytes.compare_exchange_weak(peak, now)) {
  }
  return memory;
}
inline void discount(void* memory) {
  if (memory != nullptr) live_bytes -= static_cast<int64_t>(malloc_usable_size(memory));
}

}  // namespace kalmanet::testing

extern "C" {
// glibc's own, under the names that it keeps for this purpose.
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

void* malloc(size_t size) {
  using namespace kalmanet::testing;
  return allocation_fails() ? nullptr : count(__libc_malloc(size));
}
void* calloc(size_t n, size_t size) {
  using namespace kalmanet::testing;
  return allocation_fails() ? nullptr : count(__libc_calloc(n, size));
}
void* realloc(void* memory, size_t size) {
  using namespace kalmanet::testing;
  if (allocation_fails()) return nullptr;
  discount(memory);
  return count(__libc_realloc(memory, size));
}
void* aligned_alloc(size_t alignment, size_t size) {
  using namespace kalmanet::testing;
  return allocation_fails() ? nullptr : count(__libc_memalign(alignment, size));
}
void* memalign(size_t alignment, size_t size) {
  return aligned_alloc(alignment, size);
}
int posix_memalign(void** memory, size_t alignment, size_t size) {
  *memory = aligned_alloc(alignment, size);
  return *memory ? 0 : ENOMEM;
}
void free(void* memory) {
  kalmanet::testing::discount(memory);
  __libc_free(memory);
}
}
