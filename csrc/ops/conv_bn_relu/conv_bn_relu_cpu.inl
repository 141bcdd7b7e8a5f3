// Convolution, normalisation and activation on the CPU, one ISA level: which kernel answers which problem.
// Channels-first tensors stay as they are where a kernel reads planes; else they are brought to channels last once, and
// results return to the caller's layout block by block.
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_columns.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_depthwise_planes.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_normalize_planes.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_planes.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_preactivation.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_statistics.h"
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

// The input as the convolution reads it, channels last and activated: itself, or a copy in `buffer`.
template <class T>
const T* channels_last_input(const ConvProblem& p, const void* input, const SharedBuffer& buffer) {
  const T* data = static_cast<const T*>(input);
  if (p.pre_activation != Activation::none) {
    activated_rows(p, data, buffer.as<T>());
    return buffer.as<T>();
  }
  if (p.layout == Layout::channels_last || p.in_channels == 1 || volume(p.in) == 1) return data;
  to_channels_last(data, buffer.as<T>(), p.batch, p.in_channels, volume(p.in));
  return buffer.as<T>();
}

template <class T>
int64_t input_bytes(const ConvProblem& p) {
  const bool is_read_in_place = p.layout == Layout::channels_last && p.pre_activation == Activation::none;
  return is_read_in_place ? 0 : p.batch * p.in_channels * volume(p.in) * static_cast<int64_t>(sizeof(T));
}

// Whether the forward kernel takes channels-first tensors as they are, whatever its result is for: calls with and
// without gradients have the same bits.
template <class T>
bool reads_planes(const ConvProblem& p) {
  if (p.transposed || p.norm_groups || p.pre_activation != Activation::none) return false;
  if (conv_layout(p) == Layout::channels_first) return true;
  if (p.layout != Layout::channels_first || volume(p.out) == 1) return false;
  if (is_depthwise(p)) return DepthwisePlanes<T>::fits_strided(p);
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
  if (!packed && kernel.packs_on_the_way()) return kernel.run(nullptr);
  const SharedBuffer own(packed ? 0 : kernel.packed_bytes());
  if (!own) return false;
  if (!packed) packed = own.as<char>();
  return (is_packed || kernel.pack(packed)) && kernel.run(packed);
}

// Calls use(kernel) for the input gradient of a convolution: a convolution for every residue of the input coordinate
// modulo the stride. Ends with false when a call does.
template <class T, class Use>
bool for_phases(const ConvProblem& p, const T* grad, const T* weight, const ConvResult<T>& result, const Use& use) {
  int64_t phase[3];
  for (phase[0] = 0; phase[0] < least(p.stride[0], p.in[0]); ++phase[0])
    for (phase[1] = 0; phase[1] < least(p.stride[1], p.in[1]); ++phase[1])
      for (phase[2] = 0; phase[2] < least(p.stride[2], p.in[2]); ++phase[2])
        if (!with_kernel<T>(p, input_gradient_gather(p, phase), grad, weight, result, use)) return false;
  return true;
}

// Of the weights of a transposed convolution, those of its phases one after the other. Which taps are whose depends on
// more than their shape, so that `kind` is a hash of it all.
template <class T>
PackedConvLayout packed_phases(const ConvProblem& p) {
  const ConvResult<T> result;
  uint64_t hash = 14695981039346656037u;
  const auto mix = [&](int64_t value) { hash = (hash ^ static_cast<uint64_t>(value)) * 1099511628211u; };
  for (int d = 0; d < 3; ++d)
    for (const int64_t value : {p.stride[d], p.padding[d], p.dilation[d], least(p.stride[d], p.out[d])}) mix(value);
  int64_t bytes = 0;
  for_phases<T>(adjoint(p), nullptr, nullptr, result, [&](const auto& kernel) {
    mix(kernel.packed_kind());
    bytes += round_up(kernel.packed_bytes(), 64);
    return true;
  });
  return {bytes, static_cast<int64_t>(hash)};
}

