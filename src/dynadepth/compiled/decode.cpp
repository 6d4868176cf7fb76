// What a decode step does with few rows, accumulated in float32.
//
// Linear layers: y[m, n] = sum_k x[m, k] * w[n, k] (+ bias[n]).
// A decode step reads every weight once for one row (or a few), so memory is the limit; libraries made for large
// matrices first rearrange the weight, which costs more than the product. Here weights are read as they lie.
// Weights are float32, bfloat16, or int8 with one scale a row; x and y have one floating type.
//
// Linear skip paths: one token of `LinearPath` in one call, in place of a score of small ones.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>
#if !defined(_OPENMP) && !defined(ONE_THREAD)
#error "OpenMP is off: at::parallel_for would run on one thread"
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

namespace {

// Weight rows at a time for M rows of x: enough independent sums, and not more than there are registers.
template <int M>
constexpr int TILE = M > 4 ? 2 : 4;

inline float widen(float v) { return v; }
inline float widen(int8_t v) { return v; }
inline float widen(at::BFloat16 v) { return static_cast<float>(v); }

#ifdef WIDE
inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const at::BFloat16* p) {
  auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m512 load16(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#endif

// Adds the columns from k on, one by one.
template <int R, int M, typename W, typename X>
void finish(const W* w, const X* x, int64_t k, int64_t K, float (*sums)[M]) {
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = k; i < K; ++i) sum += widen(w[r * K + i]) * widen(x[m * K + i]);
      sums[r][m] += sum;
    }
}

#ifdef __AVX512BF16__
// The same of bfloat16 rows, whose products the machine adds in pairs.
template <int R, int M>
int64_t tile_pairs(const at::BFloat16* w, const at::BFloat16* x, int64_t K, float (*sums)[M]) {
  __m512 acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 <= K; k += 32) {
    __m512bh row[M];
    for (int m = 0; m < M; ++m) row[m] = (__m512bh)_mm512_loadu_si512(x + m * K + k);
    for (int r = 0; r < R; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(w + (r + R) * K + k), _MM_HINT_T0);
      const __m512bh weight = (__m512bh)_mm512_loadu_si512(w + r * K + k);
      for (int m = 0; m < M; ++m) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], weight, row[m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = _mm512_reduce_add_ps(acc[r][m]);
  return k;
}
#endif

// sums[r][m] = sum_k w[r][k] * x[m][k] for R rows of the weight and M of x.
template <int R, int M, typename W, typename X>
void tile(const W* w, const X* x, int64_t K, float (*sums)[M]) {
  int64_t k = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<W, at::BFloat16> && std::is_same_v<X, at::BFloat16>) {
    k = tile_pairs<R, M>(w, x, K, sums);
    finish<R, M>(w, x, k, K, sums);
    return;
  }
