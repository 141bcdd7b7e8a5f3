// ptkernels_selftest [level]: the CPU kernels without torch and Python, at the highest level this CPU has (or the given
// one), against plain loops in double. Small enough to run under an emulated CPU, where an instruction that the CPU
// lacks ends it with SIGILL.
#include "csrc/core/parallel.h"
#include "csrc/cpu/gemm/gemm_driver.h"
#include "csrc/cpu/isa.h"
#include "csrc/ops/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <vector>

namespace ptk {

void parallel_for(int64_t begin, int64_t end, void (*fn)(int64_t b, int64_t e, void* ctx), void* ctx) {
  if (begin < end) {
    fn(begin, end, ctx);
  }
}

int num_threads() {
  return 1;
}

namespace {

using Doubles = std::vector<double>;

// The values of a tensor in one of the kernels' dtypes, and back.
std::vector<char> encode(DType dtype, const Doubles& values) {
  const size_t size = element_size(dtype);
  std::vector<char> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const float single = static_cast<float>(values[i]);
    const _Float16 half = static_cast<_Float16>(single);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const uint16_t brain = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    const void* const forms[] = {&values[i], &single, &brain, &half};
    std::memcpy(&bytes[i * size], forms[static_cast<int>(dtype)], size);
  }
  return bytes;
}

Doubles decode(DType dtype, const std::vector<char>& bytes) {
  const size_t size = element_size(dtype);
  Doubles values(bytes.size() / size);
  for (size_t i = 0; i < values.size(); ++i) {
    double wide = 0;
    float single = 0;
    _Float16 half = 0;
    uint32_t bits = 0;
    switch (dtype) {
    case DType::f64:
      std::memcpy(&wide, &bytes[i * size], 8);
      break;
    case DType::f32:
      std::memcpy(&single, &bytes[i * size], 4);
      wide = single;
      break;
    case DType::bf16:
      std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes[i * size], 2);
      std::memcpy(&single, &bits, 4);
      wide = single;
      break;
    case DType::f16:
      std::memcpy(&half, &bytes[i * size], 2);
      wide = static_cast<float>(half);
      break;
    }
    values[i] = wide;
  }
  return values;
}

int failures = 0;

void expect_close(const char* what, DType dtype, const Doubles& got, const Doubles& expected) {
  constexpr double tolerances[] = {1e-12, 1e-5, 3e-2, 4e-3};
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - expected[i]) / (1 + std::abs(expected[i]));
    worst = std::isnan(error) ? HUGE_VAL : std::max(worst, error);
  }
  const bool ok = worst <= tolerances[static_cast<int>(dtype)];
  failures += !ok;
  std::printf("%s %-22s %-9s error %.1e\n", ok ? "ok  " : "FAIL", what, dtype_name(dtype), worst);
}

Doubles random_values(std::mt19937& random, int64_t count) {
  Doubles values(count);
  for (double& value : values) {
    // Of few bits, so that every dtype holds them exactly and rounding of the inputs is no part of the errors.
    value = (static_cast<int>(random() % 33) - 16) / 16.0;
  }
  return values;
}

// Odd sizes, so that every kernel meets its tails; causal, grouped heads, unequal lengths and head dims.
Problem odd_problem(DType dtype) {
  Problem p;
  p.dtype = dtype;
  p.batch = 1;
  p.heads_q = 4;
  p.heads_kv = 2;
  p.len_q = 67;
  p.len_k = 83;
  p.dim_qk = 40;
  p.dim_v = 24;
  p.scale = 0.125;
  p.is_causal = true;
  return p;
}

struct Results {
  Doubles out, lse, grad_query, grad_key, grad_value;
};

