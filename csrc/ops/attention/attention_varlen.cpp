// Schema of attention over packed sequences and its CPU implementation: the kernels of attention, told where each
// sequence begins.
#include "csrc/ops/attention/attention_varlen_glue.h"

#include <torch/csrc/stable/library.h>

namespace ptk {
namespace {

struct CpuBackend {
  static constexpr const char* kDevice = "cpu";
  static constexpr bool kHasRelativeBias = true;

  static bool owns(const Tensor& tensor) { return tensor.is_cpu(); }

  static void forward(ForwardParams params, const Tensor&) {
    params.problem.batch_invariant = is_batch_invariant();
    params.problem.float32_products = allowed_float32_products(params.problem.dtype);
    PTK_CHECK(PTK_DISPATCH(attention_kernels).forward(params), "attention_varlen: out of memory");
  }

  static void backward(const BackwardParams& params, const Tensor&) {
    PTK_CHECK(PTK_DISPATCH(attention_kernels).backward(params), "attention_varlen: out of memory");
  }
};

}  // namespace
}  // namespace ptk

STABLE_TORCH_LIBRARY_FRAGMENT(ptkernels, library) {
  library.def("attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
              "int max_seqlen_q, int max_seqlen_k, bool is_causal=False, float? scale=None, Tensor? alibi_slopes=None, "
              "Tensor? sinks=None, Tensor? dropout_seed=None, int window_left=-1, int window_right=-1, "
              "bool bottom_right=False, float softcap=0.0, float dropout_p=0.0, Tensor? relative_bias=None) -> "
              "(Tensor, Tensor)");
  library.def("_attention_varlen_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
              "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
              "bool[] output_mask, bool is_causal=False, float? scale=None, Tensor? alibi_slopes=None, "
              "Tensor? sinks=None, Tensor? dropout_seed=None, int window_left=-1, int window_right=-1, "
              "bool bottom_right=False, float softcap=0.0, float dropout_p=0.0, Tensor? relative_bias=None) "
              "-> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
}

STABLE_TORCH_LIBRARY_IMPL(ptkernels, CPU, library) {
  library.impl("attention_varlen", TORCH_BOX(&ptk::varlen_forward<ptk::CpuBackend>));
  library.impl("_attention_varlen_backward", TORCH_BOX(&ptk::varlen_backward<ptk::CpuBackend>));
}
