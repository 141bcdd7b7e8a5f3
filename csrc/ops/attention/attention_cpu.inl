// Scalar attention: correct for every dtype, stride and mask, one query row at a time, accumulating in double.
#include "csrc/core/parallel.h"
#include "csrc/ops/attention/attention.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace ptk::PTK_ISA {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double load(DType dtype, const void* base, int64_t i) {
  switch (dtype) {
  case DType::f64:
    return static_cast<const double*>(base)[i];
  case DType::f32:
    return static_cast<const float*>(base)[i];
  case DType::bf16: {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(base)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  case DType::f16:
    return static_cast<double>(static_cast<const _Float16*>(base)[i]);
  }
  return 0;
}

void store(DType dtype, void* base, int64_t i, double value) {
  switch (dtype) {
  case DType::f64:
    static_cast<double*>(base)[i] = value;
    return;
  case DType::f32:
    static_cast<float*>(base)[i] = static_cast<float>(value);
    return;
  case DType::bf16: {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    const uint32_t rounded = std::isnan(narrow) ? 0x7fc00000u : bits + 0x7fff + ((bits >> 16) & 1);
    static_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(rounded >> 16);
    return;
  }
  case DType::f16:
    static_cast<_Float16*>(base)[i] = static_cast<_Float16>(value);
    return;
  }
}

int64_t offset(const int64_t* strides, int64_t b, int64_t h, int64_t i, int64_t d = 0) {
  return b * strides[0] + h * strides[1] + i * strides[2] + d * strides[3];
}

struct Row {
  int64_t b, h, hk, i;
};

Row row_of(const Problem& p, int64_t index) {
  const int64_t h = index / p.len_q % p.heads_q;
  return {index / p.len_q / p.heads_q, h, h / (p.heads_q / p.heads_kv), index % p.len_q};
}

double score(const Problem& p, const ConstView& query, const ConstView& key, const Row& r, int64_t j) {
  if (p.is_causal && j > r.i) {
    return -kInf;
  }
  double bias = 0;
  if (p.mask_kind != MaskKind::none) {
    const int64_t at = offset(p.mask.strides, r.b, r.h, r.i, j);
    if (p.mask_kind == MaskKind::boolean) {
      bias = static_cast<const uint8_t*>(p.mask.data)[at] ? 0 : -kInf;
    } else {
      bias = load(p.mask_kind == MaskKind::f32 ? DType::f32 : p.dtype, p.mask.data, at);
    }
  }
  if (bias == -kInf) {
    return bias;
  }
  double dot = 0;
  for (int64_t d = 0; d < p.dim_qk; ++d) {
    dot += load(p.dtype, query.data, offset(query.strides, r.b, r.h, r.i, d)) *
           load(p.dtype, key.data, offset(key.strides, r.b, r.hk, j, d));
  }
  return dot * p.scale + bias;
}

void forward(const ForwardParams& params) {
  const Problem& p = params.problem;
  const DType lse_type = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  parallel_for(0, p.batch * p.heads_q * p.len_q, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Row r = row_of(p, index);
      double peak = -kInf;
      double sum = 0;
      double acc[512] = {};
      for (int64_t j = 0; j < p.len_k; ++j) {
        const double s = score(p, params.query, params.key, r, j);
        if (s == -kInf) {
          continue;
        }
        const double new_peak = s > peak || std::isnan(s) ? s : peak;
        const double shrink = std::exp(peak - new_peak);
        const double weight = std::exp(s - new_peak);
        sum = sum * shrink + weight;
        for (int64_t d = 0; d < p.dim_v; ++d) {
          acc[d] = acc[d] * shrink + weight * load(p.dtype, params.value.data,
                                                   offset(params.value.strides, r.b, r.hk, j, d));
        }
        peak = new_peak;
      }
      for (int64_t d = 0; d < p.dim_v; ++d) {
        store(p.dtype, params.out.data, offset(params.out.strides, r.b, r.h, r.i, d), sum == 0 ? 0 : acc[d] / sum);
      }
      store(lse_type, params.lse, index, sum == 0 ? -kInf : peak + std::log(sum));
    }
  });
}

