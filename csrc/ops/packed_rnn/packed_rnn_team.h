// Threads that advance recurrences in step without being able to deadlock.
//
// A chain is a sequence of rounds, each cut into slices; a round begins when every slice of the one before is done. The
// slices of a chain are owned by the threads of the pool, which keeps a slice's weights in one core's cache. Nobody
// waits for a thread that has not come: a slice whose owner has not started is done by whoever would wait for it. So
// any number of threads finishes the work, one included, and who does it does not change the result.
#pragma once

#include "csrc/core/parallel.h"
#include "csrc/cpu/gemm/layout.h"

#include <sched.h>

namespace ptk::PTK_ISA {

class Team {
public:
  static constexpr int64_t kMaxSlices = 256;

  // `rounds` of every chain; chains * slices <= kMaxSlices.
  Team(int64_t chains, int64_t slices, int64_t rounds) : chains_(chains), slices_(slices), rounds_(rounds) {}

  // Calls body(chain, slice, round) for all of them.
  template <class Body>
  void run(bool serial, const Body& body) {
    if (serial) return work(0, chains_ * slices_, body);
    parallel_for(0, chains_ * slices_, [&](int64_t begin, int64_t end) { work(begin, end, body); });
  }

private:
  struct alignas(64) Slice {
    int64_t claimed = 0;  // rounds that someone has begun
    int32_t started = 0;
  };
  struct alignas(64) Chain {
    int64_t done = 0;  // items of all rounds
  };

  template <class Body>
  void work(int64_t begin, int64_t end, const Body& body) {
    for (int64_t i = begin; i < end; ++i) __atomic_store_n(&slice_[i].started, 1, __ATOMIC_RELEASE);
    for (int64_t chain = begin / slices_; chain * slices_ < end; ++chain)
      advance(chain, most(begin, chain * slices_), least(end, (chain + 1) * slices_), body);
    for (int64_t i = 1; i < chains_; ++i) advance((begin / slices_ + i) % chains_, 0, 0, body);
  }

  // Slices [begin, end) in every round, and whatever has no owner yet; without slices of its own a thread leaves when
  // all owners are there.
  template <class Body>
  void advance(int64_t chain, int64_t begin, int64_t end, const Body& body) {
    for (int64_t round = begin < end ? 0 : done(chain) / slices_; round < rounds_; ++round) {
      for (int64_t i = begin; i < end; ++i) attempt(chain, i, round, body);
      for (int64_t spins = 0; done(chain) < (round + 1) * slices_; ++spins) {
        bool complete = true;
        for (int64_t i = chain * slices_; i < (chain + 1) * slices_; ++i) {
          if (__atomic_load_n(&slice_[i].started, __ATOMIC_ACQUIRE)) continue;
          complete = false;
          attempt(chain, i, round, body);
        }
        if (complete && begin == end) return;
        if (spins < kSpins) {
          pause();
        } else {
          sched_yield();
        }
      }
    }
  }

  template <class Body>
  void attempt(int64_t chain, int64_t i, int64_t round, const Body& body) {
    int64_t expected = round;
    if (!__atomic_compare_exchange_n(&slice_[i].claimed, &expected, round + 1, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED))
      return;
    body(chain, i - chain * slices_, round);
    __atomic_fetch_add(&chain_[chain].done, 1, __ATOMIC_ACQ_REL);
  }

  int64_t done(int64_t chain) const { return __atomic_load_n(&chain_[chain].done, __ATOMIC_ACQUIRE); }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int64_t kSpins = 4096;

  const int64_t chains_, slices_, rounds_;
  Chain chain_[2];
  Slice slice_[kMaxSlices];
};

}  // namespace ptk::PTK_ISA
