// Weights in the layout of a kernel, kept from one call to the next for as long as the weights have the same contents.
//
// Nothing but the contents tells whether a weight has changed: writes through `.data`, through a numpy array that
// shares its memory or from another process leave no trace in torch's version counters. So a call reads its weights
// once, for their fingerprint (csrc/cpu/fingerprint.h), and finds what was packed from the same bytes, whichever tensor
// they were in. That costs what reading costs, which is a fraction of packing.
//
//   const PackedWeights packed({op, sizes...}, {{data, bytes}, ...}, bytes_when_packed);
//   void* to = packed.data() ? packed.data() : memory of the call;
//   if (!packed.ready()) { pack into `to`; packed.publish(); }
//
// What is seen for the first time is packed into memory of the call: weights that change with every call are never
// kept. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace ptk {

struct Memory {
  const void* data;
  size_t bytes;
};

// Adds to a digest of kDigestWords words, which is good within this process.
void add_fingerprint(const Memory& memory, uint64_t* digest);

class PackedWeights {
public:
  // Nothing is kept: data() is null.
  PackedWeights() = default;

  // `kind`: numbers that, with the contents, determine the packed bytes: the operator and its layout, sizes, dtype.
  PackedWeights(std::initializer_list<int64_t> kind, const std::vector<Memory>& contents, size_t packed_bytes);

  // Aligned to 64; null where the weights are not to be kept. Valid as long as this object.
  void* data() const { return block_.get(); }
  bool ready() const { return ready_; }

  // What data() points to is complete, and will not be written to again. No effect where it is null or ready.
  void publish() const;

private:
  std::string key_;
  std::shared_ptr<char> block_;
  size_t bytes_ = 0;
  bool ready_ = false;
};

struct PackedWeightsInfo {
  int64_t bytes, limit, entries, hits, misses;
};
PackedWeightsInfo packed_weights_info();

// Drops the least recently used until no more than this is kept; 0 keeps nothing and takes no fingerprints.
// False when another thread was using the store just then.
bool limit_packed_weights(int64_t bytes);

}  // namespace ptk