template <class T>
PackedConvLayout packed_layout_as(const ConvProblem& p) {
  if (p.transposed) return packed_phases<T>(p);
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
ConvResult<T> result_of(const ConvParams& params) {
  using A = Acc<T>;
  ConvResult<T> result;
  result.out = static_cast<T*>(params.out);
  result.layout = params.out_layout;
  result.residual = static_cast<const T*>(params.residual);
  result.bias = static_cast<const A*>(params.bias);
  result.mean = static_cast<const A*>(params.mean);
  result.scale = static_cast<const A*>(params.scale);
  result.shift = static_cast<const A*>(params.shift);
  result.activation = params.problem.activation;
  result.slope = static_cast<A>(params.problem.slope);
  return result;
}

// As the input gradient of its adjoint, with what follows a convolution. Phases interleave, so that a channels-first
// result and its residual pass through whole tensors.
template <class T>
bool convolve_transposed(const ConvParams& params) {
  using A = Acc<T>;
  const ConvProblem& p = params.problem;
  const int64_t space = volume(p.out);
  const bool by_rows = params.out_layout == Layout::channels_first && p.out_channels > 1 && space > 1;
  const int64_t bytes = by_rows ? p.batch * p.out_channels * space * static_cast<int64_t>(sizeof(T)) : 0;
  const SharedBuffer buffer(input_bytes<T>(p)), out(bytes), residual(params.residual ? bytes : 0);
  if (!buffer || !out || !residual) return false;
  ConvResult<T> result = result_of<T>(params);
  result.layout = Layout::channels_last;
  if (by_rows) result.out = out.as<T>();
  if (by_rows && params.residual) {
    to_channels_last(result.residual, residual.as<T>(), p.batch, p.out_channels, space);
    result.residual = residual.as<T>();
  }
  const T* input = channels_last_input<T>(p, params.input, buffer);
  char* packed = static_cast<char*>(params.packed);
  const auto run = [&](const auto& kernel) {
    char* weights = packed;
    if (packed) packed += round_up(kernel.packed_bytes(), 64);
    return pack_and_run(kernel, weights, params.is_packed);
  };
  if (!for_phases(adjoint(p), input, static_cast<const T*>(params.weight), result, run)) return false;
  if (by_rows) to_channels_first(result.out, static_cast<T*>(params.out), p.batch, p.out_channels, space);
  return !params.batch_mean ||
         result_statistics(p, result.out, static_cast<A*>(params.batch_mean), static_cast<A*>(params.batch_variance));
}

template <class T>
bool convolve_as(const ConvParams& params) {
  using A = Acc<T>;
  const ConvProblem& p = params.problem;
  if (p.transposed) return convolve_transposed<T>(params);
  ConvResult<T> result = result_of<T>(params);
  if (reads_planes<T>(p)) return convolve_planes<T>(params, result);
  const SharedBuffer buffer(input_bytes<T>(p));
  if (!buffer) return false;
  const T* input = channels_last_input<T>(p, params.input, buffer);
  const auto run = [&](const auto& kernel) {
    if (!params.batch_mean || p.norm_groups) return pack_and_run(kernel, params.packed, params.is_packed);
    const Blocks blocks = kernel.blocks();
    const SharedBuffer statistics(blocks.count() * 2 * p.out_channels * static_cast<int64_t>(sizeof(A)));
    if (!statistics) return false;
    result.statistics = statistics.as<A>();
    if (!pack_and_run(kernel, params.packed, params.is_packed)) return false;
    merge_statistics(statistics.as<A>(), p.out_channels, blocks.rows, blocks.width, blocks.positions,
                     static_cast<A*>(params.batch_mean), static_cast<A*>(params.batch_variance));
    return true;
  };
  if (!with_kernel<T>(p, forward_gather(p), input, static_cast<const T*>(params.weight), result, run)) return false;
  // The kernels' blocks do not end where images do.
  return !params.batch_mean || !p.norm_groups ||
         result_statistics(p, result.out, static_cast<A*>(params.batch_mean), static_cast<A*>(params.batch_variance));
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
  const T *grad = static_cast<const T*>(params.grad_conv), *weight = static_cast<const T*>(params.weight);
  if (ColumnsGradient<T>::pays(p) && !WinogradConv::fits(p, input_gradient_gather(p, {0, 0, 0})))
    return ColumnsGradient<T>(p).input(grad, weight, static_cast<T*>(params.grad_input));
  const bool transposed = p.layout == Layout::channels_first && p.in_channels > 1 && volume(p.in) > 1;
  const SharedBuffer buffer(transposed ? input_bytes<T>(p) : 0);
  if (!buffer) return false;
  ConvResult<T> result;
  result.out = transposed ? buffer.as<T>() : static_cast<T*>(params.grad_input);
  if (!for_phases(p, grad, weight, result, run)) return false;
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
  if (ColumnsGradient<T>::pays(p) && p.pre_activation == Activation::none)
    return ColumnsGradient<T>(p).weight(grad, static_cast<const T*>(params.input), grad_weight);
  const SharedBuffer buffer(input_bytes<T>(p));
  if (!buffer) return false;
  const T* input = channels_last_input<T>(p, params.input, buffer);
  if (ColumnsGradient<T>::source_is_columns(p, gather))
    return ColumnsGradient<T>(p).weight_of_columns(grad, input, grad_weight);
  if (is_depthwise(p)) return DepthwiseWeightGradient<T>(gather, input, grad, grad_weight).run();
  if constexpr (std::is_same_v<Element<T>, T> && sizeof(T) >= 4) {
    return DirectWeightGradient<T>(flattened(gather), input, grad, grad_weight).run();
  } else {
    return WeightGradient<T>(p, gather, input, grad, grad_weight).run();
  }
}

// Of a transposed convolution: input and gradient change places in the products of its adjoint.
template <class T>
bool transposed_gradients(const ConvBackwardParams& params) {
  const ConvProblem& p = params.problem;
  ConvProblem plain = adjoint(p);
  plain.activation = plain.pre_activation = Activation::none;
  plain.layout = Layout::channels_last;  // of grad_conv
  if (params.grad_input) {
    ConvParams forward;
    forward.problem = plain;
    forward.input = params.grad_conv;
    forward.weight = params.weight;
    forward.out = params.grad_input;
    forward.out_layout = p.layout;
    if (!convolve_as<T>(forward)) return false;
  }
  if (!params.grad_weight) return true;
  const SharedBuffer buffer(input_bytes<T>(p));
  if (!buffer) return false;
  ConvBackwardParams exchanged;
  exchanged.problem = plain;
  exchanged.grad_conv = channels_last_input<T>(p, params.input, buffer);
  exchanged.input = params.grad_conv;
  exchanged.grad_weight = params.grad_weight;
  return weight_gradient<T>(exchanged);
}

template <class T>
bool gradients(const ConvBackwardParams& params) {
  const ConvProblem& p = params.problem;
  const bool ok = p.transposed ? transposed_gradients<T>(params)
                               : (!params.grad_input || input_gradient<T>(params)) &&
                                     (!params.grad_weight || weight_gradient<T>(params));
  if (ok && params.grad_input && p.pre_activation != Activation::none)
    multiply_by_derivative(p, static_cast<const T*>(params.input), static_cast<T*>(params.grad_input));
  return ok;
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
  return by_dtype(params.problem.dtype, [&](auto t) { return gradients<decltype(t)>(params); });
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
  constexpr int64_t first[3] = {};
  const Gather gather = p.transposed ? input_gradient_gather(adjoint(p), first) : forward_gather(p);
  if (WinogradConv::fits(p, gather)) return PTK_NAME(PTK_ISA, "winograd_f2x2_3x3");
  return gather.is_pointwise() ? PTK_NAME(PTK_ISA, "pointwise") : PTK_NAME(PTK_ISA, "implicit_gemm");
}

}  // namespace

const ConvKernels& conv_kernels() {
  static constexpr ConvKernels kernels = {packed_layout,      convolve,          normalize,
                                          normalize_backward, convolve_backward, describe};
  return kernels;
}

}  // namespace ptk::PTK_ISA
