// Torch-free face of torch's thread pool, so that kernels need no torch header.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace ptk {

// Calls fn(b, e, ctx) on disjoint chunks that cover [begin, end), at most one chunk per thread of torch's pool.
// Runs inline when there is a single index, or when the caller is already inside a parallel region.
// fn must not throw.
void parallel_for(int64_t begin, int64_t end, void (*fn)(int64_t b, int64_t e, void* ctx), void* ctx);

// Threads that parallel_for may use: torch.get_num_threads().
int num_threads();

// Always inlined: an out-of-line copy would be a weak symbol that the linker could take from a translation unit
// built for another ISA.
template <typename Body>
  requires std::is_invocable_v<Body&, int64_t, int64_t>
[[gnu::always_inline]] inline void parallel_for(int64_t begin, int64_t end, Body&& body) {
  using Callable = std::remove_reference_t<Body>;
  parallel_for(
      begin, end, [](int64_t b, int64_t e, void* ctx) { (*static_cast<Callable*>(ctx))(b, e); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

// Calls body(i) for every i < count, each thread taking the next index when it has finished one: for items of unequal
// cost whose results do not depend on who computes them.
template <typename Body>
[[gnu::always_inline]] inline void parallel_items(int64_t count, Body&& body) {
  int64_t next = 0;
  parallel_for(0, num_threads() < count ? num_threads() : count, [&](int64_t, int64_t) {
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) {
      body(i);
    }
  });
}

}  // namespace ptk