Results reference(const Problem& p, const Doubles& q, const Doubles& k, const Doubles& v, const Doubles& g) {
  Results r{Doubles(p.heads_q * p.len_q * p.dim_v), Doubles(p.heads_q * p.len_q), Doubles(q.size()), Doubles(k.size()),
            Doubles(v.size())};
  for (int64_t row = 0; row < p.heads_q * p.len_q; ++row) {
    const int64_t head = row / p.len_q / (p.heads_q / p.heads_kv);
    const int64_t keys = std::min(p.len_k, row % p.len_q + 1);
    Doubles prob(keys);
    Doubles grad_prob(keys);
    double sum = 0;
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t d = 0; d < p.dim_qk; ++d) {
        prob[j] += p.scale * q[row * p.dim_qk + d] * k[(head * p.len_k + j) * p.dim_qk + d];
      }
      prob[j] = std::exp(prob[j]);
      sum += prob[j];
    }
    r.lse[row] = std::log(sum);
    double dot = 0;
    for (int64_t j = 0; j < keys; ++j) {
      prob[j] /= sum;
      for (int64_t d = 0; d < p.dim_v; ++d) {
        const int64_t at = (head * p.len_k + j) * p.dim_v + d;
        r.out[row * p.dim_v + d] += prob[j] * v[at];
        r.grad_value[at] += prob[j] * g[row * p.dim_v + d];
        grad_prob[j] += g[row * p.dim_v + d] * v[at];
      }
      dot += prob[j] * grad_prob[j];
    }
    for (int64_t j = 0; j < keys; ++j) {
      const double grad_score = p.scale * prob[j] * (grad_prob[j] - dot);
      for (int64_t d = 0; d < p.dim_qk; ++d) {
        r.grad_query[row * p.dim_qk + d] += grad_score * k[(head * p.len_k + j) * p.dim_qk + d];
        r.grad_key[(head * p.len_k + j) * p.dim_qk + d] += grad_score * q[row * p.dim_qk + d];
      }
    }
  }
  return r;
}

template <class AnyView, class Pointer>
AnyView contiguous(Pointer data, int64_t heads, int64_t length, int64_t dim) {
  return {data, {heads * length * dim, length * dim, dim, 1}};
}

void test_attention(DType dtype) {
  const Problem p = odd_problem(dtype);
  const DType lse_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
  std::mt19937 random(1);
  const Doubles q = random_values(random, p.heads_q * p.len_q * p.dim_qk);
  const Doubles k = random_values(random, p.heads_kv * p.len_k * p.dim_qk);
  const Doubles v = random_values(random, p.heads_kv * p.len_k * p.dim_v);
  const Doubles g = random_values(random, p.heads_q * p.len_q * p.dim_v);
  const Results expected = reference(p, q, k, v, g);

  const auto query = encode(dtype, q);
  const auto key = encode(dtype, k);
  const auto value = encode(dtype, v);
  const auto grad_out = encode(dtype, g);
  std::vector<char> out(grad_out.size(), '\xff');
  std::vector<char> lse(p.heads_q * p.len_q * element_size(lse_dtype), '\xff');
  std::vector<char> grad_query(query.size(), '\xff');
  std::vector<char> grad_key(key.size(), '\xff');
  std::vector<char> grad_value(value.size(), '\xff');

  ForwardParams f;
  f.problem = p;
  f.query = contiguous<ConstView>(query.data(), p.heads_q, p.len_q, p.dim_qk);
  f.key = contiguous<ConstView>(key.data(), p.heads_kv, p.len_k, p.dim_qk);
  f.value = contiguous<ConstView>(value.data(), p.heads_kv, p.len_k, p.dim_v);
  f.out = contiguous<View>(out.data(), p.heads_q, p.len_q, p.dim_v);
  f.lse = lse.data();
  failures += !PTK_DISPATCH(attention_kernels).forward(f);

  BackwardParams b;
  b.problem = p;
  b.grad_out = contiguous<ConstView>(grad_out.data(), p.heads_q, p.len_q, p.dim_v);
  b.query = f.query;
  b.key = f.key;
  b.value = f.value;
  b.out = contiguous<ConstView>(out.data(), p.heads_q, p.len_q, p.dim_v);
  b.lse = lse.data();
  b.grad_query = contiguous<View>(grad_query.data(), p.heads_q, p.len_q, p.dim_qk);
  b.grad_key = contiguous<View>(grad_key.data(), p.heads_kv, p.len_k, p.dim_qk);
  b.grad_value = contiguous<View>(grad_value.data(), p.heads_kv, p.len_k, p.dim_v);
  failures += !PTK_DISPATCH(attention_kernels).backward(b);

  expect_close("attention out", dtype, decode(dtype, out), expected.out);
  expect_close("attention lse", dtype, decode(lse_dtype, lse), expected.lse);
  expect_close("attention grad_query", dtype, decode(dtype, grad_query), expected.grad_query);
  expect_close("attention grad_key", dtype, decode(dtype, grad_key), expected.grad_key);
  expect_close("attention grad_value", dtype, decode(dtype, grad_value), expected.grad_value);
}

