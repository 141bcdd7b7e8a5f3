// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU. Include it before the kernels, and
// put this directory before the project's root on the include path: csrc/cuda/ in it holds twins of the wrappers around
// instructions, which do here what the PTX ISA says that the instructions do.
//
// Blocks run one after another. The threads of a block are fibers: each runs until it waits, and when no thread can go
// on, whatever all of its participants have reached opens. A barrier that some thread never reaches is reported, not
// waited for. Between two barriers the threads run in an order that the caller chooses, a warp as far as it can before
// the next or, shuffled, all a step at a time: code with a race gives other bits in another order. Shared memory holds
// NaN when a block starts. Asynchronous work (copies, wgmma) is done as late as the program allows in ascending order
// and at once in descending order; in shuffled order copies come at once and products as late as they may, so that a
// copy which does not wait for its place to be read shows.
//
// Not modelled: bank conflicts, coalescing, memory ordering finer than barriers, the speed of anything.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))

using std::max;
using std::min;

namespace cuda_host {

struct Index {
  unsigned x = 0;
};

enum class Order { ascending, descending, shuffled };

// What the threads of a group do together: gets the arguments that each of them came with.
using Together = void (*)(void* const* arguments);

class Block {
public:
  static constexpr int kWarp = 32;
  static constexpr int kWarpgroup = 128;

  Block(int threads, Order order) : fibers_(threads), schedule_(threads), order_(order) {
    std::iota(schedule_.begin(), schedule_.end(), 0);
    if (order == Order::descending) {
      std::reverse(schedule_.begin(), schedule_.end());
    } else if (order == Order::shuffled) {
      std::shuffle(schedule_.begin(), schedule_.end(), std::mt19937(0));
    }
  }

  void run(const std::function<void()>& body);

  // Whether asynchronous work is done when it is issued.
  bool copies_at_once() const { return order_ != Order::ascending; }
  bool multiplies_at_once() const { return order_ == Order::descending; }
  int threads() const { return static_cast<int>(fibers_.size()); }

  void sync_threads() { wait({Wait::block, 0, nullptr, nullptr}); }
  void with_warp(Together together, void* argument) { wait({Wait::warp, 0, together, argument}); }
  void with_warpgroup(Together together, void* argument) { wait({Wait::warpgroup, 0, together, argument}); }

  // bar.sync and bar.arrive of a barrier that `count` threads take part in.
  void arrive(int barrier, int count) {
    NamedBarrier& named = barriers_[barrier];
    if (named.count != 0 && named.count != count) {
      fail("threads disagree on how many take part in a named barrier");
    }
    named.count = count;
    ++named.arrived;
    ++events_;
  }
  void sync(int barrier, int count) {
    arrive(barrier, count);
    wait({Wait::named, barrier, nullptr, nullptr});
  }

  // Lets other threads run before a condition is looked at again.
  void poll() { wait({Wait::poll, 0, nullptr, nullptr}); }

  // Something that others may wait for has happened.
  void note_event() { ++events_; }

  // Work of an engine beside the threads: done at once, or when no thread can go on.
  void submit(std::function<void()> work) {
    if (copies_at_once()) {
      work();
      ++events_;
    } else {
      engine_.push_back(std::move(work));
    }
  }

  // Groups of work that is under way, the last one open: copies of this thread, products of the warpgroup that is
  // together.
  using Groups = std::deque<std::vector<std::function<void()>>>;
  Groups& copies() { return fibers_[current_].copies; }
  Groups& products() { return products_[together_ / kWarpgroup]; }

  [[noreturn]] void fail(const std::string& message) {
    error_ = "cuda_host: " + message;
    for (;;) {
      leave();
    }
  }

private:
  struct Wait {
    enum Kind { none, warp, warpgroup, block, named, poll, exited } kind = none;
    int barrier = 0;
    Together together = nullptr;
    void* argument = nullptr;
  };

