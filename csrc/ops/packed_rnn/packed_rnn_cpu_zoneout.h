// Zoneout: units that keep their value from one step to the next.
//
//   drawn     s' = s where the unit's 24 bits of philox(seed, {unit, step, sequence, direction}) are below p 2^24, word
//             0 for h and word 1 for c; elsewhere the cell's new state
//   mean      s' = new + p (s - new)
//
// What is drawn depends on the token's place in its sequence, not on how the sequences lie: every layout of the same
// call keeps the same units, as does a backward.
#pragma once

#include "csrc/cpu/philox.h"
#include "csrc/ops/packed_rnn/packed_rnn_cpu_common.h"

namespace ptk::PTK_ISA {

template <class T>
class Zoneout {
  using A = Acc<T>;

public:
  // Shares of a vector of units that are kept.
  struct Kept {
    Vec<A> h, c;
  };

  explicit Zoneout(const RnnProblem& p) : active(p.zoneout[0] > 0 || p.zoneout[1] > 0), p_(p) {}

  const bool active;

  inline __attribute__((always_inline)) Kept kept(int64_t d, int64_t step, int64_t sequence, int64_t unit) const {
    if (!p_.draws) return {broadcast(static_cast<A>(p_.zoneout[0])), broadcast(static_cast<A>(p_.zoneout[1]))};
    Vec<uint32_t> bits[4];
    philox(iota<uint32_t>() + static_cast<uint32_t>(unit), broadcast(static_cast<uint32_t>(step)),
           broadcast(static_cast<uint32_t>(sequence)), broadcast(static_cast<uint32_t>(d)), p_.seed, bits);
    return {drawn(bits[0], p_.keep_below[0]), drawn(bits[1], p_.keep_below[1])};
  }

  // The state after the step. Selected, not summed, where drawn: a kept unit has the bits it had.
  inline __attribute__((always_inline)) Vec<A> mix(Vec<A> fresh, Vec<A> before, Vec<A> kept) const {
    return p_.draws ? (kept > A(0) ? before : fresh) : fresh + kept * (before - fresh);
  }

private:
  PTK_INLINE Vec<A> drawn(Vec<uint32_t> bits, uint32_t below) {
    uint32_t word[kLanes<uint32_t>];
    std::memcpy(word, &bits, sizeof word);
    A kept[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) kept[i] = word[i] >> 8 < below ? A(1) : A(0);
    return load(kept);
  }

  const RnnProblem& p_;
};

}  // namespace ptk::PTK_ISA