void test_gemm(DType dtype) {
  constexpr int64_t m = 37, n = 45, k = 51;
  std::mt19937 random(2);
  const Doubles a = random_values(random, m * k);
  const Doubles b = random_values(random, k * n);
  Doubles expected(m * n);
  for (int64_t i = 0; i < m * n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      expected[i] += a[i / n * k + j] * b[j * n + i % n];
    }
  }
  const auto a_bytes = encode(dtype, a);
  const auto b_bytes = encode(dtype, b);
  std::vector<char> c(m * n * element_size(dtype), '\xff');
  GemmProblem p{};
  p.type = static_cast<GemmType>(dtype);
  p.reduce = 1;
  p.m = m;
  p.n = n;
  p.k = k;
  p.a = a_bytes.data();
  p.b = b_bytes.data();
  p.c = c.data();
  const int64_t stride_a[] = {m * k, k, 1};
  const int64_t stride_b[] = {k * n, n, 1};
  std::ranges::copy(stride_a, p.stride_a);
  std::ranges::copy(stride_b, p.stride_b);
  failures += !PTK_DISPATCH(gemm_kernels).gemm(p);
  expect_close("gemm", dtype, decode(dtype, c), expected);
}

void test_gemm_s8() {
  constexpr int64_t m = 37, n = 45, k = 51;
  std::vector<int8_t> a(m * k);
  std::vector<int8_t> b(k * n);
  std::vector<int32_t> c(m * n, -1);
  std::mt19937 random(3);
  std::ranges::generate(a, [&] { return static_cast<int8_t>(random()); });
  std::ranges::generate(b, [&] { return static_cast<int8_t>(random()); });
  GemmProblem p{GemmType::s8, 1, m, n, k, a.data(), {m * k, k, 1}, b.data(), {k * n, n, 1}, nullptr, false, c.data()};
  bool ok = PTK_DISPATCH(gemm_kernels).gemm(p);
  for (int64_t i = 0; i < m * n; ++i) {
    int32_t sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      sum += a[i / n * k + j] * b[j * n + i % n];
    }
    ok = ok && c[i] == sum;
  }
  failures += !ok;
  std::printf("%s %-22s int8\n", ok ? "ok  " : "FAIL", "gemm");
}

}  // namespace
}  // namespace ptk

int main(int argc, char** argv) {
  try {
    if (argc > 1) {
      ptk::set_max_isa(argv[1]);
    }
    std::printf("detected %s, running %s%s; %s\n", ptk::isa_name(ptk::detected_isa()), ptk::isa_name(ptk::active_isa()),
                ptk::emulated_isa() ? " (emulated)" : "", ptk::cpu_features());
    for (const ptk::DType dtype : {ptk::DType::f64, ptk::DType::f32, ptk::DType::bf16, ptk::DType::f16}) {
      ptk::test_attention(dtype);
      ptk::test_gemm(dtype);
    }
    ptk::test_gemm_s8();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  std::printf("%s\n", ptk::failures ? "failed" : "passed");
  return ptk::failures != 0;
}
