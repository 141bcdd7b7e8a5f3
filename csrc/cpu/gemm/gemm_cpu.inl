// C = A B for whole matrices, in blocks of C computed independently.
//
//   tiling   an item is rows x kN of C. Per kDepth of depth, its part of B is packed once and meets kM rows of A at a
//            time, packed too. Sums of vector registers are added up over steps in C itself, where it has their type,
//            with a short depth that keeps a panel of B in L1. Tiles are slow to load and store, so their depth is
//            long: few products take more than one step.
//
//   threads  items are dealt out by a counter; each is computed by one thread in a fixed order, so the result does not
//            depend on their number.
#include "csrc/cpu/gemm/gemm_driver.h"

#include "csrc/core/parallel.h"
#include "csrc/cpu/carver.h"
#include "csrc/cpu/gemm/gemm.h"
#include "csrc/cpu/scratch.h"

#include <iterator>

#include <time.h>

namespace ptk::PTK_ISA {
namespace {

template <class T>
using OutOf = std::conditional_t<sizeof(T) == 1, int32_t, T>;
template <class T>
using SourceB = std::conditional_t<sizeof(T) == 1, int8_t, T>;

// One item's last step: partial sums + bias, activation, conversion.
template <class T>
struct Finish {
  static constexpr bool kLarge = true, kStrip = true;
  const Sum<T>* partial;
  int64_t ld_partial;
  const Sum<T>* bias;
  bool relu;
  OutOf<T>* c;
  int64_t ld;

  // Whole lines of C, which is written for the first time where there is one step.
  void prefetch(int64_t rows, int64_t row, int64_t column) const {
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(c + (row + i) * ld + column, 1);
  }
  void strip(int rows, int64_t row, int64_t column, int64_t columns, const Sum<T>* sums) const {
    constexpr int64_t lanes = kLanes<Sum<T>>;
    for (const int64_t end = row + rows; row < end; ++row, sums += 2 * lanes) {
      const Vec<Sum<T>> low = finished(row, column, load(sums), columns);
      const Vec<Sum<T>> high = finished(row, column + lanes, load(sums + lanes), columns - lanes);
      OutOf<T>* to = c + row * ld + column;
      if (columns == 2 * lanes) {
        store_pair(to, low, high);
      } else {
        store_one(to, low, columns);
        if (columns > lanes) store_one(to + lanes, high, columns - lanes);
      }
    }
  }

private:
  inline __attribute__((always_inline)) Vec<Sum<T>> finished(int64_t row, int64_t column, Vec<Sum<T>> sums,
                                                             int64_t valid) const {
    if (valid <= 0) return sums;
    if (partial) sums += load_partial(partial + row * ld_partial + column, valid);
    if (bias) sums += load_partial(bias + column, valid);
    return relu ? max(Vec<Sum<T>>{}, sums) : sums;
  }
  static inline __attribute__((always_inline)) void store_one(OutOf<T>* to, Vec<Sum<T>> v, int64_t valid) {
    if constexpr (sizeof(T) == 1) {
      store_partial(to, v, valid);
    } else {
      store_as_partial(to, v, valid);
    }
  }
  static inline __attribute__((always_inline)) void store_pair(OutOf<T>* to, Vec<Sum<T>> low, Vec<Sum<T>> high) {
    if constexpr (sizeof(T) == 1) {
      store(to, low);
      store(to + kLanes<Sum<T>>, high);
    } else {
      store_pair_as(to, low, high);
    }
  }
};

template <class T>
struct Product {
  static constexpr bool kTiles = detail::kUsesTiles<T>;
  static constexpr int64_t kM = kTiles ? 64 : 8 * GemmTraits<T>::kMr, kN = kTiles ? 256 : 512;
  static constexpr int64_t kDepth = (kTiles ? 4096 : 1024) / sizeof(Element<T>);
  static constexpr int64_t kLda = kDepth + 64 / sizeof(Element<T>);
  static constexpr bool kSumsInC = std::is_same_v<OutOf<T>, Sum<T>>;
  static constexpr int64_t kRowsOfSums = 8 * kM;  // where sums are not in C
  const GemmProblem& p;
  const int64_t depth_steps = (p.k + kDepth - 1) / kDepth;
  const int64_t panel_stride = padded_k<T>(least(p.k, kDepth)) * GemmTraits<T>::kNr;

