// Schema of attention and its CPU implementation: the kernel of the active ISA.
#include "csrc/core/float32_precision.h"
#include "csrc/ops/attention/attention_glue.h"

#include <atomic>

#include <torch/csrc/stable/library.h>

namespace ptk {
namespace {

std::atomic<bool> batch_invariant{false};

void set_batch_invariant(bool wanted) {
  batch_invariant = wanted;
}

struct CpuBackend {
  static constexpr const char* kDevice = "cpu";
  static constexpr bool kHasRelativeBias = true;
  static constexpr bool kHasBlockMask = true;

  static bool owns(const Tensor& tensor) { return tensor.is_cpu(); }

  static void forward(ForwardParams params, const Tensor&) {
    params.problem.batch_invariant = is_batch_invariant();
    params.problem.float32_products = allowed_float32_products(params.problem.dtype);
    PTK_CHECK(PTK_DISPATCH(attention_kernels).forward(params), "attention: out of memory");
  }

  static void backward(const BackwardParams& params, const Tensor&) {
    PTK_CHECK(PTK_DISPATCH(attention_kernels).backward(params), "attention: out of memory");
  }
};

}  // namespace

Float32Products allowed_float32_products(DType dtype) {
  if (dtype != DType::f32 || active_isa() < Isa::amx) {
    return Float32Products::exact;
  }
  switch (float32_precision()) {
  case Float32Precision::high:
    return Float32Products::three_bf16;
  case Float32Precision::medium:
    return Float32Products::one_bf16;
  case Float32Precision::highest:
    break;
  }
  return Float32Products::exact;
}

bool is_batch_invariant() {
  return batch_invariant;
}

const char* attention_kernel_name(const Problem& problem) {
  Problem asked = problem;
  asked.batch_invariant = is_batch_invariant();
  asked.float32_products = allowed_float32_products(asked.dtype);
  return PTK_DISPATCH(attention_kernels).describe(asked);
}

}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, "
              "float? scale=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? dropout_seed=None, "
              "int window_left=-1, int window_right=-1, bool bottom_right=False, float softcap=0.0, "
              "float dropout_p=0.0, Tensor? relative_bias=None, int mask_block_size=1) -> (Tensor, Tensor)");
  library.def("_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
              "Tensor out, Tensor lse, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
              "bool[] output_mask=[True, True, True], Tensor? alibi_slopes=None, Tensor? sinks=None, "
              "Tensor? dropout_seed=None, int window_left=-1, int window_right=-1, bool bottom_right=False, "
              "float softcap=0.0, float dropout_p=0.0, Tensor? relative_bias=None, int mask_block_size=1) "
              "-> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  library.def("_batch_invariant(bool wanted) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("attention", TORCH_BOX(&ptk::attention_forward<ptk::CpuBackend>));
  library.impl("_attention_backward", TORCH_BOX(&ptk::attention_backward<ptk::CpuBackend>));
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CompositeExplicitAutograd, library) {
  library.impl("_batch_invariant", TORCH_BOX(&ptk::set_batch_invariant));
}
