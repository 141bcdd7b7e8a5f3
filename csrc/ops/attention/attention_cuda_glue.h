// Backend of attention's torch glue that runs the CUDA kernels through a Launcher: StreamLauncher on a GPU.
#pragma once

#include "csrc/cuda/values.cuh"
#include "csrc/ops/attention/attention_cuda.h"
#include "csrc/ops/attention/attention_glue.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace ptk::cuda {

// What this library was built without cannot be chosen.
#ifdef PTK_WITHOUT_SM90A
inline constexpr Architecture kNewestBuilt = Architecture::sm_80;
#else
inline constexpr Architecture kNewestBuilt = Architecture::sm_90a;
#endif

// Kernels that may be chosen: none until Python says which.
inline Architecture newest_architecture = Architecture::none;

// Returns the newest that there is among those that may be chosen.
inline std::string set_newest_architecture(Text name) {
  newest_architecture = std::min(architecture_of(name), kNewestBuilt);
  return architecture_name(newest_architecture);
}

// Calls run.template operator()<Scalar>() with the type of dtype.
template <typename Run>
void with_scalar(DType dtype, Run&& run) {
  switch (dtype) {
  case DType::f64:
    return run.template operator()<double>();
  case DType::f32:
    return run.template operator()<float>();
  case DType::bf16:
    return run.template operator()<torch::headeronly::BFloat16>();
  case DType::f16:
    return run.template operator()<torch::headeronly::Half>();
  }
}

template <typename Run>
void with_narrow_scalar(DType dtype, Run&& run) {
  return dtype == DType::bf16 ? run.template operator()<torch::headeronly::BFloat16>()
                              : run.template operator()<torch::headeronly::Half>();
}

// The kernels index rows with int, and step past the end by at most one tile.
inline void check_length(const char* name, int64_t length) {
  constexpr int64_t kMaxLength = (int64_t{1} << 31) - 256;
  PTK_CHECK(length <= kMaxLength, "attention: ", name, ": got length ", length, ", expected at most ", kMaxLength,
            " on cuda");
}

inline Architecture checked_architecture(const Problem& problem, int capability, bool suits_copy_engine) {
  const Architecture architecture = choose_architecture(problem, capability, newest_architecture, suits_copy_engine);
  PTK_CHECK(architecture != Architecture::none,
            "attention: query: got a tensor on cuda, expected one on the cpu: no CUDA kernel has passed on a GPU yet; "
            "PTKERNELS_CUDA_ARCH chooses those that have not");
  check_length("query", problem.len_q);
  check_length("key", problem.len_k);
  return architecture;
}

// A copy on the device of query of numbers that are on the host.
template <typename Launcher>
Tensor on_device(const int64_t* values, int64_t count, const Tensor& query, const Launcher& launcher) {
  const Tensor copy = empty_contiguous(query, {count}, DType::f64);  // as wide as an int64
  WriteValues::Params params;
  for (int64_t first = 0; first < count; first += WriteValues::kThreads) {
    params.count = static_cast<int>(std::min<int64_t>(count - first, WriteValues::kThreads));
    std::copy_n(values + first, params.count, params.values);
    params.out = static_cast<int64_t*>(copy.mutable_data_ptr()) + first;
    launcher.template run<WriteValues>(params);
  }
  return copy;
}

// A problem whose seeds and sequences are on the device.
struct DeviceProblem {
  Problem problem;
  std::optional<Tensor> seeds, first_q, first_k;

  template <typename Launcher>
  DeviceProblem(const Problem& host, const Tensor& query, const Launcher& launcher) : problem(host) {
    const auto move = [&](const int64_t*& values, int64_t count, std::optional<Tensor>& copy) {
      if (values != nullptr) {
        copy = on_device(values, count, query, launcher);
        values = static_cast<const int64_t*>(copy->const_data_ptr());
      }
    };
    move(problem.seeds, problem.batch / problem.batch_per_seed, seeds);
    move(problem.first_q, problem.batch + 1, first_q);
    move(problem.first_k, problem.batch + 1, first_k);
  }
};

template <typename Launcher>
struct AttentionBackend {
  static constexpr const char* kDevice = Launcher::kDevice;

  static bool owns(const Tensor& tensor) { return Launcher::owns(tensor); }

  static void forward(ForwardParams params, const Tensor& query) {
    const Launcher launcher(query.get_device_index());
    const Architecture architecture =
        checked_architecture(params.problem, launcher.capability(), fits_copy_engine(params));
    const DeviceProblem device(params.problem, query, launcher);
    params.problem = device.problem;
    if (architecture == Architecture::sm_90a) {
      with_narrow_scalar(params.problem.dtype,
                         [&]<typename Scalar>() { run_attention_forward_sm90<Scalar>(params, launcher); });
    } else if (architecture == Architecture::sm_80) {
      with_narrow_scalar(params.problem.dtype,
                         [&]<typename Scalar>() { run_attention_forward_sm80<Scalar>(params, launcher); });
    } else {
      with_scalar(params.problem.dtype, [&]<typename Scalar>() { run_attention_forward<Scalar>(params, launcher); });
    }
  }

  static void backward(BackwardParams params, const Tensor& query) {
    const Launcher launcher(query.get_device_index());
    const Architecture architecture = checked_architecture(params.problem, launcher.capability(), false);
    const DeviceProblem device(params.problem, query, launcher);
    params.problem = device.problem;
    const bool has_slopes = params.grad_alibi.data != nullptr;
    const DType wide = lse_dtype(params.problem.dtype);
    const Tensor scratch = empty_contiguous(query, {backward_scratch_count(params.problem, has_slopes)}, wide);
    const auto part = [&](int64_t index) -> void* {
      return static_cast<char*>(scratch.mutable_data_ptr()) +
             index * row_statistics_count(params.problem) * static_cast<int64_t>(element_size(wide));
    };
    const AttentionBackwardParams all{params, part(0), part(1), has_slopes ? part(2) : nullptr};
    if (architecture == Architecture::none || architecture == Architecture::cuda_cores) {
      with_scalar(params.problem.dtype, [&]<typename Scalar>() { run_attention_backward<Scalar>(all, launcher); });
    } else {
      with_narrow_scalar(params.problem.dtype,
                         [&]<typename Scalar>() { run_attention_backward_sm80<Scalar>(all, launcher); });
    }
  }
};

}  // namespace ptk::cuda
