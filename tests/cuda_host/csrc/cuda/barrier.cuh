// Twin of csrc/cuda/barrier.cuh.
#pragma once

#include "tests/cuda_host/csrc/cuda/mma.cuh"

namespace ptk::cuda {

struct Barrier {
  uint64_t word;

  struct State {
    uint16_t count;
    uint16_t pending;
    int32_t bytes_and_phase;  // bytes still to come, times 2, plus the phase's parity
    int32_t bytes() const { return bytes_and_phase >> 1; }
    int parity() const { return bytes_and_phase & 1; }
  };

  void init(int arrivals) { store({static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0}); }
  void arrive() { change(1, 0); }
  void arrive_expecting(int bytes) { change(1, bytes); }
  void complete(int bytes) { change(0, -bytes); }
  void wait(int parity) {
    while (load().parity() == parity) {
      cuda_host::active->poll();
    }
  }

private:
  State load() const { return std::bit_cast<State>(word); }
  void store(State state) { word = std::bit_cast<uint64_t>(state); }
  void change(int arrivals, int bytes) {
    State state = load();
    if (arrivals > state.pending) {
      cuda_host::active->fail("a barrier has more arrivals than it counts");
    }
    state.pending = static_cast<uint16_t>(state.pending - arrivals);
    state.bytes_and_phase += 2 * bytes;
    if (state.pending == 0 && state.bytes() == 0) {
      state = {state.count, state.count, state.parity() ^ 1};
    }
    store(state);
    cuda_host::active->note_event();
  }
};

inline void publish_barriers() {}

inline void sync_some(int id, int threads) {
  cuda_host::active->sync(id, threads);
}
inline void arrive_some(int id, int threads) {
  cuda_host::active->arrive(id, threads);
}

template <int Count>
void release_registers() {
  static_assert(Count % 8 == 0 && 24 <= Count && Count <= 240);
  cuda_host::active->with_warpgroup([](void* const*) {}, nullptr);
}
template <int Count>
void acquire_registers() {
  static_assert(Count % 8 == 0 && 24 <= Count && Count <= 240);
  cuda_host::active->with_warpgroup([](void* const*) {}, nullptr);
}

}  // namespace ptk::cuda
