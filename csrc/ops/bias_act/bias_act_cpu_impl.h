// bias_act, compiled once per instruction set.
#pragma once
#include "../../core/vec_math.h"
#include "bias_act_cpu.h"

namespace genfast {
namespace {

template <class T>
Curve<T> narrowed(const Curve<double>& c) {
  return {c.act, c.order, c.clamped, static_cast<T>(c.alpha), static_cast<T>(c.gain), static_cast<T>(c.clamp)};
}

template <class T, class S>
struct BiasActPointers {
  const S* x;
  const S* factor;
  S* out;
};

// The vector at element i, with the bias b; returns what is stored, before rounding.
template <class T, class S>
GF_INLINE Vec<T> bias_act_vector(const Curve<T>& curve, const BiasActPointers<T, S>& at, int64_t i, Vec<T> b) {
  Vec<T> v = curve_of<T>(curve, load<T>(at.x + i) + b);
  if (at.factor) v = times_slope(load<T>(at.factor + i), v);
  store(at.out + i, v);
  return v;
}

// The last n < kCount<T> elements; lanes beyond them return 0.
template <class T, class S>
__attribute__((noinline)) Vec<T> bias_act_tail(const Curve<T>& curve, const BiasActPointers<T, S>& at, int64_t i, int64_t n, Vec<T> b) {
  S x[kCount<T>]{}, factor[kCount<T>]{}, out[kCount<T>];
  const size_t bytes = static_cast<size_t>(n) * sizeof(S);
  __builtin_memcpy(x, at.x + i, bytes);
  if (at.factor) __builtin_memcpy(factor, at.factor + i, bytes);
  Vec<T> v = bias_act_vector<T, S>(curve, {x, at.factor ? factor : nullptr, out}, 0, b);
  __builtin_memcpy(at.out + i, out, bytes);
  for (int64_t k = n; k < kCount<T>; ++k) v[k] = T(0);
  return v;
}

template <class T, class S>
void long_rows_of(const BiasActTask& t, int64_t first, int64_t last) {
  constexpr int kWidth = kCount<T>, kUnrolled = 4;
  const BiasActParams& p = t.p;
  const Curve<T> curve = narrowed<T>(p.curve);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t row = unit / t.chunks, begin = unit % t.chunks * kBiasActChunk;
    const int64_t n = p.inner - begin < kBiasActChunk ? p.inner - begin : kBiasActChunk, offset = row * p.inner + begin;
    const BiasActPointers<T, S> at{static_cast<const S*>(p.x) + offset, p.factor ? static_cast<const S*>(p.factor) + offset : nullptr,
                                   static_cast<S*>(p.out) + offset};
    Vec<T> b{};
    if (p.b) {
      S same[kWidth];
      for (S& s : same) s = static_cast<const S*>(p.b)[row % p.channels];
      b = load<T>(same);
    }
    Vec<T> sum[kUnrolled]{};
    int64_t i = 0;
    for (; i + kUnrolled * kWidth <= n; i += kUnrolled * kWidth)
      unroll<kUnrolled>([&]<int k>() __attribute__((always_inline)) { sum[k] += bias_act_vector(curve, at, i + k * kWidth, b); });
    for (; i + kWidth <= n; i += kWidth) sum[0] += bias_act_vector(curve, at, i, b);
    if (i < n && n >= kWidth) {  // the last vector overlaps the one before, with the same results
      sum[1] += last_lanes<T>(bias_act_vector(curve, at, n - kWidth, b), n - i);
    } else if (i < n) {
      sum[1] += bias_act_tail(curve, at, i, n - i, b);
    }
    if (!t.partial) continue;
    static_cast<T*>(t.partial)[unit] = total<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

template <class T, class S>
void short_rows_of(const BiasActTask& t, int64_t first, int64_t last) {
  constexpr int kWidth = kCount<T>, kUnrolled = 4;
  const BiasActParams& p = t.p;
  const Curve<T> curve = narrowed<T>(p.curve);
  const BiasActPointers<T, S> at{static_cast<const S*>(p.x), static_cast<const S*>(p.factor), static_cast<S*>(p.out)};
  const int64_t total = p.outer * p.channels * p.inner;
  const T* bias = static_cast<const T*>(t.bias);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t begin = unit * t.block, end = total - begin < t.block ? total : begin + t.block;
    T* sums = t.partial ? static_cast<T*>(t.partial) + unit * t.repeat : nullptr;
    if (sums) __builtin_memset(sums, 0, static_cast<size_t>(t.repeat) * sizeof(T));
    for (int64_t start = begin; start < end; start += t.repeat) {
      const int64_t n = end - start < t.repeat ? end - start : t.repeat;
      const auto vector = [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> v = bias_act_vector(curve, at, start + i, bias ? load<T>(bias + i) : Vec<T>{});
        if (sums) store(sums + i, load<T>(sums + i) + v);
      };
      int64_t i = 0;
      for (; i + kUnrolled * kWidth <= n; i += kUnrolled * kWidth)
        unroll<kUnrolled>([&]<int k>() __attribute__((always_inline)) { vector(i + k * kWidth); });
      for (; i + kWidth <= n; i += kWidth) vector(i);
      if (i == n) continue;
      const Vec<T> v = bias_act_tail(curve, at, start + i, n - i, bias ? load<T>(bias + i) : Vec<T>{});
      if (sums) store(sums + i, load<T>(sums + i) + v);
    }
  }
}

void long_rows(const BiasActTask& t, int64_t first, int64_t last) {
  switch (t.p.dtype) {
    case DType::F32:
      return long_rows_of<float, float>(t, first, last);
    case DType::F64:
      return long_rows_of<double, double>(t, first, last);
    case DType::BF16:
      return long_rows_of<float, BFloat16>(t, first, last);
    case DType::F16:
      return long_rows_of<float, Float16>(t, first, last);
  }
}

void short_rows(const BiasActTask& t, int64_t first, int64_t last) {
  switch (t.p.dtype) {
    case DType::F32:
      return short_rows_of<float, float>(t, first, last);
    case DType::F64:
      return short_rows_of<double, double>(t, first, last);
    case DType::BF16:
      return short_rows_of<float, BFloat16>(t, first, last);
    case DType::F16:
      return short_rows_of<float, Float16>(t, first, last);
  }
}

}  // namespace
}  // namespace genfast
