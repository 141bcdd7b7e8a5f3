#include "csrc/cpu/packed_weights.h"

#include "csrc/cpu/fingerprint.h"
#include "csrc/cpu/scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <random>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace ptk {
namespace {

constexpr size_t kMaxEntries = 4096;

struct Entry {
  std::shared_ptr<char> block;  // null: seen, not kept
  size_t bytes = 0;
  uint64_t used = 0;
};

class Cache {
public:
  // The block of a key, if there is one, and whether the key has been seen before.
  std::pair<std::shared_ptr<char>, bool> find(const std::string& key) {
    const auto [entry, is_new] = entries_.try_emplace(key);
    entry->second.used = ++clock_;
    ++(entry->second.block ? hits_ : misses_);
    std::shared_ptr<char> block = entry->second.block;
    shrink();
    return {std::move(block), !is_new};
  }

  void insert(const std::string& key, const std::shared_ptr<char>& block, size_t bytes) {
    Entry& entry = entries_[key];
    bytes_ += static_cast<int64_t>(bytes - entry.bytes);
    entry = {block, bytes, ++clock_};
    shrink();
  }

  void limit(int64_t bytes) {
    limit_ = bytes;
    shrink();
  }

  PackedWeightsInfo info() const { return {bytes_, limit_, static_cast<int64_t>(entries_.size()), hits_, misses_}; }

private:
  void shrink() {
    while (bytes_ > limit_ || entries_.size() > kMaxEntries) {
      const auto oldest = std::ranges::min_element(entries_, {}, [](const auto& item) { return item.second.used; });
      bytes_ -= static_cast<int64_t>(oldest->second.bytes);
      entries_.erase(oldest);
    }
  }

  std::unordered_map<std::string, Entry> entries_;
  int64_t bytes_ = 0, limit_ = int64_t{256} << 20, hits_ = 0, misses_ = 0;
  uint64_t clock_ = 0;
};

// Whoever finds the cache in use goes without: nobody waits, so that a process forked at any moment cannot hang.
class Exclusive {
public:
  Exclusive() : owns_(!busy.test_and_set(std::memory_order_acquire)) {}
  ~Exclusive() {
    if (owns_) {
      busy.clear(std::memory_order_release);
    }
  }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;
  explicit operator bool() const { return owns_; }

private:
  static std::atomic_flag busy;
  const bool owns_;
};
std::atomic_flag Exclusive::busy;

// Never destroyed: a call may come while the process ends.
Cache& cache() {
  static Cache& instance = *new Cache;
  return instance;
}

const uint64_t* fingerprint_key() {
  static const std::vector<uint64_t>& key = *[] {
    std::random_device device;
    auto* words = new std::vector<uint64_t>(kKeyWords);
    std::ranges::generate(*words, [&] { return uint64_t{device()} << 32 | device(); });
    return words;
  }();
  return key.data();
}

}  // namespace

void add_fingerprint(const Memory& memory, uint64_t* digest) {
  PTK_DISPATCH(fingerprint_kernels).add(memory.data, static_cast<int64_t>(memory.bytes), fingerprint_key(), digest);
}

PackedWeights::PackedWeights(std::initializer_list<int64_t> kind, const std::vector<Memory>& contents,
                             size_t packed_bytes)
    : bytes_(packed_bytes) {
  if (static_cast<int64_t>(packed_bytes) > packed_weights_info().limit) {
    return;
  }
  uint64_t digest[kDigestWords] = {};
  for (const Memory& memory : contents) {
    add_fingerprint(memory, digest);
  }
  const auto append = [&](const auto& value) { key_.append(reinterpret_cast<const char*>(&value), sizeof value); };
  for (const int64_t number : kind) {
    append(number);
  }
  for (const Memory& memory : contents) {
    append(memory.bytes);
  }
  append(digest);
  bool seen = false;
  if (const Exclusive exclusive; exclusive) {
    std::tie(block_, seen) = cache().find(key_);
  }
  ready_ = block_ != nullptr;
  if (seen && !ready_) {
    block_ = {static_cast<char*>(allocate_block(packed_bytes)), free_block};
  }
}

void PackedWeights::publish() const {
  const Exclusive exclusive;
  if (block_ && !ready_ && exclusive) {
    cache().insert(key_, block_, bytes_);
  }
}

PackedWeightsInfo packed_weights_info() {
  const Exclusive exclusive;
  return exclusive ? cache().info() : PackedWeightsInfo{};
}

bool limit_packed_weights(int64_t bytes) {
  const Exclusive exclusive;
  if (exclusive) {
    cache().limit(bytes);
  }
  return static_cast<bool>(exclusive);
}

}  // namespace ptk
