// ptkernels._introspect: what the loaded libptkernels.so was built as and would run. Import it after that library.
#include "csrc/cpu/isa.h"
#include "csrc/ops/attention/attention.h"
#include "csrc/ops/attention_kv_cache/kv_cache.h"
#include "csrc/ops/conv_bn_relu/conv_bn_relu.h"
#include "csrc/ops/packed_rnn/packed_rnn.h"
#include "csrc/ops/quantized_matmul/quantized_matmul.h"

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

constexpr ptk::DType kDTypes[] = {ptk::DType::f64, ptk::DType::f32, ptk::DType::bf16, ptk::DType::f16};

ptk::DType parse_dtype(std::string_view name) {
  for (const ptk::DType dtype : kDTypes) {
    if (name == ptk::dtype_name(dtype)) {
      return dtype;
    }
  }
  throw std::invalid_argument("dtype: got '" + std::string(name) + "', expected float64, float32, bfloat16 or float16");
}

ptk::MaskKind parse_mask(std::string_view name, ptk::DType dtype) {
  if (name == "none" || name == "bool") {
    return name == "none" ? ptk::MaskKind::none : ptk::MaskKind::boolean;
  }
  return parse_dtype(name) == dtype ? ptk::MaskKind::same_dtype : ptk::MaskKind::f32;
}

std::string attention_kernel(const std::string& dtype, int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t len_q,
                             int64_t len_k, int64_t dim_qk, int64_t dim_v, bool is_causal, const std::string& mask) {
  ptk::Problem p;
  p.dtype = parse_dtype(dtype);
  p.batch = batch;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.len_q = len_q;
  p.len_k = len_k;
  p.dim_qk = dim_qk;
  p.dim_v = dim_v;
  p.is_causal = is_causal;
  p.mask_kind = parse_mask(mask, p.dtype);
  return ptk::attention_kernel_name(p);
}

std::string attention_with_kv_cache_kernel(const std::string& dtype, bool is_quantized, int64_t heads_q,
                                           int64_t heads_kv, int64_t len_q) {
  ptk::KvCacheParams p;
  p.dtype = parse_dtype(dtype);
  p.cache_type = is_quantized ? ptk::CacheType::s8 : ptk::CacheType::as_query;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.len_q = len_q;
  return ptk::kv_cache_kernel_name(p);
}

std::string quantized_matmul_kernel(const std::string& dtype, int64_t m, int64_t n, int64_t k,
                                    const std::string& code_format, int64_t group_size, bool quantize_input) {
  ptk::QuantizedForward p;
  p.input.dtype = parse_dtype(dtype);
  p.m = m;
  p.weight.n = n;
  p.weight.k = k;
  p.weight.group = group_size;
  p.weight.format = ptk::parse_code_format(code_format);
  p.quantize_input = quantize_input;
  return ptk::quantized_matmul_kernel_name(p);
}

using Space = std::array<int64_t, 3>;

std::string conv_kernel(const std::string& dtype, int64_t batch, std::pair<int64_t, int64_t> channels, int64_t groups,
                        const Space& size, const Space& kernel, const Space& stride, const Space& padding,
                        const Space& dilation, const Space& result, bool transposed, bool channels_last,
                        int64_t norm_groups, bool pre_activation) {
  ptk::ConvProblem p;
  p.layout = channels_last ? ptk::Layout::channels_last : ptk::Layout::channels_first;
  p.dtype = parse_dtype(dtype);
  p.batch = batch;
  p.in_channels = channels.first;
  p.out_channels = channels.second;
  p.groups = groups;
  for (size_t d = 0; d < 3; ++d) {
    p.in[d] = size[d];
    p.kernel[d] = kernel[d];
    p.stride[d] = stride[d];
    p.padding[d] = padding[d];
    p.dilation[d] = dilation[d];
    p.out[d] = result[d];
  }
  p.transposed = transposed;
  p.norm_groups = norm_groups;
  p.pre_activation = pre_activation ? ptk::Activation::relu : ptk::Activation::none;
  return ptk::conv_kernel_name(p);
}

