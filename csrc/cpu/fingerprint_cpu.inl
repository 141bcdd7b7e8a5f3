// A digest of bytes, one ISA level.
//
//   page      4 KiB as rows of 8 words m, against a random key k of the same size:
//               products  p_lane = sum over rows of  (low(m) + low(k)) (high(m) + high(k))      mod 2^64
//               sums      s_lane = sum over rows of  m                                          mod 2^64
//   chunk     state = mix(state) + (p, s), page after page
//   digest    += mix(state + number of the chunk), over the chunks
//
// The products are the NH family (Black et al., "UMAC", 1999): with a random key two contents agree in one of them with
// a probability of 2^-32. A single changed word always changes a sum. `mix` is a bijection, so nothing that differs
// becomes equal on the way but by coincidence in 64 bits. The digest's additions commute: threads may take the chunks
// in any order.
#include "csrc/core/parallel.h"
#include "csrc/cpu/fingerprint.h"
#include "csrc/cpu/gemm/layout.h"

namespace ptk::PTK_ISA {
namespace {

using Words = Vec<uint64_t>;
constexpr int kVectors = 64 / kVectorBytes;
constexpr int64_t kPage = kKeyWords * sizeof(uint64_t), kChunk = 16 * kPage;

struct State {
  Words products[kVectors] = {}, sums[kVectors] = {};
};
static_assert(sizeof(State) == kDigestWords * sizeof(uint64_t));

template <class Word>
PTK_INLINE Word mix(Word x) {
  x ^= x >> 32;
  x *= 0x9e3779b97f4a7c15u;
  return x ^ x >> 29;
}

PTK_INLINE void add_row(State& page, const char* row, const char* key) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Words m = load(reinterpret_cast<const uint64_t*>(row + v * kVectorBytes));
    const Vec<uint32_t> keyed =
        bit_cast<Vec<uint32_t>>(m) + load(reinterpret_cast<const uint32_t*>(key + v * kVectorBytes));
    const Words halves = bit_cast<Words>(keyed);
    page.products[v] += multiply_even(halves, halves >> 32);
    page.sums[v] += m;
  }
}

PTK_INLINE void add_page(State& state, const char* data, int64_t bytes, const char* key) {
  State page;
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 64 <= bytes; i += 64) add_row(page, data + i, key + i);
  if (i < bytes) {
    char row[64] = {};
    std::memcpy(row, data + i, bytes - i);
    add_row(page, row, key + i);
  }
  for (int v = 0; v < kVectors; ++v) {
    state.products[v] = mix(state.products[v]) + page.products[v];
    state.sums[v] = mix(state.sums[v]) + page.sums[v];
  }
}

void add_chunks(const char* data, int64_t bytes, const char* key, int64_t begin, int64_t end, uint64_t* digest) {
  uint64_t total[kDigestWords] = {};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    State state;
    const int64_t stop = least(bytes, (chunk + 1) * kChunk);
    for (int64_t i = chunk * kChunk; i < stop; i += kPage) add_page(state, data + i, least(kPage, stop - i), key);
    uint64_t words[kDigestWords];
    std::memcpy(words, &state, sizeof words);
    for (int64_t w = 0; w < kDigestWords; ++w) total[w] += mix(words[w] + static_cast<uint64_t>(chunk + 1));
  }
  for (int64_t w = 0; w < kDigestWords; ++w) __atomic_fetch_add(digest + w, total[w], __ATOMIC_RELAXED);
}

void add(const void* data, int64_t bytes, const uint64_t* key, uint64_t* digest) {
  // Below this, waking a thread takes longer than reading.
  constexpr int64_t kParallel = 1 << 20;
  const auto* from = static_cast<const char*>(data);
  const auto* keys = reinterpret_cast<const char*>(key);
  for (int64_t w = 0; w < kDigestWords; ++w) digest[w] = mix(digest[w]);
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
  if (bytes < kParallel) return add_chunks(from, bytes, keys, 0, chunks, digest);
  parallel_for(0, chunks, [&](int64_t begin, int64_t end) { add_chunks(from, bytes, keys, begin, end, digest); });
}

}  // namespace

const FingerprintKernels& fingerprint_kernels() {
  static constexpr FingerprintKernels kernels = {add};
  return kernels;
}

}  // namespace ptk::PTK_ISA
