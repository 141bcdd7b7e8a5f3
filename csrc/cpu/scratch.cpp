#include "csrc/cpu/scratch.h"

#include <bit>
#include <cstdlib>

#include <sys/mman.h>

namespace ptk {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKeep = size_t{64} << 20, kKeepSmall = size_t{2} << 20;
constexpr size_t kMapped = size_t{128} << 10, kSmallest = 1024;

// What lies before every block.
struct alignas(kAlignment) Header {
  void* start;
  size_t bytes;   // of the block
  size_t mapped;  // of the mapping, 0 of one from the heap
};

// Large ones are mappings of their own, small ones stay with the thread. Tensors are aligned blocks of the heap, and
// glibc before 2.38 does not find one that was freed for another of the same size: with blocks of ours coming and going
// between them, a training step grew the heap by all the gradients it allocated.
//
// Sizes are rounded up, so that a block that is a little larger than another finds it on the shelf. Pages that nothing
// touches cost nothing.
Header* allocate(size_t bytes) {
  if (bytes >= kMapped) {
    const size_t step = std::bit_floor(bytes) / 4, mapped = (bytes + sizeof(Header) + step - 1) / step * step;
    void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    Header* header = static_cast<Header*>(start);
    *header = {start, mapped - sizeof(Header), mapped};
    return header;
  }
  const size_t rounded = std::bit_ceil(bytes > kSmallest ? bytes : kSmallest);
  void* start = std::malloc(sizeof(Header) + kAlignment + rounded);
  if (!start) return nullptr;
  const size_t address = reinterpret_cast<size_t>(start) + kAlignment - 1;
  Header* header = reinterpret_cast<Header*>(address - address % kAlignment);
  *header = {start, rounded, 0};
  return header;
}

void release(Header* header) {
  if (!header) return;
  if (header->mapped)
    munmap(header->start, header->mapped);
  else
    std::free(header->start);
}

// What the thread has of thread_scratch().
struct Block {
  Header* header = nullptr;

  size_t bytes() const { return header ? header->bytes : 0; }
  void replace(Header* other) {
    release(header);
    header = other;
  }
  ~Block() { release(header); }
};

thread_local Block block;

// Blocks given back, the latest last.
template <int kBlocks, size_t kBytes>
struct Shelf {
  Header* blocks[kBlocks];
  int count = 0;
  size_t bytes = 0;

  Header* take(int index) {
    Header* taken = blocks[index];
    bytes -= taken->bytes;
    --count;
    for (int i = index; i < count; ++i) blocks[i] = blocks[i + 1];
    return taken;
  }
  // The smallest that is large enough, but not one of which most would lie idle.
  Header* find(size_t wanted) {
    int best = -1;
    for (int i = 0; i < count; ++i)
      if (blocks[i]->bytes >= wanted && blocks[i]->bytes / 4 <= wanted &&
          (best < 0 || blocks[i]->bytes < blocks[best]->bytes))
        best = i;
    return best < 0 ? nullptr : take(best);
  }
  void keep(Header* given) {
    if (given->bytes > kBytes) return release(given);
    while (count == kBlocks || bytes + given->bytes > kBytes) release(take(0));
    blocks[count++] = given;
    bytes += given->bytes;
  }
  ~Shelf() {
    while (count > 0) release(take(0));
  }
};

thread_local Shelf<16, kKeep> large;
thread_local Shelf<64, kKeepSmall> small;

}  // namespace

void* allocate_block(size_t bytes) noexcept {
  Header* header = allocate(bytes);
  return header ? header + 1 : nullptr;
}

void free_block(void* block) noexcept {
  if (block) release(static_cast<Header*>(block) - 1);
}

void* borrow_block(size_t bytes) noexcept {
  Header* header = bytes >= kMapped ? large.find(bytes) : small.find(bytes > kSmallest ? bytes : kSmallest);
  if (!header) header = allocate(bytes);
  return header ? header + 1 : nullptr;
}

void return_block(void* block) noexcept {
  if (!block) return;
  Header* header = static_cast<Header*>(block) - 1;
  header->mapped ? large.keep(header) : small.keep(header);
}

void* thread_scratch(size_t bytes) noexcept {
  if (bytes > block.bytes() || !block.header) {
    block.replace(nullptr);
    block.replace(allocate(bytes));
  }
  return block.header ? block.header + 1 : nullptr;
}

void release_large_scratch() noexcept {
  if (block.bytes() > kKeep) block.replace(nullptr);
}

}  // namespace ptk