  struct Pieces {
    Element<T>* a;
    ElementB<T>* b;
    Sum<T>* sums;
    int64_t ld;
  };
  Pieces lay_out(Carver& carver, int64_t m0, int64_t n0) const {
    Pieces piece{carver.take<Element<T>>(kM * kLda),
                 carver.take<ElementB<T>>(panel_stride * (padded_n<T>(kN) / GemmTraits<T>::kNr)), nullptr, 0};
    if constexpr (kSumsInC) {
      piece.sums = static_cast<Sum<T>*>(p.c) + m0 * p.n + n0;
      piece.ld = p.n;
    } else {
      piece.sums = carver.take<Sum<T>>(p.reduce * depth_steps > 1 ? kRowsOfSums * kN : 0);
      piece.ld = kN;
    }
    return piece;
  }

  // False when memory ran out.
  bool item(int64_t m0, int64_t rows, int64_t n0) const {
    Carver carver;
    lay_out(carver, m0, n0);
    carver.next = static_cast<char*>(thread_scratch(carver.bytes()));
    if (!carver.next) return false;
    const Pieces piece = lay_out(carver, m0, n0);
    TileScope tiles;
    for (int64_t i = 0; i < p.reduce * depth_steps; ++i) {
      const int64_t r = i / depth_steps, k0 = i % depth_steps * kDepth;
      const auto* b = static_cast<const SourceB<T>*>(p.b) + r * p.stride_b[0] + k0 * p.stride_b[1] + n0 * p.stride_b[2];
      pack_panels(b, least(kDepth, p.k - k0), least(kN, p.n - n0), piece.b);
      for (int64_t m = 0; m < rows; m += kM) step(i, m0 + m, least(kM, rows - m), n0, piece, m);
    }
    return true;
  }

  void pack_panels(const SourceB<T>* b, int64_t k, int64_t n, ElementB<T>* dst) const {
    constexpr int64_t nr = GemmTraits<T>::kNr;
    for (int64_t n0 = 0; n0 < n; n0 += nr, dst += panel_stride)
      pack_b_panel<T>(b + n0 * p.stride_b[2], p.stride_b[1], p.stride_b[2], k, least(nr, n - n0), dst, padded_k<T>(k));
  }

