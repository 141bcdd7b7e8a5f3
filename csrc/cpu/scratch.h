// Working memory of CPU kernels: one growing block per thread, kept between calls so that its pages stay mapped.
#pragma once

#include <cstddef>

namespace ptk {

// At least `bytes`, aligned to 64, uninitialised; null when memory ran out. Valid until the thread's next call. A block
// above 64 MiB is given back by release_large_scratch() instead of being kept.
void* thread_scratch(size_t bytes) noexcept;
void release_large_scratch() noexcept;

// Memory of one call that all of its threads may use: at least `bytes`, aligned to 64, uninitialised; null when memory
// ran out. A block that its thread has given back serves the thread's later calls, as long as few are kept: fresh
// memory costs a page fault every 4 KiB, as much as many a kernel's own work.
void* borrow_block(size_t bytes) noexcept;
void return_block(void* block) noexcept;

}  // namespace ptk
