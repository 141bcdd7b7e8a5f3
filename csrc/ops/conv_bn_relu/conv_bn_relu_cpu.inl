// Convolution, normalisation and activation on the CPU, one ISA level: which kernel answers which problem.
// Channels-first tensors stay as they are where a kernel reads planes; else they are brought to channels last once, and
// results return to the caller's layout block by block.
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_depthwise_planes.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_normalize_planes.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_planes.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_wgrad.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_wgrad_direct.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_wgrad_planes.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_winograd.h"

namespace ptk::PTK_ISA {
namespace {

// Above avx512 the levels differ in bfloat16 only: everything else runs the avx512 kernels, compiled once.
#if PTK_ISA_LEVEL >= 3
const ConvKernels& inherited() {
  return avx512::conv_kernels();
}
bool is_inherited(DType dtype) {
  return PTK_ISA_LEVEL == 3 || dtype != DType::bf16;
}
bool is_inherited(const ConvProblem& p) {
  return is_inherited(p.dtype) || is_depthwise(p);
}
#else
const ConvKernels& inherited() {
  return conv_kernels();
}
constexpr bool is_inherited(DType) {
  return false;
}
constexpr bool is_inherited(const ConvProblem&) {
  return false;
}
#endif

template <class Call>
bool by_dtype([[maybe_unused]] DType dtype, [[maybe_unused]] const Call& call) {
#if PTK_ISA_LEVEL < 3
  switch (dtype) {
  case DType::f64:
    return call(double());
  case DType::f32:
    return call(float());
  case DType::bf16:
    return call(bf16());
  case DType::f16:
    return call(f16());
  }
  __builtin_unreachable();
#elif PTK_ISA_LEVEL == 3
  __builtin_unreachable();
#else
  return call(bf16());
#endif
}

// The input, channels last: itself, or a copy in `buffer`.
template <class T>
const T* channels_last_input(const ConvProblem& p, const void* input, const SharedBuffer& buffer) {
  const T* data = static_cast<const T*>(input);
  if (p.layout == Layout::channels_last || p.in_channels == 1 || volume(p.in) == 1) return data;
  to_channels_last(data, buffer.as<T>(), p.batch, p.in_channels, volume(p.in));
  return buffer.as<T>();
}

template <class T>
int64_t input_bytes(const ConvProblem& p) {
  return p.layout == Layout::channels_last ? 0
                                           : p.batch * p.in_channels * volume(p.in) * static_cast<int64_t>(sizeof(T));
}

// Whether the forward kernel takes channels-first tensors as they are, whatever its result is for: calls with and
// without gradients have the same bits.
template <class T>
bool reads_planes(const ConvProblem& p) {
  if (conv_layout(p) == Layout::channels_first) return true;
  if (p.layout != Layout::channels_first || volume(p.out) == 1 || is_depthwise(p)) return false;
  if constexpr (std::is_same_v<T, float>)
    if (WinogradConv::fits(p, forward_gather(p))) return false;
  return PlanesConv<T>::pays(p);
}

// The same of what reads the convolution's result, or its gradient.
bool keeps_planes(const ConvProblem& p) {
  return conv_layout(p) == Layout::channels_first;
}

// Calls use(kernel) with the kernel that answers a problem between channels-first tensors.
template <class T, class Use>
auto with_planes_kernel(const ConvProblem& p, const Gather& gather, const T* source, const T* weight,
                        const ConvResult<T>& result, const Use& use) {
  if (is_depthwise(p)) return use(DepthwisePlanes<T>(gather, source, weight, result));
  return use(PlanesConv<T>(p, gather, source, weight, result));
}

// Calls use(kernel) with the kernel that answers a problem between channels-last tensors, or with a channels-first
// result.
template <class T, class Use>
auto with_kernel(const ConvProblem& p, const Gather& gather, const T* source, const T* weight,
                 const ConvResult<T>& result, const Use& use) {
  if (is_depthwise(p)) return use(DepthwiseConv<T>(gather, source, weight, result));
  if constexpr (std::is_same_v<T, float>)
    if (WinogradConv::fits(p, gather)) return use(WinogradConv(p, gather, source, weight, result));
  return use(ImplicitConv<T>(p, gather, source, weight, result));
}

// `packed`: where the weights are, or are to be, in the kernel's layout; null for memory of the call.
template <class Kernel>
bool pack_and_run(const Kernel& kernel, void* packed, bool is_packed) {
  const SharedBuffer own(packed ? 0 : kernel.packed_bytes());
  if (!own) return false;
  if (!packed) packed = own.as<char>();
  return (is_packed || kernel.pack(packed)) && kernel.run(packed);
}

template <class T>
PackedConvLayout packed_layout_as(const ConvProblem& p) {
  const ConvResult<T> result;
  const auto layout = [](const auto& kernel) { return PackedConvLayout{kernel.packed_bytes(), kernel.packed_kind()}; };
  if (reads_planes<T>(p)) return with_planes_kernel<T>(p, forward_gather(p), nullptr, nullptr, result, layout);
  return with_kernel<T>(p, forward_gather(p), nullptr, nullptr, result, layout);
}

// A result that is to be rows of channels is brought there.
template <class T>
bool convolve_planes(const ConvParams& params, ConvResult<T> result) {
  const ConvProblem& p = params.problem;
  const bool to_rows = params.out_layout == Layout::channels_last;
  const int64_t space = volume(p.out), size = p.batch * p.out_channels * space;
  const SharedBuffer planes(to_rows ? size * static_cast<int64_t>(sizeof(T)) : 0);
  if (!planes) return false;
  if (to_rows) result.out = planes.as<T>();
  const auto run = [&](const auto& kernel) { return pack_and_run(kernel, params.packed, params.is_packed); };
  if (!with_planes_kernel<T>(p, forward_gather(p), static_cast<const T*>(params.input),
                             static_cast<const T*>(params.weight), result, run))
    return false;
  if (params.batch_mean)
    statistics_of_planes(result.out, p.batch, p.out_channels, space, static_cast<Acc<T>*>(params.batch_mean),
                         static_cast<Acc<T>*>(params.batch_variance));
  if (to_rows) to_channels_last(result.out, static_cast<T*>(params.out), p.batch, p.out_channels, space);
  return true;
}

template <class T>
bool convolve_as(const ConvParams& params) {
  using A = Acc<T>;
  const ConvProblem& p = params.problem;
  ConvResult<T> result;
  result.out = static_cast<T*>(params.out);
  result.layout = params.out_layout;
  result.residual = static_cast<const T*>(params.residual);
  result.bias = static_cast<const A*>(params.bias);
  result.mean = static_cast<const A*>(params.mean);
  result.scale = static_cast<const A*>(params.scale);
  result.shift = static_cast<const A*>(params.shift);
  result.activation = p.activation;
  result.slope = static_cast<A>(p.slope);
  if (reads_planes<T>(p)) return convolve_planes<T>(params, result);
  const SharedBuffer buffer(input_bytes<T>(p));
  if (!buffer) return false;
  const T* input = channels_last_input<T>(p, params.input, buffer);
  const auto run = [&](const auto& kernel) {
    if (!params.batch_mean) return pack_and_run(kernel, params.packed, params.is_packed);
    const Blocks blocks = kernel.blocks();
    const SharedBuffer statistics(blocks.count() * 2 * p.out_channels * static_cast<int64_t>(sizeof(A)));
    if (!statistics) return false;
    result.statistics = statistics.as<A>();
    if (!pack_and_run(kernel, params.packed, params.is_packed)) return false;
    merge_statistics(statistics.as<A>(), p.out_channels, blocks.rows, blocks.width, blocks.positions,
                     static_cast<A*>(params.batch_mean), static_cast<A*>(params.batch_variance));
    return true;
  };
  return with_kernel<T>(p, forward_gather(p), input, static_cast<const T*>(params.weight), result, run);
}

template <class T>
bool input_gradient(const ConvBackwardParams& params) {
  const ConvProblem& p = params.problem;
  const auto run = [](const auto& kernel) { return pack_and_run(kernel, nullptr, false); };
  if (keeps_planes(p)) {
    ConvResult<T> result;
    result.layout = Layout::channels_first;
    result.out = static_cast<T*>(params.grad_input);
    return with_planes_kernel<T>(p, input_gradient_gather(p, {0, 0, 0}), static_cast<const T*>(params.grad_conv),
                                 static_cast<const T*>(params.weight), result, run);
  }
  const bool transposed = p.layout == Layout::channels_first && p.in_channels > 1 && volume(p.in) > 1;
  const SharedBuffer buffer(transposed ? input_bytes<T>(p) : 0);
  if (!buffer) return false;
  ConvResult<T> result;
  result.out = transposed ? buffer.as<T>() : static_cast<T*>(params.grad_input);
  const T *grad = static_cast<const T*>(params.grad_conv), *weight = static_cast<const T*>(params.weight);
  int64_t phase[3];
  for (phase[0] = 0; phase[0] < least(p.stride[0], p.in[0]); ++phase[0])
    for (phase[1] = 0; phase[1] < least(p.stride[1], p.in[1]); ++phase[1])
      for (phase[2] = 0; phase[2] < least(p.stride[2], p.in[2]); ++phase[2])
        if (!with_kernel<T>(p, input_gradient_gather(p, phase), grad, weight, result, run)) return false;
  if (transposed)
    to_channels_first(result.out, static_cast<T*>(params.grad_input), p.batch, p.in_channels, volume(p.in));
  return true;
}

template <class T>
bool weight_gradient(const ConvBackwardParams& params) {
  const ConvProblem& p = params.problem;
  const T* grad = static_cast<const T*>(params.grad_conv);
  T* grad_weight = static_cast<T*>(params.grad_weight);
  const Gather gather = forward_gather(p);
  if (keeps_planes(p)) {
    const T* input = static_cast<const T*>(params.input);
    if (is_depthwise(p)) return DepthwisePlanesWeightGradient<T>(gather, input, grad, grad_weight).run();
    return PlanesWeightGradient<T>(p, input, grad, grad_weight).run();
  }
  const SharedBuffer buffer(input_bytes<T>(p));
  if (!buffer) return false;
  const T* input = channels_last_input<T>(p, params.input, buffer);
  if (is_depthwise(p)) return DepthwiseWeightGradient<T>(gather, input, grad, grad_weight).run();
  if constexpr (std::is_same_v<Element<T>, T> && sizeof(T) >= 4) {
    return DirectWeightGradient<T>(flattened(gather), input, grad, grad_weight).run();
  } else {
    return WeightGradient<T>(p, gather, input, grad, grad_weight).run();
  }
}

PackedConvLayout packed_layout(const ConvProblem& p) {
  if (is_inherited(p)) return inherited().packed_layout(p);
  PackedConvLayout layout{};
  by_dtype(p.dtype, [&](auto t) {
    layout = packed_layout_as<decltype(t)>(p);
    return true;
  });
  return layout;
}

bool convolve(const ConvParams& params) {
  if (is_inherited(params.problem)) return inherited().convolve(params);
  return by_dtype(params.problem.dtype, [&](auto t) { return convolve_as<decltype(t)>(params); });
}

bool convolve_backward(const ConvBackwardParams& params) {
  if (is_inherited(params.problem)) return inherited().convolve_backward(params);
  return by_dtype(params.problem.dtype, [&](auto t) {
    using T = decltype(t);
    return (!params.grad_input || input_gradient<T>(params)) && (!params.grad_weight || weight_gradient<T>(params));
  });
}

bool normalize(const NormalizeParams& params) {
  if (is_inherited(params.problem.dtype)) return inherited().normalize(params);
  return by_dtype(params.problem.dtype, [&](auto t) {
    using T = decltype(t);
    return keeps_planes(params.problem) ? NormalizePlanes<T>(params).run() : Normalize<T>(params).run();
  });
}
bool normalize_backward(const NormalizeBackwardParams& params) {
  if (is_inherited(params.forward.problem.dtype)) return inherited().normalize_backward(params);
  return by_dtype(params.forward.problem.dtype, [&](auto t) {
    using T = decltype(t);
    return keeps_planes(params.forward.problem) ? NormalizePlanes<T>(params.forward).run_backward(params)
                                                : Normalize<T>(params.forward).run_backward(params);
  });
}

#define PTK_TEXT(x) #x
#define PTK_NAME(isa, kernel) "cpu." PTK_TEXT(isa) "." kernel

const char* describe(const ConvProblem& p) {
  if (is_inherited(p)) return inherited().describe(p);
  bool planes = false;
  by_dtype(p.dtype, [&](auto t) { return planes = reads_planes<decltype(t)>(p); });
  if (planes) return is_depthwise(p) ? PTK_NAME(PTK_ISA, "depthwise_planes") : PTK_NAME(PTK_ISA, "planes");
  if (is_depthwise(p)) return PTK_NAME(PTK_ISA, "depthwise");
  if (WinogradConv::fits(p, forward_gather(p))) return PTK_NAME(PTK_ISA, "winograd_f2x2_3x3");
  return forward_gather(p).is_pointwise() ? PTK_NAME(PTK_ISA, "pointwise") : PTK_NAME(PTK_ISA, "implicit_gemm");
}

}  // namespace

const ConvKernels& conv_kernels() {
  static constexpr ConvKernels kernels = {packed_layout,      convolve,          normalize,
                                          normalize_backward, convolve_backward, describe};
  return kernels;
}

}  // namespace ptk::PTK_ISA
