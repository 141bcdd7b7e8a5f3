// Memory of CPU kernels, aligned to 64 and uninitialised: what threads work in, kept between calls so that its pages
// stay mapped, and blocks to keep. Null when memory ran out.
#pragma once

#include <cstddef>
#include <new>

namespace ptk {

// At least `bytes`, valid until the thread's next call. A block above 64 MiB is given back by release_large_scratch()
// instead of being kept.
void* thread_scratch(size_t bytes) noexcept;
void release_large_scratch() noexcept;

// Memory of one call that all of its threads may use: at least `bytes`. A block that its thread has given back serves
// the thread's later calls, as long as few are kept: fresh memory costs a page fault every 4 KiB, as much as many a
// kernel's own work.
void* borrow_block(size_t bytes) noexcept;
void return_block(void* block) noexcept;

// Memory until it is freed.
void* allocate_block(size_t bytes) noexcept;
void free_block(void* block) noexcept;

// What std::vector is to borrow from.
template <class T>
struct BorrowingAllocator {
  using value_type = T;
  T* allocate(size_t count) {
    void* block = borrow_block(count * sizeof(T));
    if (!block) throw std::bad_alloc();
    return static_cast<T*>(block);
  }
  void deallocate(T* block, size_t) noexcept { return_block(block); }
  bool operator==(const BorrowingAllocator&) const { return true; }
};

}  // namespace ptk
