// bn_act, compiled once per instruction set.
#pragma once
#include <type_traits>

#include "../../core/vec_math.h"
#include "bn_act_cpu.h"

namespace genfast {
namespace {

// What the loops know when they are compiled: the type of the arithmetic, the pass, and of the activations the one that diffusion models
// use.
template <class T, BnPass kPass_, bool kSwish>
struct BnKind {
  using Wide = T;
  using Math = std::conditional_t<kSwish, InlineMath<Act::Swish>, typename MathOf<T>::type>;
  static constexpr BnPass kPass = kPass_;
  static GF_INLINE Curve<T> curve(const BnActParams& p) {
    const Act act = kSwish ? Act::Swish : p.curve.act;
    return {act, kPass == BnPass::Apply ? 0 : 1, false, static_cast<T>(p.curve.alpha), static_cast<T>(p.curve.gain), T(0)};
  }
};

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
  const S *x, *dy, *residual;
  S* out;
  explicit BnPointers(const BnActParams& p, int64_t offset)
      : x(static_cast<const S*>(p.x) + offset),
        dy(p.dy ? static_cast<const S*>(p.dy) + offset : nullptr),
        residual(p.residual ? static_cast<const S*>(p.residual) + offset : nullptr),
        out(p.out ? static_cast<S*>(p.out) + offset : nullptr) {}
  BnPointers(const S* x_, const S* dy_, const S* residual_, S* out_) : x(x_), dy(dy_), residual(residual_), out(out_) {}
  BnPointers after(int64_t n) const { return {x + n, dy ? dy + n : nullptr, residual ? residual + n : nullptr, out ? out + n : nullptr}; }
};

// The vector at element i.
template <class Kind, class S, class T = typename Kind::Wide>
GF_INLINE BnSums<T> bn_vector(const Curve<T>& curve, const BnCoefficients<T>& c, const BnPointers<S>& at, int64_t i) {
  constexpr BnPass kPass = Kind::kPass;
  const Vec<T> v = load<T>(at.x + i) - c.at[kCenter];
  if constexpr (kPass == BnPass::Moments) return {v, v * v};
  Vec<T> u = fma(c.at[kScale], v, c.at[kShift]);
  if (at.residual) u += load<T>(at.residual + i);
  if constexpr (kPass == BnPass::Apply) {
    store(at.out + i, curve_at<typename Kind::Math>(curve, u));
    return {};
  }
  const Vec<T> g = times_slope(load<T>(at.dy + i), curve_at<typename Kind::Math>(curve, u));
  if constexpr (kPass == BnPass::Sums) {
    if (at.out) store(at.out + i, g);
    return {g, g * v};
  }
  if constexpr (kPass == BnPass::Backward) store(at.out + i, fma(c.at[kP], g, fma(c.at[kQ], v, c.at[kR])));
  return {};
}

template <class T, BnPass kPass>
GF_INLINE BnCoefficients<T> bn_coefficients(const BnActTask& t, int64_t sample, int64_t channel) {
  BnCoefficients<T> c{};
  const T* from = static_cast<const T*>(t.coef) + sample * t.coef_sample + channel;
  for (int k = 0; k < used_coefficients(kPass); ++k) c.at[k] = splat(from[k * t.coef_row]);
  return c;
}

template <class Kind, class S>
void long_rows_of(const BnActTask& t, int64_t first, int64_t last) {
  using T = typename Kind::Wide;
  constexpr int kWidth = kCount<T>, kUnrolled = 2;
  const BnActParams& p = t.p;
  const Curve<T> curve = Kind::curve(p);
  const int64_t period = p.channels * p.inner;
  int64_t chunk = first % t.chunks, channel = first / t.chunks % p.channels, run = first / (t.chunks * p.channels);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t sample = run / t.blocks, row = run % t.blocks * t.depth, rows = p.outer - row < t.depth ? p.outer - row : t.depth;
    const int64_t begin = chunk * kBnChunk, n = chunk + 1 < t.chunks ? kBnChunk : p.inner - begin;
    const BnPointers<S> start(p, ((sample * p.outer + row) * p.channels + channel) * p.inner + begin);
    const BnCoefficients<T> c = bn_coefficients<T, Kind::kPass>(t, sample, channel);
    BnSums<T> sum[kUnrolled];
    const auto add = [](BnSums<T>& to, const BnSums<T>& more) __attribute__((always_inline)) {
      to.a += more.a;
      to.b += more.b;
    };
    for (int64_t r = 0; r < rows; ++r) {
      const BnPointers<S> at = start.after(r * period);
      int64_t i = 0;
      for (; i + kUnrolled * kWidth <= n; i += kUnrolled * kWidth)
        unroll<kUnrolled>([&]<int k>() __attribute__((always_inline)) { add(sum[k], bn_vector<Kind>(curve, c, at, i + k * kWidth)); });
      for (; i + kWidth <= n; i += kWidth) add(sum[0], bn_vector<Kind>(curve, c, at, i));
      if (i < n) {  // the last vector overlaps the one before, with the same results
        const BnSums<T> both = bn_vector<Kind>(curve, c, at, n - kWidth);
        add(sum[1], {last_lanes<T>(both.a, n - i), last_lanes<T>(both.b, n - i)});
      }
    }
    if (t.partial) {
      static_cast<T*>(t.partial)[unit] = total<T>(sum[0].a + sum[1].a);
      static_cast<T*>(t.partial)[t.units + unit] = total<T>(sum[0].b + sum[1].b);
    }
    if (++chunk == t.chunks) {
      chunk = 0;
      if (++channel == p.channels) {
        channel = 0;
        ++run;
      }
    }
  }
}

