// Instruction-set levels of the CPU kernels and the choice between them. Torch-free.
#pragma once

#include <array>
#include <string_view>

#if defined(__x86_64__)
#define PTK_X86 1
#else
#define PTK_X86 0
#endif

// The few symbols of libptkernels.so that the introspection module uses; everything else is hidden.
#define PTK_EXPORT __attribute__((visibility("default")))

namespace ptk {

// Ordered: each level implies every one before it.
enum class Isa { baseline, avx2, avx512, avx512_vnni, avx512_bf16, amx };
inline constexpr int kIsaCount = 6;

// Highest level that both this CPU and its operating system support.
PTK_EXPORT Isa detected_isa();

// The level that is fastest here: detected_isa(), but for a CPU whose newest instructions are slower than those before.
PTK_EXPORT Isa preferred_isa();

// Level that kernels run at: preferred_isa(), or what set_max_isa() names if that is not above detected_isa(). Fixed
// for the process by the first call.
PTK_EXPORT Isa active_isa();

PTK_EXPORT const char* isa_name(Isa isa);

// Caps active_isa(). Throws std::runtime_error on an unknown name, or when the level was fixed already and differs.
void set_max_isa(std::string_view name);

// True in builds where every level above avx2 runs in portable C++ on 256-bit vectors (PTKERNELS_EMULATE_ISA).
PTK_EXPORT bool emulated_isa();

// CPU features that the levels rest on, space separated, as found by CPUID and the operating system.
PTK_EXPORT const char* cpu_features();

}  // namespace ptk

// Declares `const Table& function();`, which the kernel source defines in the namespace of its level, for all levels.
// PTK_DISPATCH(function) then returns the active level's table. Both are used inside namespace ptk.
#define PTK_DECLARE_LEVEL(level, Table, function)                                                                      \
  namespace level {                                                                                                    \
  const Table& function();                                                                                             \
  }

#if PTK_X86
#define PTK_DECLARE_KERNELS(Table, function)                                                                           \
  PTK_DECLARE_LEVEL(baseline, Table, function)                                                                         \
  PTK_DECLARE_LEVEL(avx2, Table, function)                                                                             \
  PTK_DECLARE_LEVEL(avx512, Table, function)                                                                           \
  PTK_DECLARE_LEVEL(avx512_vnni, Table, function)                                                                      \
  PTK_DECLARE_LEVEL(avx512_bf16, Table, function)                                                                      \
  PTK_DECLARE_LEVEL(amx, Table, function)
#define PTK_LEVELS(function)                                                                                           \
  std::array {                                                                                                         \
    &::ptk::baseline::function, &::ptk::avx2::function, &::ptk::avx512::function, &::ptk::avx512_vnni::function,       \
        &::ptk::avx512_bf16::function, &::ptk::amx::function                                                           \
  }
#else
#define PTK_DECLARE_KERNELS(Table, function) PTK_DECLARE_LEVEL(baseline, Table, function)
#define PTK_LEVELS(function)                                                                                           \
  std::array {                                                                                                         \
    &::ptk::baseline::function                                                                                         \
  }
#endif

#define PTK_DISPATCH_AT(isa, function) (PTK_LEVELS(function)[static_cast<size_t>(isa)]())
#define PTK_DISPATCH(function) PTK_DISPATCH_AT(::ptk::active_isa(), function)