#endif
#ifdef WIDE
  __m512 acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  constexpr int64_t line = 64 / sizeof(W);
  for (; k + 16 <= K; k += 16) {
    __m512 row[M];
    for (int m = 0; m < M; ++m) row[m] = load16(x + m * K + k);
    for (int r = 0; r < R; ++r) {
      if (k % line == 0) _mm_prefetch(reinterpret_cast<const char*>(w + (r + R) * K + k), _MM_HINT_T0);
      const __m512 weight = load16(w + r * K + k);
      for (int m = 0; m < M; ++m) acc[r][m] = _mm512_fmadd_ps(weight, row[m], acc[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = _mm512_reduce_add_ps(acc[r][m]);
#else
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = 0;
#endif
  finish<R, M>(w, x, k, K, sums);
}

template <int M, typename W, typename X, typename T>
void rows(const W* w, const X* x, const float* scale, const T* bias, T* y, int64_t N, int64_t K, int64_t begin,
          int64_t end) {
  auto put = [&](int64_t n, int m, float sum) {
    if (scale) sum *= scale[n];
    if (bias) sum += static_cast<float>(bias[n]);
    y[m * N + n] = static_cast<T>(sum);
  };
  int64_t n = begin;
  for (; n + TILE<M> <= end; n += TILE<M>) {
    float sums[TILE<M>][M];
    tile<TILE<M>, M>(w + n * K, x, K, sums);
    for (int r = 0; r < TILE<M>; ++r)
      for (int m = 0; m < M; ++m) put(n + r, m, sums[r][m]);
  }
  for (; n < end; ++n) {
    float sums[1][M];
    tile<1, M>(w + n * K, x, K, sums);
    for (int m = 0; m < M; ++m) put(n, m, sums[0][m]);
  }
}

template <typename W, typename T>
void run(const at::Tensor& x, const at::Tensor& w, const float* scale, const T* bias, at::Tensor& y, int64_t M) {
  const int64_t N = w.size(0), K = w.size(1);
  const at::Tensor whole = x.contiguous();
  const T* in = whole.const_data_ptr<T>();
  const W* weight = w.const_data_ptr<W>();
  T* out = y.data_ptr<T>();
  at::parallel_for(0, N, std::max<int64_t>(4, 65536 / K), [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < M; m += 8) {
      auto part = [&]<int R>() { rows<R>(weight, in + m * K, scale, bias, out + m * N, N, K, begin, end); };
      switch (std::min<int64_t>(M - m, 8)) {
        case 1: part.template operator()<1>(); break;
        case 2: part.template operator()<2>(); break;
        case 3: part.template operator()<3>(); break;
        case 4: part.template operator()<4>(); break;
        case 5: part.template operator()<5>(); break;
        case 6: part.template operator()<6>(); break;
        case 7: part.template operator()<7>(); break;
        case 8: part.template operator()<8>(); break;
      }
    }
  });
}

template <typename T>
void by_weight(const at::Tensor& x, const at::Tensor& w, const float* scale, const T* bias, at::Tensor& y, int64_t M) {
  if (w.scalar_type() == at::kFloat) return run<float, T>(x, w, scale, bias, y, M);
  if (w.scalar_type() == at::kBFloat16) return run<at::BFloat16, T>(x, w, scale, bias, y, M);
  TORCH_CHECK(w.scalar_type() == at::kChar, "weight of type ", w.scalar_type());
  run<int8_t, T>(x, w, scale, bias, y, M);
}

// x [..., K], w [N, K] contiguous, scale float32 [N] or none, bias [N] of x's type or none: [..., N] of x's type.
at::Tensor small_linear(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& scale,
                        const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(w.dim() == 2 && w.is_contiguous() && x.size(-1) == w.size(1), "weight must be contiguous [N, K]");
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  at::Tensor y = at::empty(sizes, x.options());
  const int64_t M = x.numel() / w.size(1);
  const float* s = scale ? scale->const_data_ptr<float>() : nullptr;
  if (x.scalar_type() == at::kFloat) {
    by_weight<float>(x, w, s, bias ? bias->const_data_ptr<float>() : nullptr, y, M);
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "input of type ", x.scalar_type());
    by_weight<at::BFloat16>(x, w, s, bias ? bias->const_data_ptr<at::BFloat16>() : nullptr, y, M);
  }
  return y;
}

// sums[n] = sum_k x[k] * w[k, n], w [K, N].
template <typename T>
void columns(const float* x, const T* w, int64_t K, int64_t N, float* sums) {
  constexpr int64_t BLOCK = 64;
  for (int64_t n = 0; n < N; n += BLOCK) {
    const int64_t width = std::min(BLOCK, N - n);
    float acc[BLOCK] = {};
    if (width == BLOCK) {
      for (int64_t k = 0; k < K; ++k)
#pragma omp simd
        for (int64_t j = 0; j < BLOCK; ++j) acc[j] += x[k] * widen(w[k * N + n + j]);
    } else {
      for (int64_t k = 0; k < K; ++k)
        for (int64_t j = 0; j < width; ++j) acc[j] += x[k] * widen(w[k * N + n + j]);
    }
    std::copy(acc, acc + width, sums + n);
  }
}

template <typename T>
float rounded(float v) { return static_cast<float>(static_cast<T>(v)); }

template <typename T>
void path_rows(const at::Tensor& x, const at::Tensor& read, const at::Tensor& write, const at::Tensor& bias,
               const at::Tensor& last, const at::Tensor& total, const at::Tensor& count, at::Tensor& y,
               at::Tensor& new_last, at::Tensor& new_total, at::Tensor& new_count) {
  const int64_t D = read.size(0), r = write.size(0);
  const at::Tensor whole = x.contiguous();
  auto one = [&](int64_t row) {
    std::vector<float> state(D), features(3 * r), mixed(r), output(D);
    const T* in = whole.const_data_ptr<T>() + row * D;
    std::transform(in, in + D, state.begin(), [](T v) { return widen(v); });
    columns(state.data(), read.const_data_ptr<T>(), D, 3 * r, features.data());
    const float seen = count.const_data_ptr<float>()[row] + 1;
    for (int64_t j = 0; j < r; ++j) {  // each sum is rounded where the same in tensors is
      const float before = static_cast<float>(last.const_data_ptr<T>()[row * r + j]);
      const float sum = total.const_data_ptr<float>()[row * r + j] + rounded<T>(features[2 * r + j]);
      mixed[j] = rounded<T>(rounded<T>(rounded<T>(features[j]) + before) + rounded<T>(sum / seen));
      new_last.data_ptr<T>()[row * r + j] = static_cast<T>(features[r + j]);
      new_total.data_ptr<float>()[row * r + j] = sum;
    }
    new_count.data_ptr<float>()[row] = seen;
    columns(mixed.data(), write.const_data_ptr<T>(), r, D, output.data());
    for (int64_t d = 0; d < D; ++d)
      y.data_ptr<T>()[row * D + d] = static_cast<T>(rounded<T>(output[d]) + widen(bias.const_data_ptr<T>()[d]));
  };
  at::parallel_for(0, count.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) one(row);
  });
}

