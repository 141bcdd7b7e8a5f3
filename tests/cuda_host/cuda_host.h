// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU. Include it before the kernels.
//
// Blocks run one after another. The threads of a block are fibers: each runs until it waits at a barrier or a shuffle,
// and when no thread can go on, whatever all of its participants have reached opens. A barrier that some thread never
// reaches is reported, not waited for. Between two barriers the threads run in an order that the caller chooses: code
// with a race gives other bits in another order. Shared memory holds NaN when a block starts.
//
// Not modelled: bank conflicts, coalescing, memory ordering finer than barriers, the speed of anything.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include <ucontext.h>

#define __device__
#define __host__

using std::min;

namespace cuda_host {

struct Index {
  unsigned x = 0;
};

enum class Order { ascending, descending, shuffled };

class Block {
public:
  static constexpr int kWarp = 32;

  Block(int threads, Order order) : fibers_(threads), schedule_(threads) {
    std::iota(schedule_.begin(), schedule_.end(), 0);
    if (order == Order::descending) {
      std::reverse(schedule_.begin(), schedule_.end());
    } else if (order == Order::shuffled) {
      std::shuffle(schedule_.begin(), schedule_.end(), std::mt19937(0));
    }
  }

  void run(const std::function<void()>& body);
  void sync_threads() { wait(Wait::block); }

  template <typename Value>
  Value shuffle_xor(Value value, int lanes) {
    static_assert(sizeof(Value) <= sizeof(uint64_t));
    Fiber& self = fibers_[current_];
    // Two slots in turn: a lane may be one shuffle ahead of one that has yet to read.
    const int slot = self.shuffles++ % 2;
    std::memcpy(&self.slots[slot], &value, sizeof(Value));
    wait(Wait::warp);
    Value other;
    std::memcpy(&other, &fibers_[current_ ^ lanes].slots[slot], sizeof(Value));
    return other;
  }

private:
  enum class Wait { none, warp, block, exited };

  struct Fiber {
    static constexpr size_t kStack = 1 << 17;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    Wait wait = Wait::none;
    int shuffles = 0;
    uint64_t slots[2] = {};
  };

  static void start();
  bool open(size_t first, size_t count, Wait wait);
  void wait(Wait wait);

  std::vector<Fiber> fibers_;
  std::vector<int> schedule_;
  int current_ = 0;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
};

inline Block* active = nullptr;

}  // namespace cuda_host

inline cuda_host::Index threadIdx;
inline cuda_host::Index blockIdx;

inline void __syncthreads() {
  cuda_host::active->sync_threads();
}

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  if (mask != 0xffffffffu) {
    throw std::runtime_error("cuda_host: only full-warp shuffles are modelled");
  }
  return cuda_host::active->shuffle_xor(value, lanes);
}

namespace cuda_host {

inline void Block::start() {
  (*active->body_)();
  active->fibers_[active->current_].wait = Wait::exited;
}

inline void Block::wait(Wait wait) {
  Fiber& self = fibers_[current_];
  self.wait = wait;
  swapcontext(&self.context, &scheduler_);
}

// Lets fibers [first, first + count) go on if all of them wait for the same thing.
inline bool Block::open(size_t first, size_t count, Wait wait) {
  const auto begin = fibers_.begin() + first;
  if (!std::all_of(begin, begin + count, [&](const Fiber& fiber) { return fiber.wait == wait; })) {
    return false;
  }
  std::for_each(begin, begin + count, [](Fiber& fiber) { fiber.wait = Wait::none; });
  return true;
}

inline void Block::run(const std::function<void()>& body) {
  active = this;
  body_ = &body;
  for (Fiber& fiber : fibers_) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::start, 0);
    fiber.wait = Wait::none;
    fiber.shuffles = 0;
  }
  for (;;) {
    for (const int thread : schedule_) {
      if (fibers_[thread].wait == Wait::none) {
        current_ = thread;
        threadIdx.x = thread;
        swapcontext(&scheduler_, &fibers_[thread].context);
      }
    }
    if (std::all_of(fibers_.begin(), fibers_.end(), [](const Fiber& fiber) { return fiber.wait == Wait::exited; })) {
      return;
    }
    bool opened = open(0, fibers_.size(), Wait::block);
    for (size_t warp = 0; warp < fibers_.size(); warp += kWarp) {
      opened |= open(warp, kWarp, Wait::warp);
    }
    if (!opened) {
      throw std::runtime_error("cuda_host: the threads of a block do not meet at the same barrier");
    }
  }
}

// Has the interface of ptk::cuda::StreamLauncher.
template <typename Kernel>
void launch(const typename Kernel::Params& params, int threads, Order order) {
  Block block(threads, order);
  const auto shared = std::make_unique<typename Kernel::Shared>();
  for (int64_t index = 0; index < Kernel::blocks(params); ++index) {
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(*shared));
    blockIdx.x = static_cast<unsigned>(index);
    block.run([&] { Kernel::run(params, *shared); });
  }
}

}  // namespace cuda_host