  void step(int64_t i, int64_t m0, int64_t m, int64_t n0, const Pieces& piece, int64_t row) const {
    const int64_t r = i / depth_steps, k0 = i % depth_steps * kDepth, k = least(kDepth, p.k - k0);
    const int64_t n = least(kN, p.n - n0);
    const auto* a = static_cast<const T*>(p.a) + r * p.stride_a[0] + m0 * p.stride_a[1] + k0 * p.stride_a[2];
    pack_a<T>(a, p.stride_a[1], p.stride_a[2], m, k, piece.a, kLda);
    Sum<T>* sums = piece.sums + row * piece.ld;
    if (i + 1 == p.reduce * depth_steps) {
      const auto* bias = static_cast<const Sum<T>*>(p.bias);
      gemm<T>(m, n, k, piece.a, kLda, piece.b, panel_stride,
              Finish<T>{i ? sums : nullptr, piece.ld, bias ? bias + n0 : nullptr, p.relu,
                        static_cast<OutOf<T>*>(p.c) + m0 * p.n + n0, p.n});
    } else if (i == 0) {
      gemm<T>(m, n, k, piece.a, kLda, piece.b, panel_stride, StoreSums<Sum<T>>{sums, piece.ld});
    } else {
      gemm<T>(m, n, k, piece.a, kLda, piece.b, panel_stride, AddSums<Sum<T>>{sums, piece.ld});
    }
  }
};

// Rows are divided only as far as threads need items, since every item packs its part of B again.
template <class T>
bool multiply(const GemmProblem& problem) {
  using P = Product<T>;
  const P product{problem};
  const int64_t strips = (problem.n + P::kN - 1) / P::kN, wanted = (4 * num_threads() + strips - 1) / strips;
  const bool has_sums = !P::kSumsInC && problem.reduce * product.depth_steps > 1;
  const int64_t least_parts = has_sums ? (problem.m + P::kRowsOfSums - 1) / P::kRowsOfSums : 1;
  const int64_t most_parts = (problem.m + P::kM - 1) / P::kM, parts = least(most(wanted, least_parts), most_parts);
  const int64_t rows = round_up((problem.m + parts - 1) / parts, P::kM), down = (problem.m + rows - 1) / rows;
  bool ok = true;
  parallel_items(strips * down, [&](int64_t i) {
    const int64_t m0 = i / strips * rows;
    if (!product.item(m0, least(rows, problem.m - m0), i % strips * P::kN))
      __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
  });
  return ok;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Repeats body, which performs `work` operations, for about `seconds`; the best of ten slices, since what else runs on
// the machine can only slow one down.
template <class Body>
double rate(double work, double seconds, const Body& body) {
  body();
  double best = 0;
  for (int slice = 0; slice < 10; ++slice) {
    const double start = now();
    double elapsed;
    int64_t runs = 0;
    do {
      body();
      ++runs;
      elapsed = now() - start;
    } while (elapsed < seconds / 10);
    best = work * runs / elapsed > best ? work * runs / elapsed : best;
  }
  return best;
}

// Numbers of both signs and many exponents: multipliers take longer, or the clock goes down, where bits change.
template <class E>
void fill(E* data, int64_t n) {
  uint32_t state = 1;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
    if constexpr (std::is_integral_v<E>) {
      data[i] = static_cast<E>(state >> 24);
    } else {
      data[i] = round_to<E>(x);
    }
  }
}

template <class T>
double warm_rate(int64_t m, int64_t n, int64_t k, double seconds) {
  const int64_t lda = padded_k<T>(k) + 64 / sizeof(Element<T>), panel = padded_k<T>(k) * GemmTraits<T>::kNr;
  const int64_t a_bytes = round_up(padded_m<T>(m), 32) * lda * sizeof(Element<T>);
  const int64_t b_bytes = panel * padded_n<T>(n) / GemmTraits<T>::kNr * sizeof(ElementB<T>);
  char* memory =
      static_cast<char*>(thread_scratch(round_up(a_bytes, 64) + round_up(b_bytes, 64) + m * n * sizeof(Sum<T>)));
  if (!memory) return 0;
  auto* a = reinterpret_cast<Element<T>*>(memory);
  auto* b = reinterpret_cast<ElementB<T>*>(memory + round_up(a_bytes, 64));
  auto* c = reinterpret_cast<Sum<T>*>(memory + round_up(a_bytes, 64) + round_up(b_bytes, 64));
  fill(a, a_bytes / sizeof(Element<T>));
  fill(b, b_bytes / sizeof(ElementB<T>));
  TileScope tiles;
  return rate(2.0 * m * n * k, seconds, [&] { gemm<T>(m, n, k, a, lda, b, panel, StoreSums<Sum<T>>{c, n}); });
}

// Each of `chains` registers is both input and output: independent of each other, none ever leaves the register file.
template <class T>
double peak_rate(double seconds) {
  constexpr int chains = PTK_ISA_LEVEL >= 2 ? 24 : 12;
  constexpr int repeats = 4096;
  [[maybe_unused]] constexpr Multiply multiply = GemmTraits<T>::kMultiply;
  TileScope tiles;
#if PTK_ISA_LEVEL >= 5
  if constexpr (multiply != Multiply::fma) {
    alignas(64) Element<T> operand[1024 / sizeof(Element<T>)];
    fill(operand, std::ssize(operand));
    PTK_TILE_LOAD(4, operand, 64);
    PTK_TILE_LOAD(5, operand, 64);
    PTK_TILE_LOAD(6, operand, 64);
    PTK_TILE_LOAD(7, operand, 64);
    detail::zero_tiles();
    const double work = 2.0 * 4 * 16 * 16 * GemmTraits<T>::kKStep * repeats;
    return rate(work, seconds, [&] {
      for (int i = 0; i < repeats; ++i) {
        detail::TileMultiply<multiply>::upper();
        detail::TileMultiply<multiply>::lower();
      }
    });
  }
#endif
  using S = Sum<T>;
  Vec<S> x = broadcast(S(0)), y = broadcast(S(0));
  PTK_OPAQUE(y);
  PTK_OPAQUE(x);
  auto step = [x, y](Vec<S> s) __attribute__((always_inline)) {
    if constexpr (multiply == Multiply::fma) {
      return s + x * y;
    }
#if PTK_ISA_LEVEL == 4
    else if constexpr (multiply == Multiply::dot_bf16) {
      return detail::dot_bf16(s, 0, bit_cast<Vec<uint32_t>>(y));
    }
#endif
#if PTK_ISA_LEVEL == 3 || PTK_ISA_LEVEL == 4
    else {
      return detail::dot_u8s8(s, 0, y);
    }
#elif PTK_ISA_LEVEL < 3
    else {
      // A product of x and y would not change from step to step, and be computed once.
      return s + detail::multiply_add_pairs(bit_cast<Vec<int16_t>>(s), bit_cast<Vec<int16_t>>(y));
    }
#else
    else {
      return s;
    }
#endif
  };
  // A lane's operations: kPack products, two where the narrow levels multiply 16-bit pairs.
  constexpr int products = multiply == Multiply::fma ? 1 : PTK_ISA_LEVEL < 3 ? 2 : GemmTraits<T>::kPack;
  return rate(2.0 * chains * kLanes<S> * products * repeats, seconds, [&] {
    Vec<S> sum[chains] = {};
    for (int i = 0; i < repeats; ++i) {
#pragma GCC unroll 24
      for (int c = 0; c < chains; ++c) {
        sum[c] = step(sum[c]);
        PTK_OPAQUE(sum[c]);
      }
    }
  });
}

// A level compiles the types whose products it does anew; the rest is inherited from the level below.
#if PTK_ISA_LEVEL == 3
constexpr bool is_own(GemmType type) {
  return type == GemmType::s8 || type == GemmType::u8;
}
const GemmKernels& below() {
  return avx512::gemm_kernels();
}
#elif PTK_ISA_LEVEL == 4
constexpr bool is_own(GemmType type) {
  return type == GemmType::bf16;
}
const GemmKernels& below() {
  return avx512_vnni::gemm_kernels();
}
#elif PTK_ISA_LEVEL == 5
constexpr bool is_own(GemmType type) {
  return type == GemmType::bf16 || type == GemmType::s8 || type == GemmType::u8;
}
const GemmKernels& below() {
  return avx512_bf16::gemm_kernels();
}
#else
constexpr bool is_own(GemmType) {
  return true;
}
#endif

template <template <class> class Call, class... Args>
auto by_type(GemmType type, Args... args) {
#define PTK_CASE(name, T)                                                                                              \
  case GemmType::name:                                                                                                 \
    if constexpr (is_own(GemmType::name)) return Call<T>::run(args...);                                                \
    break
  switch (type) {
    PTK_CASE(f64, double);
    PTK_CASE(f32, float);
    PTK_CASE(bf16, bf16);
    PTK_CASE(f16, f16);
    PTK_CASE(s8, int8_t);
    PTK_CASE(u8, uint8_t);
  }
#undef PTK_CASE
#if PTK_ISA_LEVEL >= 3
  return Call<void>::run(below(), type, args...);
#else
  __builtin_unreachable();
#endif
}

template <class T>
struct CallMultiply {
  static bool run(const GemmProblem* p) { return multiply<T>(*p); }
};
template <>
struct CallMultiply<void> {
  static bool run(const GemmKernels& kernels, GemmType, const GemmProblem* p) { return kernels.gemm(*p); }
};
template <class T>
struct CallWarm {
  static double run(int64_t m, int64_t n, int64_t k, double seconds) { return warm_rate<T>(m, n, k, seconds); }
};
template <>
struct CallWarm<void> {
  static double run(const GemmKernels& kernels, GemmType type, int64_t m, int64_t n, int64_t k, double seconds) {
    return kernels.warm(type, m, n, k, seconds);
  }
};
template <class T>
struct CallPeak {
  static double run(double seconds) { return peak_rate<T>(seconds); }
};
template <>
struct CallPeak<void> {
  static double run(const GemmKernels& kernels, GemmType type, double seconds) { return kernels.peak(type, seconds); }
};

int64_t read(const void* data, int64_t bytes) {
  const auto* p = static_cast<const int64_t*>(data);
  Vec<int64_t> sum[4] = {};
  constexpr int64_t step = 4 * kLanes<int64_t>;
  for (int64_t i = 0; i + step <= bytes / 8; i += step)
    for (int v = 0; v < 4; ++v) sum[v] += load(p + i + v * kLanes<int64_t>);
  return reduce_add<int64_t>(sum[0] + sum[1] + sum[2] + sum[3]);
}

}  // namespace

const GemmKernels& gemm_kernels() {
  static constexpr GemmKernels kernels = {
      [](const GemmProblem& p) { return by_type<CallMultiply>(p.type, &p); },
      [](GemmType type, int64_t m, int64_t n, int64_t k, double seconds) {
        return by_type<CallWarm>(type, m, n, k, seconds);
      },
      [](GemmType type, double seconds) { return by_type<CallPeak>(type, seconds); },
      read,
  };
  return kernels;
}

}  // namespace ptk::PTK_ISA