// x [n, 1, D]; read [D, 3r], write [r, D], bias [D] of x's type; memory: last [n, r] of x's type, total [n, r] and
// count [n] float32. The contribution [n, 1, D] and the memory after it.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> path_step(
    const at::Tensor& x, const at::Tensor& read, const at::Tensor& write, const at::Tensor& bias,
    const at::Tensor& last, const at::Tensor& total, const at::Tensor& count) {
  const int64_t n = x.size(0), D = x.size(-1), r = write.size(0);
  TORCH_CHECK(x.dim() == 3 && x.size(1) == 1 && read.sizes() == at::IntArrayRef({D, 3 * r}) &&
                  write.sizes() == at::IntArrayRef({r, D}) && bias.sizes() == at::IntArrayRef({D}) &&
                  last.sizes() == at::IntArrayRef({n, r}) && total.sizes() == last.sizes() &&
                  count.sizes() == at::IntArrayRef({n}),
              "one token a row, and parts of a path and a memory of its sizes expected");
  for (const at::Tensor* t : {&read, &write, &bias, &last})
    TORCH_CHECK(t->is_contiguous() && t->scalar_type() == x.scalar_type(), "contiguous parts of one type expected");
  for (const at::Tensor* t : {&total, &count})
    TORCH_CHECK(t->is_contiguous() && t->scalar_type() == at::kFloat, "contiguous float32 sums expected");
  at::Tensor y = at::empty(x.sizes(), x.options());
  at::Tensor new_last = at::empty_like(last), new_total = at::empty_like(total), new_count = at::empty_like(count);
  if (x.scalar_type() == at::kFloat) {
    path_rows<float>(x, read, write, bias, last, total, count, y, new_last, new_total, new_count);
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "input of type ", x.scalar_type());
    path_rows<at::BFloat16>(x, read, write, bias, last, total, count, y, new_last, new_total, new_count);
  }
  return {y, new_last, new_total, new_count};
}

}  // namespace

TORCH_LIBRARY(dynadepth, library) {
  library.def("small_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
  library.impl("small_linear", c10::DispatchKey::CPU, &small_linear);
  library.def(
      "path_step(Tensor x, Tensor read, Tensor write, Tensor bias, Tensor last, Tensor total, Tensor count) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  library.impl("path_step", c10::DispatchKey::CPU, &path_step);
}
