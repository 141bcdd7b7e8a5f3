// The CUDA kernels of attention as its glue sees them, and the choice between them. Torch-free. Launcher is
// StreamLauncher, or an executor of the same interface.
#pragma once

#include "csrc/ops/attention/attention.h"

#include <string_view>

namespace ptk::cuda {

// What a kernel needs of the GPU, and the name under which it can be asked for. In ascending order of preference.
enum class Architecture : int { none = 0, cuda_cores = 1, sm_80 = 80, sm_90a = 90 };

constexpr const char* architecture_name(Architecture architecture) {
  switch (architecture) {
  case Architecture::none:
    return "none";
  case Architecture::cuda_cores:
    return "cuda_cores";
  case Architecture::sm_80:
    return "sm_80";
  case Architecture::sm_90a:
    return "sm_90a";
  }
  return "";
}

constexpr Architecture architecture_of(std::string_view name) {
  for (const Architecture architecture : {Architecture::cuda_cores, Architecture::sm_80, Architecture::sm_90a}) {
    if (name == architecture_name(architecture)) {
      return architecture;
    }
  }
  return Architecture::none;
}

// The head dims of the kernels on the tensor cores. Smaller ones are padded in shared memory.
struct HeadDims {
  int qk;
  int v;
};
inline constexpr HeadDims kTensorCoreHeadDims[] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {192, 192}, {256, 256}};

constexpr bool fits(const Problem& problem, const HeadDims& dims) {
  return problem.dim_qk <= dims.qk && problem.dim_v <= dims.v;
}

constexpr bool has_narrow_type(const Problem& problem) {
  return problem.dtype == DType::bf16 || problem.dtype == DType::f16;
}

// Kernels on the tensor cores take 16-bit types up to a head dim of 256.
constexpr bool fits_tensor_cores(const Problem& problem) {
  return has_narrow_type(problem) && fits(problem, kTensorCoreHeadDims[5]);
}

// Whether the copy engine of sm_90 can read rows: 16-byte strides, nothing expanded.
constexpr bool is_row_mappable(const ConstView& view, int64_t batch, int64_t heads, int64_t length, bool is_aligned) {
  const auto fits_engine = [](int64_t stride, int64_t size) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 38));
  };
  return is_aligned && view.strides[3] == 1 && fits_engine(view.strides[2], length) &&
         fits_engine(view.strides[1], heads) && fits_engine(view.strides[0], batch);
}

inline bool fits_copy_engine(const ForwardParams& params) {
  const Problem& p = params.problem;
  const auto fits_operand = [&](const ConstView& view, int64_t heads, int64_t length) {
    return is_row_mappable(view, p.batch, heads, length, reinterpret_cast<uintptr_t>(view.data) % 16 == 0);
  };
  return p.first_q == nullptr && p.len_k > 0 && fits_operand(params.query, p.heads_q, p.len_q) &&
         fits_operand(params.key, p.heads_kv, p.len_k) && fits_operand(params.value, p.heads_kv, p.len_k);
}

// The kernels for a problem on a GPU of the given compute capability (major * 10 + minor), none newer than `newest`.
// The backward has none for sm_90a, and packed sequences neither: copies past a sequence's end would bring in the next
// one's numbers, and with a weight of 0 a NaN among them is a NaN.
constexpr Architecture choose_architecture(const Problem& problem, int capability, Architecture newest,
                                           bool suits_copy_engine) {
  if (newest >= Architecture::sm_80 && capability >= 80 && fits_tensor_cores(problem)) {
    // sm_90a is code for compute capability 9.0 alone.
    const bool has_newer = newest >= Architecture::sm_90a && capability == 90 && suits_copy_engine;
    return has_newer ? Architecture::sm_90a : Architecture::sm_80;
  }
  return newest >= Architecture::cuda_cores ? Architecture::cuda_cores : Architecture::none;
}

// How many numbers lse has.
constexpr int64_t row_statistics_count(const Problem& problem) {
  return problem.heads_q * (problem.first_q != nullptr ? problem.total_q : problem.batch * problem.len_q);
}

// How many numbers in the dtype of lse the backward needs beside its operands and gradients: delta, weight_scale and,
// where alibi_slopes has a gradient, slope_sums.
constexpr int64_t backward_scratch_count(const Problem& problem, bool has_slopes) {
  return row_statistics_count(problem) * (has_slopes ? 3 : 2);
}

struct AttentionBackwardParams {
  BackwardParams base;
  // Scratch, laid out like lse and in its dtype. slope_sums is null where alibi_slopes has no gradient.
  void* delta = nullptr;
  void* weight_scale = nullptr;
  void* slope_sums = nullptr;
};

// On the CUDA cores.
template <typename Scalar, typename Launcher>
void run_attention_forward(const ForwardParams& params, const Launcher& launcher);
template <typename Scalar, typename Launcher>
void run_attention_backward(const AttentionBackwardParams& params, const Launcher& launcher);

// On the tensor cores.
template <typename Scalar, typename Launcher>
void run_attention_forward_sm80(const ForwardParams& params, const Launcher& launcher);
template <typename Scalar, typename Launcher>
void run_attention_forward_sm90(const ForwardParams& params, const Launcher& launcher);
template <typename Scalar, typename Launcher>
void run_attention_backward_sm80(const AttentionBackwardParams& params, const Launcher& launcher);

}  // namespace ptk::cuda