  struct Fiber {
    static constexpr size_t kStack = 1 << 17;
    ucontext_t context;
    jmp_buf jump;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    Wait wait;
    Groups copies;
  };

  struct NamedBarrier {
    int count = 0;
    int arrived = 0;
  };

  static void start();
  void enter(int thread);
  void leave() {
    if (_setjmp(fibers_[current_].jump) == 0) {
      _longjmp(scheduler_, 1);
    }
  }
  void wait(Wait wait) {
    fibers_[current_].wait = wait;
    leave();
  }
  bool open(size_t first, size_t count, Wait::Kind kind);
  bool open_named();
  bool open_everything();

  std::vector<Fiber> fibers_;
  std::vector<int> schedule_;
  Order order_;
  int current_ = 0;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::map<int, NamedBarrier> barriers_;
  std::deque<std::function<void()>> engine_;
  std::map<size_t, Groups> products_;
  size_t together_ = 0;  // first thread of the group that does something together
  int64_t events_ = 0;
  std::string error_;
};

inline Block* active = nullptr;
inline char* shared_base = nullptr;

}  // namespace cuda_host

inline cuda_host::Index threadIdx;
inline cuda_host::Index blockIdx;
inline cuda_host::Index gridDim;

inline void __syncthreads() {
  cuda_host::active->sync_threads();
}

inline void __syncwarp() {
  cuda_host::active->with_warp([](void* const*) {}, nullptr);
}

namespace cuda_host {

template <typename Value>
struct Shuffle {
  Value value;
  int source;
  Value result;
};

template <typename Value>
Value shuffle(unsigned mask, Value value, int source) {
  if (mask != 0xffffffffu) {
    active->fail("only full-warp shuffles are modelled");
  }
  Shuffle<Value> mine{value, source, {}};
  active->with_warp(
      [](void* const* arguments) {
        for (int lane = 0; lane < Block::kWarp; ++lane) {
          auto& to = *static_cast<Shuffle<Value>*>(arguments[lane]);
          to.result = static_cast<Shuffle<Value>*>(arguments[to.source])->value;
        }
      },
      &mine);
  return mine.result;
}

}  // namespace cuda_host

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  return cuda_host::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
  return cuda_host::shuffle(mask, value, lane % 32);
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

