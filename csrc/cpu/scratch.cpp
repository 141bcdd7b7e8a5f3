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

}  // namespace

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
