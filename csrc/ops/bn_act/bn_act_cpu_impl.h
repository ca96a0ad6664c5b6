// bn_act, compiled once per instruction set.
#pragma once
#include "../../core/vec_math.h"
#include "bn_act_cpu.h"

namespace genfast {
namespace {

template <class T>
struct BnCoefficients {
  Vec<T> at[kBnCoefficients];
};
template <class T>
struct BnSums {
  Vec<T> a{}, b{};
};
template <class S>
struct BnPointers {
  const S *x, *dy;
  S* out;
};

// The vector at element i.
template <class T, BnPass kPass, class S>
GF_INLINE BnSums<T> bn_vector(const Curve<T>& curve, const BnCoefficients<T>& c, const BnPointers<S>& at, int64_t i) {
  const Vec<T> v = load<T>(at.x + i) - c.at[kCenter];
  if constexpr (kPass == BnPass::Moments) return {v, v * v};
  const Vec<T> u = fma(c.at[kScale], v, c.at[kShift]);
  if constexpr (kPass == BnPass::Apply) {
    store(at.out + i, curve_of<T>(curve, u));
    return {};
  }
  const Vec<T> g = times_slope(load<T>(at.dy + i), curve_of<T>(curve, u));
  if constexpr (kPass == BnPass::Sums) return {g, g * v};
  if constexpr (kPass == BnPass::Backward) store(at.out + i, fma(c.at[kP], g, fma(c.at[kQ], v, c.at[kR])));
  return {};
}

// The last n < kCount<T> elements; lanes beyond them return 0.
template <class T, BnPass kPass, class S>
__attribute__((noinline)) BnSums<T> bn_tail(const Curve<T>& curve, const BnCoefficients<T>& c, const BnPointers<S>& at, int64_t i,
                                            int64_t n) {
  S x[kCount<T>]{}, dy[kCount<T>]{}, out[kCount<T>];
  const size_t bytes = static_cast<size_t>(n) * sizeof(S);
  __builtin_memcpy(x, at.x + i, bytes);
  if (at.dy) __builtin_memcpy(dy, at.dy + i, bytes);
  BnSums<T> s = bn_vector<T, kPass, S>(curve, c, {x, dy, out}, 0);
  if (kPass == BnPass::Apply || kPass == BnPass::Backward) __builtin_memcpy(at.out + i, out, bytes);
  for (int64_t k = n; k < kCount<T>; ++k) s.a[k] = s.b[k] = T(0);
  return s;
}

template <class T>
Curve<T> bn_curve(const BnActParams& p) {
  const int order = p.pass == BnPass::Apply ? 0 : 1;
  return {p.curve.act, order, false, static_cast<T>(p.curve.alpha), T(1), T(0)};
}

template <class T, BnPass kPass, class S>
void long_rows_of(const BnActTask& t, int64_t first, int64_t last) {
  constexpr int kWidth = kCount<T>, kUnrolled = 2;
  const BnActParams& p = t.p;
  const Curve<T> curve = bn_curve<T>(p);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t row = unit / t.chunks, begin = unit % t.chunks * kBnChunk;
    const int64_t n = p.inner - begin < kBnChunk ? p.inner - begin : kBnChunk, offset = row * p.inner + begin;
    const BnPointers<S> at{static_cast<const S*>(p.x) + offset, p.dy ? static_cast<const S*>(p.dy) + offset : nullptr,
                           p.out ? static_cast<S*>(p.out) + offset : nullptr};
    BnCoefficients<T> c;
    for (int k = 0; k < kBnCoefficients; ++k) c.at[k] = splat(static_cast<const T*>(t.coef)[k * p.channels + row % p.channels]);
    BnSums<T> sum[kUnrolled];
    const auto add = [](BnSums<T>& to, const BnSums<T>& more) __attribute__((always_inline)) {
      to.a += more.a;
      to.b += more.b;
    };
    int64_t i = 0;
    for (; i + kUnrolled * kWidth <= n; i += kUnrolled * kWidth)
      unroll<kUnrolled>([&]<int k>() __attribute__((always_inline)) { add(sum[k], bn_vector<T, kPass>(curve, c, at, i + k * kWidth)); });
    for (; i + kWidth <= n; i += kWidth) add(sum[0], bn_vector<T, kPass>(curve, c, at, i));
    if (i < n) add(sum[1], bn_tail<T, kPass>(curve, c, at, i, n - i));
    if (!t.partial) continue;
    const Vec<T> a = sum[0].a + sum[1].a, b = sum[0].b + sum[1].b;
    T total[2]{};
    for (int k = 0; k < kWidth; ++k) {
      total[0] += a[k];
      total[1] += b[k];
    }
    for (int k = 0; k < 2; ++k) static_cast<T*>(t.partial)[k * t.units + unit] = total[k];
  }
}

template <class T, BnPass kPass, class S>
void short_rows_of(const BnActTask& t, int64_t first, int64_t last) {
  constexpr int kWidth = kCount<T>;
  const BnActParams& p = t.p;
  const Curve<T> curve = bn_curve<T>(p);
  const BnPointers<S> at{static_cast<const S*>(p.x), static_cast<const S*>(p.dy), static_cast<S*>(p.out)};
  const int64_t total = p.outer * p.channels * p.inner;
  const T* coef = static_cast<const T*>(t.coef);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t begin = unit * t.block, end = total - begin < t.block ? total : begin + t.block;
    T* sums[2]{};
    for (int k = 0; k < 2 && t.partial; ++k) {
      sums[k] = static_cast<T*>(t.partial) + (k * t.units + unit) * t.repeat;
      __builtin_memset(sums[k], 0, static_cast<size_t>(t.repeat) * sizeof(T));
    }
    // Coefficients of a few columns stay in registers down the block, which stays in L1.
    const auto columns = [&]<int n>(int64_t i) __attribute__((always_inline)) {
      BnCoefficients<T> c[n];
      BnSums<T> sum[n];
      unroll<n>([&]<int k>() __attribute__((always_inline)) {
        for (int j = 0; j < kBnCoefficients; ++j) c[k].at[j] = load<T>(coef + j * t.repeat + i + k * kWidth);
      });
      for (int64_t row = begin + i; row < end; row += t.repeat) {
        unroll<n>([&]<int k>() __attribute__((always_inline)) {
          const int64_t e = row + k * kWidth;
          if (e >= end) return;
          const BnSums<T> s = end - e < kWidth ? bn_tail<T, kPass>(curve, c[k], at, e, end - e) : bn_vector<T, kPass>(curve, c[k], at, e);
          sum[k].a += s.a;
          sum[k].b += s.b;
        });
      }
      unroll<n>([&]<int k>() __attribute__((always_inline)) {
        if (!t.partial) return;
        store(sums[0] + i + k * kWidth, sum[k].a);
        store(sums[1] + i + k * kWidth, sum[k].b);
      });
    };
    int64_t i = 0;
    for (; i + 2 * kWidth <= t.repeat; i += 2 * kWidth) columns.template operator()<2>(i);
    for (; i < t.repeat; i += kWidth) columns.template operator()<1>(i);
  }
}

template <class T, class S>
void rows_of(const BnActTask& t, bool is_short, int64_t first, int64_t last) {
  const auto run = [&]<BnPass kPass>() {
    is_short ? short_rows_of<T, kPass, S>(t, first, last) : long_rows_of<T, kPass, S>(t, first, last);
  };
  switch (t.p.pass) {
    case BnPass::Moments:
      return run.template operator()<BnPass::Moments>();
    case BnPass::Apply:
      return run.template operator()<BnPass::Apply>();
    case BnPass::Sums:
      return run.template operator()<BnPass::Sums>();
    case BnPass::Backward:
      return run.template operator()<BnPass::Backward>();
  }
}

void rows(const BnActTask& t, bool is_short, int64_t first, int64_t last) {
  switch (t.p.dtype) {
    case DType::F32:
      return rows_of<float, float>(t, is_short, first, last);
    case DType::F64:
      return rows_of<double, double>(t, is_short, first, last);
    case DType::BF16:
      return rows_of<float, BFloat16>(t, is_short, first, last);
    case DType::F16:
      return rows_of<float, Float16>(t, is_short, first, last);
  }
}

}  // namespace
}  // namespace genfast