namespace cuda_host {

inline void Block::start() {
  (*active->body_)();
  active->fibers_[active->current_].wait = {Wait::exited, 0, nullptr, nullptr};
  ++active->events_;
  active->leave();
}

inline void Block::enter(int thread) {
  current_ = thread;
  threadIdx.x = thread;
  Fiber& fiber = fibers_[thread];
  if (_setjmp(scheduler_) != 0) {
    return;
  }
  if (fiber.started) {
    _longjmp(fiber.jump, 1);
  }
  fiber.started = true;
  setcontext(&fiber.context);
}

// Lets fibers [first, first + count) go on if all of them wait for the same thing.
inline bool Block::open(size_t first, size_t count, Wait::Kind kind) {
  const auto begin = fibers_.begin() + first;
  if (!std::all_of(begin, begin + count, [&](const Fiber& fiber) { return fiber.wait.kind == kind; })) {
    return false;
  }
  const Together together = begin->wait.together;
  std::vector<void*> arguments;
  for (size_t i = 0; i < count; ++i) {
    if (begin[i].wait.together != together) {
      throw std::runtime_error("cuda_host: the threads of a group are at different instructions");
    }
    arguments.push_back(begin[i].wait.argument);
  }
  if (together != nullptr) {
    together_ = first;
    together(arguments.data());
  }
  std::for_each(begin, begin + count, [](Fiber& fiber) { fiber.wait = {}; });
  return true;
}

inline bool Block::open_named() {
  bool opened = false;
  for (auto& [id, named] : barriers_) {
    if (named.count != 0 && named.arrived > named.count) {
      throw std::runtime_error("cuda_host: more threads arrived at a named barrier than take part in it");
    }
    if (named.count != 0 && named.arrived == named.count) {
      for (Fiber& fiber : fibers_) {
        if (fiber.wait.kind == Wait::named && fiber.wait.barrier == id) {
          fiber.wait = {};
        }
      }
      named = {};
      opened = true;
    }
  }
  return opened;
}

inline bool Block::open_everything() {
  bool opened = open(0, fibers_.size(), Wait::block);
  for (size_t warp = 0; warp + kWarp <= fibers_.size(); warp += kWarp) {
    opened |= open(warp, kWarp, Wait::warp);
  }
  for (size_t group = 0; group + kWarpgroup <= fibers_.size(); group += kWarpgroup) {
    opened |= open(group, kWarpgroup, Wait::warpgroup);
  }
  return opened | open_named();
}

inline void Block::run(const std::function<void()>& body) {
  active = this;
  body_ = &body;
  barriers_.clear();
  engine_.clear();
  for (size_t group = 0; group * kWarpgroup < fibers_.size(); ++group) {
    products_[group].assign(1, {});
  }
  for (Fiber& fiber : fibers_) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::start, 0);
    fiber.started = false;
    fiber.wait = {};
    fiber.copies.assign(1, {});
  }
  const auto has_exited = [](const Fiber& fiber) { return fiber.wait.kind == Wait::exited; };
  for (;;) {
    const int64_t before = events_;
    bool moved = false;
    const auto step = [&](size_t index, bool may_poll) {
      const int thread = schedule_[index];
      const Wait::Kind kind = fibers_[thread].wait.kind;
      if (kind == Wait::none || (may_poll && kind == Wait::poll)) {
        moved |= kind == Wait::none;
        fibers_[thread].wait = {};
        enter(thread);
      }
      if (!error_.empty()) {
        throw std::runtime_error(error_);
      }
    };
    for (size_t index = 0; index < schedule_.size(); ++index) {
      step(index, true);
      // A warp goes as far as it can before the next begins.
      const size_t first = index / kWarp * kWarp;
      if (order_ != Order::shuffled && index % kWarp == kWarp - 1) {
        while (open(schedule_[first] / kWarp * kWarp, kWarp, Wait::warp)) {
          for (size_t lane = first; lane <= index; ++lane) {
            step(lane, false);
          }
        }
      }
    }
    if (std::all_of(fibers_.begin(), fibers_.end(), has_exited)) {
      break;
    }
    if (!open_everything() && !moved && events_ == before) {
      if (engine_.empty()) {
        throw std::runtime_error("cuda_host: the threads of a block do not meet at the same barrier");
      }
      const auto copy = std::move(engine_.back());  // the last first: nothing says in what order copies come
      engine_.pop_back();
      copy();
    }
  }
  if (!engine_.empty()) {
    throw std::runtime_error("cuda_host: a block ends before its copies do");
  }
  for (const auto& [id, named] : barriers_) {
    if (named.arrived != 0) {
      throw std::runtime_error("cuda_host: a block ends with arrivals at a named barrier that nobody has waited for");
    }
  }
  for (const auto& [group, products] : products_) {
    if (products.size() > 1 || !products.front().empty()) {
      throw std::runtime_error("cuda_host: a block ends before its products do");
    }
  }
}

// Has the interface of ptk::cuda::StreamLauncher.
template <typename Kernel>
void launch(const typename Kernel::Params& params, Order order) {
  Block block(Kernel::kThreads, order);
  using Shared = typename Kernel::Shared;
  const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(1024, (sizeof(Shared) + 1023) / 1024 * 1024),
                                                      std::free);
  shared_base = static_cast<char*>(memory.get());
  gridDim.x = static_cast<unsigned>(Kernel::blocks(params));
  for (int64_t index = 0; index < Kernel::blocks(params); ++index) {
    std::memset(memory.get(), 0xff, sizeof(Shared));
    blockIdx.x = static_cast<unsigned>(index);
    block.run([&] { Kernel::run(params, *static_cast<Shared*>(memory.get())); });
  }
}

}  // namespace cuda_host
