// A digest of bytes that is as quick as reading them: what tells whether packed weights still are those of a call.
// Torch-free.
#pragma once

#include "csrc/cpu/isa.h"

#include <cstdint>

namespace ptk {

inline constexpr int64_t kDigestWords = 16;
inline constexpr int64_t kKeyWords = 512;

struct FingerprintKernels {
  // Adds the bytes to a digest, which starts as anything. `key`: random words, the same for digests to be compared.
  void (*add)(const void* data, int64_t bytes, const uint64_t* key, uint64_t* digest);
};

PTK_DECLARE_KERNELS(FingerprintKernels, fingerprint_kernels)

}  // namespace ptk