struct Pair {
  double prob;
  double grad_score;
};

Pair pair_at(const BackwardParams& params, const Row& r, int64_t j) {
  const Problem& p = params.problem;
  const DType lse_type = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t index = (r.b * p.heads_q + r.h) * p.len_q + r.i;
  const double s = score(p, params.query, params.key, r, j);
  if (s == -kInf) {
    return {0, 0};
  }
  double grad_prob = params.grad_lse ? load(lse_type, params.grad_lse, index) : 0;
  for (int64_t d = 0; d < p.dim_v; ++d) {
    const double g = load(p.dtype, params.grad_out.data, offset(params.grad_out.strides, r.b, r.h, r.i, d));
    grad_prob += g * (load(p.dtype, params.value.data, offset(params.value.strides, r.b, r.hk, j, d)) -
                      load(p.dtype, params.out.data, offset(params.out.strides, r.b, r.h, r.i, d)));
  }
  const double prob = std::exp(s - load(lse_type, params.lse, index));
  return {prob, prob * grad_prob};
}

void grad_query_row(const BackwardParams& params, int64_t index) {
  const Problem& p = params.problem;
  const Row r = row_of(p, index);
  double acc[512] = {};
  for (int64_t j = 0; j < p.len_k; ++j) {
    const double g = pair_at(params, r, j).grad_score * p.scale;
    for (int64_t d = 0; d < p.dim_qk; ++d) {
      acc[d] += g * load(p.dtype, params.key.data, offset(params.key.strides, r.b, r.hk, j, d));
    }
  }
  for (int64_t d = 0; d < p.dim_qk; ++d) {
    store(p.dtype, params.grad_query.data, offset(params.grad_query.strides, r.b, r.h, r.i, d), acc[d]);
  }
}

void grad_key_value_row(const BackwardParams& params, int64_t index) {
  const Problem& p = params.problem;
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t j = index % p.len_k;
  const int64_t hk = index / p.len_k % p.heads_kv;
  const int64_t b = index / p.len_k / p.heads_kv;
  double acc_key[512] = {};
  double acc_value[512] = {};
  for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
    for (int64_t i = 0; i < p.len_q; ++i) {
      const Pair pair = pair_at(params, {b, h, hk, i}, j);
      for (int64_t d = 0; d < p.dim_qk; ++d) {
        acc_key[d] +=
            pair.grad_score * p.scale * load(p.dtype, params.query.data, offset(params.query.strides, b, h, i, d));
      }
      for (int64_t d = 0; d < p.dim_v; ++d) {
        acc_value[d] += pair.prob * load(p.dtype, params.grad_out.data, offset(params.grad_out.strides, b, h, i, d));
      }
    }
  }
  for (int64_t d = 0; params.grad_key.data && d < p.dim_qk; ++d) {
    store(p.dtype, params.grad_key.data, offset(params.grad_key.strides, b, hk, j, d), acc_key[d]);
  }
  for (int64_t d = 0; params.grad_value.data && d < p.dim_v; ++d) {
    store(p.dtype, params.grad_value.data, offset(params.grad_value.strides, b, hk, j, d), acc_value[d]);
  }
}

void backward(const BackwardParams& params) {
  const Problem& p = params.problem;
  if (params.grad_query.data) {
    parallel_for(0, p.batch * p.heads_q * p.len_q, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        grad_query_row(params, index);
      }
    });
  }
  if (params.grad_key.data || params.grad_value.data) {
    parallel_for(0, p.batch * p.heads_kv * p.len_k, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        grad_key_value_row(params, index);
      }
    });
  }
}

const char* describe(const Problem&) {
  return "scalar";
}

}  // namespace

const AttentionKernels& attention_kernels() {
  static constexpr AttentionKernels kernels{forward, backward, describe};
  return kernels;
}

}  // namespace ptk::PTK_ISA