// The last n < kCount<T> elements; lanes beyond them return 0.
template <class Kind, class S, class T = typename Kind::Wide>
__attribute__((noinline)) BnSums<T> bn_tail(const Curve<T>& curve, const BnCoefficients<T>& c, const BnPointers<S>& at, int64_t i,
                                            int64_t n) {
  S x[kCount<T>]{}, dy[kCount<T>]{}, residual[kCount<T>]{}, out[kCount<T>];
  const size_t bytes = static_cast<size_t>(n) * sizeof(S);
  __builtin_memcpy(x, at.x + i, bytes);
  if (at.dy) __builtin_memcpy(dy, at.dy + i, bytes);
  if (at.residual) __builtin_memcpy(residual, at.residual + i, bytes);
  const BnPointers<S> padded{x, dy, at.residual ? residual : nullptr, at.out ? out : nullptr};
  BnSums<T> s = bn_vector<Kind>(curve, c, padded, 0);
  if (at.out) __builtin_memcpy(at.out + i, out, bytes);
  for (int64_t k = n; k < kCount<T>; ++k) s.a[k] = s.b[k] = T(0);
  return s;
}

// A block is walked in the order of its memory, a few rows abreast: coefficients and sums of a place are then loaded once for all of them.
template <class Kind, class S>
void short_rows_of(const BnActTask& t, int64_t first, int64_t last) {
  using T = typename Kind::Wide;
  constexpr BnPass kPass = Kind::kPass;
  constexpr int kWidth = kCount<T>, kAbreast = 4;
  constexpr bool kSums = kPass == BnPass::Moments || kPass == BnPass::Sums;
  const BnActParams& p = t.p;
  const Curve<T> curve = Kind::curve(p);
  const int64_t total = p.outer * p.channels * p.inner;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t sample = unit / t.blocks, begin = unit % t.blocks * t.block;
    const int64_t end = total - begin < t.block ? total : begin + t.block;
    const BnPointers<S> at(p, sample * total);
    const T* coef = static_cast<const T*>(t.coef) + sample * t.coef_sample;
    T* sums[2]{};
    for (int k = 0; k < 2 && kSums; ++k) {
      sums[k] = static_cast<T*>(t.partial) + (k * t.units + unit) * t.repeat;
      __builtin_memset(sums[k], 0, static_cast<size_t>(t.repeat) * sizeof(T));
    }
    // Place i of `rows` rows from element `row` on, of the last of which `left` elements are there.
    const auto place = [&]<int rows>(int64_t row, int64_t i, int64_t left) __attribute__((always_inline)) {
      BnCoefficients<T> c{};
      for (int j = 0; j < used_coefficients(kPass); ++j) c.at[j] = load<T>(coef + j * t.coef_row + i);
      BnSums<T> sum[rows];
      unroll<rows>([&]<int k>() __attribute__((always_inline)) {
        const int64_t e = row + k * t.repeat + i;
        sum[k] = rows == 1 && left < kWidth ? bn_tail<Kind>(curve, c, at, e, left) : bn_vector<Kind>(curve, c, at, e);
      });
      if constexpr (kSums) {
        Vec<T> a = sum[0].a, b = sum[0].b;
        if constexpr (rows == 4) {
          a = (a + sum[1].a) + (sum[2].a + sum[3].a);
          b = (b + sum[1].b) + (sum[2].b + sum[3].b);
        }
        store(sums[0] + i, load<T>(sums[0] + i) + a);
        store(sums[1] + i, load<T>(sums[1] + i) + b);
      }
    };
    int64_t row = begin;
    for (; row + kAbreast * t.repeat <= end; row += kAbreast * t.repeat) {
      for (int64_t i = 0; i < t.repeat; i += kWidth) place.template operator()<kAbreast>(row, i, kWidth);
    }
    for (; row < end; row += t.repeat) {
      for (int64_t i = 0; i < t.repeat && row + i < end; i += kWidth) place.template operator()<1>(row, i, end - row - i);
    }
  }
}

template <class T, class S>
void rows_of(const BnActTask& t, bool is_short, int64_t first, int64_t last) {
  const auto run = [&]<class Kind>() { (is_short ? short_rows_of<Kind, S> : long_rows_of<Kind, S>)(t, first, last); };
  const auto run_pass = [&]<BnPass kPass>() {
    if constexpr (__is_same(T, float)) {
      if (t.p.curve.act == Act::Swish) return run.template operator()<BnKind<T, kPass, true>>();
    }
    run.template operator()<BnKind<T, kPass, false>>();
  };
  switch (t.p.pass) {
    case BnPass::Moments:
      return run.template operator()<BnKind<T, BnPass::Moments, false>>();
    case BnPass::Apply:
      return run_pass.template operator()<BnPass::Apply>();
    case BnPass::Sums:
      return run_pass.template operator()<BnPass::Sums>();
    case BnPass::Backward:
      return run_pass.template operator()<BnPass::Backward>();
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