// Kernel per op and dtype, for a problem large enough that the widest kernel pays.
std::map<std::string, std::map<std::string, std::string>> kernel_table() {
  constexpr Space one = {1, 1, 1}, zero = {0, 0, 0}, image = {1, 56, 56}, two = {1, 2, 2}, three = {1, 3, 3},
                  border = {0, 1, 1}, half = {1, 28, 28};
  std::map<std::string, std::map<std::string, std::string>> table;
  for (const ptk::DType dtype : kDTypes) {
    const char* name = ptk::dtype_name(dtype);
    table["attention"][name] = attention_kernel(name, 1, 16, 16, 1024, 1024, 64, 64, false, "none");
    table["quantized_matmul"][name] = quantized_matmul_kernel(name, 1024, 1024, 1024, "s8", 1024, true);
    const auto convolution = [&](int64_t groups, const Space& kernel, const Space& stride, bool channels_last) {
      return conv_kernel(name, 8, {64, 64}, groups, image, kernel, stride, kernel == one ? zero : border, one,
                         stride == one ? image : half, false, channels_last, 0, false);
    };
    table["conv_bn_relu"][name] = convolution(1, three, one, true);
    table["conv_bn_relu strided"][name] = convolution(1, three, two, true);
    table["conv_bn_relu pointwise"][name] = convolution(1, one, one, true);
    table["conv_bn_relu pointwise planes"][name] = convolution(1, one, one, false);
    table["conv_bn_relu depthwise"][name] = convolution(64, three, one, true);
    table["conv_bn_relu depthwise planes"][name] = convolution(64, three, one, false);
    ptk::RnnProblem recurrent;
    recurrent.dtype = dtype;
    table["packed_rnn"][name] = ptk::packed_rnn_kernel_name(recurrent);
  }
  return table;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (int level = 0; level < (PTK_X86 ? ptk::kIsaCount : 1); ++level) {
    names.emplace_back(ptk::isa_name(static_cast<ptk::Isa>(level)));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_introspect, module) {
  module.doc() = "What the loaded libptkernels.so was built as and would run.";
  module.def(
      "detected_isa", [] { return std::string(ptk::isa_name(ptk::detected_isa())); },
      "Highest ISA level that this CPU and its operating system support.");
  module.def(
      "preferred_isa", [] { return std::string(ptk::isa_name(ptk::preferred_isa())); },
      "ISA level that kernels run at unless capped: the fastest here.");
  module.def(
      "active_isa", [] { return std::string(ptk::isa_name(ptk::active_isa())); },
      "ISA level of the CPU kernels. Fixes it for the process.");
  module.def("compiled_isas", &compiled_isas, "ISA levels that the library holds, lowest first.");
  module.def("emulated", &ptk::emulated_isa, "Whether the levels above avx2 are emulated on avx2.");
  module.def(
      "cpu_features", [] { return std::string(ptk::cpu_features()); },
      "CPU features that the levels rest on, space separated.");
  module.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{
            {"compiler", PTK_COMPILER}, {"flags", PTK_FLAGS},   {"torch", PTK_TORCH},
            {"torch_target", "2.10"},   {"commit", PTK_COMMIT}, {"cuda_architectures", PTK_CUDA_ARCHITECTURES}};
      },
      "Compiler, flags, torch built against, lowest torch supported, git commit, CUDA architectures.");
  module.def("kernel_table", &kernel_table, "Kernel per op and dtype at the active level.");
  module.def("attention_kernel", &attention_kernel, py::kw_only(), py::arg("dtype"), py::arg("batch"),
             py::arg("heads_q"), py::arg("heads_kv"), py::arg("len_q"), py::arg("len_k"), py::arg("dim_qk"),
             py::arg("dim_v"), py::arg("is_causal") = false, py::arg("mask") = "none",
             "Name of the CPU kernel that attention would run. mask: none, bool or a float dtype.");
  module.def("attention_with_kv_cache_kernel", &attention_with_kv_cache_kernel, py::kw_only(), py::arg("dtype"),
             py::arg("is_quantized"), py::arg("heads_q"), py::arg("heads_kv"), py::arg("len_q"),
             "Name of the CPU kernel that attention_with_kv_cache would run.");
  module.def("quantized_matmul_kernel", &quantized_matmul_kernel, py::kw_only(), py::arg("dtype"), py::arg("m"),
             py::arg("n"), py::arg("k"), py::arg("code_format"), py::arg("group_size"), py::arg("quantize_input"),
             "Name of the CPU kernel that quantized_linear would run.");
  module.def("conv_kernel", &conv_kernel, py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("channels"),
             py::arg("groups"), py::arg("size"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
             py::arg("dilation"), py::arg("result"), py::arg("transposed") = false, py::arg("channels_last") = false,
             py::arg("norm_groups") = 0, py::arg("pre_activation") = false,
             "Name of the CPU kernel that a convolution would run; sizes are [depth, height, width].");
}
