// The engine as private torch ops, for its tests and benchmarks:
//
//   _gemm(a, b, bias, relu)              act(sum_r a[r] @ b[r] + bias)
//   _gemm_rate(dtype, m, n, k, seconds)  operations/s of one thread, operands warm
//   _peak_flops(dtype, threads)          operations/s of a register-resident loop: the machine's limit
//   _read_bandwidth(bytes)               bytes/s of reading that much memory with all threads
#include "csrc/core/parallel.h"
#include "csrc/core/stable_compat.h"
#include "csrc/cpu/gemm/gemm_driver.h"

#include <chrono>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>

namespace ptk {
namespace {

GemmType type_of(const Tensor& tensor) {
  const int32_t dtype = shim_dtype(tensor);
  if (dtype == aoti_torch_dtype_int8()) {
    return GemmType::s8;
  }
  if (dtype == aoti_torch_dtype_uint8()) {
    return GemmType::u8;
  }
  const std::optional<DType> found = float_dtype(tensor);
  PTK_CHECK(found, "_gemm: a: got an unsupported dtype, expected float64, "
                   "float32, bfloat16, float16, int8 or uint8");
  return static_cast<GemmType>(*found);
}

GemmType type_named(const std::string& name) {
  constexpr const char* names[] = {"float64", "float32", "bfloat16", "float16", "int8", "uint8"};
  for (size_t i = 0; i < std::size(names); ++i) {
    if (name == names[i]) {
      return static_cast<GemmType>(i);
    }
  }
  fail("dtype: got '", name, "', expected float64, float32, bfloat16, float16, int8 or uint8");
}

Tensor gemm(Tensor a, Tensor b, std::optional<Tensor> bias, bool relu) {
  PTK_CHECK(a.dim() == 3 && b.dim() == 3, "_gemm: got ", a.dim(), "-D a and ", b.dim(), "-D b, expected 3-D");
  const auto sa = a.sizes();
  const auto sb = b.sizes();
  PTK_CHECK(sa[0] == sb[0] && sa[2] == sb[1], "_gemm: b: got ", shape_text(sb), " for a ", shape_text(sa));
  GemmProblem p{};
  p.type = type_of(a);
  const bool is_8bit = p.type == GemmType::s8 || p.type == GemmType::u8;
  PTK_CHECK(is_8bit ? shim_dtype(b) == aoti_torch_dtype_int8() : shim_dtype(b) == shim_dtype(a),
            "_gemm: b: got a dtype that does not go with a's");
  p.reduce = sa[0];
  p.m = sa[1];
  p.k = sa[2];
  p.n = sb[2];
  const int32_t out_dtype = is_8bit ? aoti_torch_dtype_int32() : shim_dtype(a);
  const int32_t sum_dtype = is_8bit                   ? aoti_torch_dtype_int32()
                            : p.type == GemmType::f64 ? aoti_torch_dtype_float64()
                                                      : aoti_torch_dtype_float32();
  const int64_t sizes[] = {p.m, p.n};
  const int64_t strides[] = {p.n, 1};
  AtenTensorHandle handle = nullptr;
  PTK_CHECK(aoti_torch_empty_strided(2, sizes, strides, out_dtype, aoti_torch_device_type_cpu(), 0, &handle) ==
                TORCH_SUCCESS,
            "_gemm: cannot allocate the result");
  Tensor c(handle);
  if (bias) {
    PTK_CHECK(shim_dtype(*bias) == sum_dtype && bias->dim() == 1 && bias->size(0) == p.n && bias->is_contiguous(),
              "_gemm: bias: got a tensor that is not ", p.n, " contiguous sums");
    p.bias = bias->const_data_ptr();
  }
  PTK_CHECK(p.reduce > 0 && p.k > 0, "_gemm: a: got ", shape_text(sa), ", expected at least one product");
  if (p.m == 0 || p.n == 0) {
    return c;
  }
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  for (int d = 0; d < 3; ++d) {
    p.stride_a[d] = a.stride(d);
    p.stride_b[d] = b.stride(d);
  }
  p.relu = relu;
  p.c = c.mutable_data_ptr();
  PTK_CHECK(PTK_DISPATCH(gemm_kernels).gemm(p), "_gemm: out of memory");
  return c;
}

double gemm_rate(Text dtype, int64_t m, int64_t n, int64_t k, double seconds) {
  PTK_CHECK(m > 0 && n > 0 && k > 0, "_gemm_rate: got a size below 1");
  return PTK_DISPATCH(gemm_kernels).warm(type_named(dtype), m, n, k, seconds);
}

double peak_flops(Text dtype, int64_t threads) {
  const GemmType type = type_named(dtype);
  const GemmKernels& kernels = PTK_DISPATCH(gemm_kernels);
  PTK_CHECK(threads >= 1 && threads <= num_threads(), "_peak_flops: threads: got ", threads, ", expected 1 to ",
            num_threads());
  std::vector<double> rates(threads);
  parallel_for(0, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      rates[i] = kernels.peak(type, 0.2);
    }
  });
  double sum = 0;
  for (const double rate : rates) {
    sum += rate;
  }
  return sum;
}

double read_bandwidth(int64_t bytes) {
  constexpr int64_t page = 4096;
  const int64_t threads = num_threads();
  const int64_t share = bytes / threads / page * page;
  PTK_CHECK(share > 0, "_read_bandwidth: bytes: got ", bytes, ", expected at least ", threads * page);
  const std::unique_ptr<char[]> memory(new char[share * threads]());
  const GemmKernels& kernels = PTK_DISPATCH(gemm_kernels);
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    int64_t sum = 0;
    const auto start = std::chrono::steady_clock::now();
    parallel_for(0, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        __atomic_fetch_add(&sum, kernels.read(memory.get() + i * share, share), __ATOMIC_RELAXED);
      }
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    PTK_CHECK(sum == 0, "_read_bandwidth: memory changed under the measurement");
    best = std::max(best, static_cast<double>(share * threads) / elapsed.count());
  }
  return best;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("_gemm(Tensor a, Tensor b, Tensor? bias=None, bool relu=False) "
              "-> Tensor");
  library.def("_gemm_rate(str dtype, int m, int n, int k, float seconds) -> float");
  library.def("_peak_flops(str dtype, int threads) -> float");
  library.def("_read_bandwidth(int bytes) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("_gemm", TORCH_BOX(&gemm));
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CompositeExplicitAutograd, library) {
  library.impl("_gemm_rate", TORCH_BOX(&gemm_rate));
  library.impl("_peak_flops", TORCH_BOX(&peak_flops));
  library.impl("_read_bandwidth", TORCH_BOX(&read_bandwidth));
}

}  // namespace ptk
