#include "csrc/cpu/scratch.h"

#include <cstdlib>

namespace ptk {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKeep = size_t{64} << 20;

struct Block {
  void* data = nullptr;
  size_t bytes = 0;

  void release() {
    std::free(data);
    data = nullptr;
    bytes = 0;
  }
  ~Block() { release(); }
};

thread_local Block block;

// What lies before a borrowed block.
struct alignas(kAlignment) Header {
  size_t bytes;
};

// Blocks given back, the latest last.
struct Shelf {
  static constexpr int kBlocks = 4;
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
    if (given->bytes > kKeep) return std::free(given);
    while (count == kBlocks || bytes + given->bytes > kKeep) std::free(take(0));
    blocks[count++] = given;
    bytes += given->bytes;
  }
  ~Shelf() {
    while (count > 0) std::free(take(0));
  }
};

thread_local Shelf shelf;

}  // namespace

void* borrow_block(size_t bytes) noexcept {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  Header* header = shelf.find(rounded);
  if (!header) {
    header = static_cast<Header*>(std::aligned_alloc(kAlignment, sizeof(Header) + rounded));
    if (!header) return nullptr;
    header->bytes = rounded;
  }
  return header + 1;
}

void return_block(void* block) noexcept {
  if (block) shelf.keep(static_cast<Header*>(block) - 1);
}

void* thread_scratch(size_t bytes) noexcept {
  if (bytes > block.bytes) {
    block.release();
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    block.data = std::aligned_alloc(kAlignment, rounded);
    block.bytes = block.data ? rounded : 0;
  }
  return block.data;
}

void release_large_scratch() noexcept {
  if (block.bytes > kKeep) block.release();
}

}  // namespace ptk
