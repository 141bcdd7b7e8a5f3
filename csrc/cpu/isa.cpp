#include "csrc/cpu/isa.h"

#include "csrc/core/checks.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

#if PTK_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ptk {
namespace {

constexpr const char* kNames[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
constexpr int kUnset = -1;

struct Cpu {
  Isa isa = Isa::baseline;
  Isa preferred = Isa::baseline;
  std::string features;
};

#if PTK_X86

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

constexpr bool bit(uint64_t word, int index) {
  return (word >> index) & 1;
}

// Register state that the operating system saves on a context switch. Without it an instruction that CPUID announces
// faults or silently loses its registers.
uint64_t os_saved_state() {
  if (!bit(cpuid(1, 0).ecx, 27)) {
    return 0;
  }
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KiB of tile state only to processes that ask (since 5.16); older kernels refuse and a tile
// instruction would then raise SIGILL.
[[maybe_unused]] bool request_amx() {
#if defined(__linux__)
  constexpr long arch_req_xcomp_perm = 0x1023;
  constexpr long xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

// Intel's vdpbf16ps does two multiply-adds a lane every second cycle, its vfmadd231ps two a cycle (Emerald Rapids,
// measured): bfloat16 products are twice as fast on widened operands. AMD's is as fast as it is wide.
[[maybe_unused]] bool is_intel() {
  const Registers vendor = cpuid(0, 0);
  return vendor.ebx == signature_INTEL_ebx && vendor.ecx == signature_INTEL_ecx && vendor.edx == signature_INTEL_edx;
}

Cpu detect() {
  const Registers basic = cpuid(1, 0);
  const Registers extended = cpuid(7, 0);
  const Registers extended1 = cpuid(7, 1);
  const uint64_t os = os_saved_state();
  constexpr uint64_t ymm_state = 0x6;
  constexpr uint64_t zmm_state = 0xe6;
  constexpr uint64_t tile_state = 0x60000;
  const bool ymm = (os & ymm_state) == ymm_state;
  const bool zmm = (os & zmm_state) == zmm_state;
  const bool tiles = (os & tile_state) == tile_state && bit(extended.edx, 24);

  Cpu cpu;
  const auto has = [&cpu](const char* name, bool present) {
    if (present) {
      cpu.features += cpu.features.empty() ? name : std::string(" ") + name;
    }
    return present;
  };
  // Every feature is looked at, not only those up to the first that is missing: the list is for bug reports.
  const bool sse42 = has("sse4_2", bit(basic.ecx, 20)) & has("popcnt", bit(basic.ecx, 23));
  const bool avx2 = has("avx", ymm && bit(basic.ecx, 28)) & has("avx2", ymm && bit(extended.ebx, 5)) &
                    has("fma", ymm && bit(basic.ecx, 12)) & has("f16c", ymm && bit(basic.ecx, 29));
  const bool avx512 = has("avx512f", zmm && bit(extended.ebx, 16)) & has("avx512dq", zmm && bit(extended.ebx, 17)) &
                      has("avx512bw", zmm && bit(extended.ebx, 30)) & has("avx512vl", zmm && bit(extended.ebx, 31));
  const bool vnni = has("avx512_vnni", zmm && bit(extended.ecx, 11));
  const bool bf16 = has("avx512_bf16", zmm && bit(extended1.eax, 5));
  const bool amx = has("amx_tile", tiles) & has("amx_bf16", tiles && bit(extended.edx, 22)) &
                   has("amx_int8", tiles && bit(extended.edx, 25));

#if PTK_EMULATE
  cpu.isa = sse42 && avx2 ? Isa::amx : Isa::baseline;
  cpu.preferred = cpu.isa;
#else
  const bool steps[] = {sse42 && avx2, avx512, vnni, bf16, amx};
  int level = 0;
  while (level < kIsaCount - 1 && steps[level]) {
    ++level;
  }
  if (static_cast<Isa>(level) == Isa::amx && !request_amx()) {
    --level;
  }
  cpu.isa = static_cast<Isa>(level);
  cpu.preferred = cpu.isa == Isa::avx512_bf16 && is_intel() ? Isa::avx512_vnni : cpu.isa;
#endif
  return cpu;
}

#else

Cpu detect() {
  return {};
}

#endif

const Cpu& cpu() {
  static const Cpu found = detect();
  return found;
}

std::atomic<int> max_level{kIsaCount};
std::atomic<int> fixed_level{kUnset};

// A cap that names the detected level means it, preferred or not.
int capped_level(int cap) {
  const int detected = static_cast<int>(cpu().isa);
  return cap > detected ? static_cast<int>(cpu().preferred) : cap;
}

}  // namespace

Isa detected_isa() {
  return cpu().isa;
}

Isa preferred_isa() {
  return cpu().preferred;
}

Isa active_isa() {
  int level = fixed_level.load(std::memory_order_acquire);
  if (level == kUnset) [[unlikely]] {
    const int wanted = capped_level(max_level.load());
    int expected = kUnset;
    level = fixed_level.compare_exchange_strong(expected, wanted) ? wanted : expected;
  }
  return static_cast<Isa>(level);
}

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

void set_max_isa(std::string_view name) {
  int level = 0;
  std::string known;
  while (level < kIsaCount && name != kNames[level]) {
    known += (level == 0 ? "" : ", ") + std::string(kNames[level]);
    ++level;
  }
  PTK_CHECK(level < kIsaCount, "max ISA: got '", name, "', expected one of ", known);
  const int fixed = fixed_level.load();
  PTK_CHECK(fixed == kUnset || fixed == capped_level(level), "max ISA: got '", name, "' after kernels were chosen for ",
            isa_name(static_cast<Isa>(fixed)), ", expected a call before the first op");
  max_level = level;
}

bool emulated_isa() {
#if PTK_EMULATE
  return true;
#else
  return false;
#endif
}

const char* cpu_features() {
  return cpu().features.c_str();
}

}  // namespace ptk
