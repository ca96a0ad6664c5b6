// Elementary functions of vectors, for the per-ISA units. float32: polynomials, within about two units in the last place over the whole
// range. float64: the C library, lane by lane.
#pragma once
#include "activation.h"
#include "vec.h"

namespace genfast {
namespace {

// a * b + c, rounded once where the instruction set has it.
GF_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) {
#if defined(__FMA__)
  return (VFloat)GF_MM(fmadd_ps)(a, b, c);
#else
  return a * b + c;
#endif
}
GF_INLINE VDouble fma(VDouble a, VDouble b, VDouble c) {
#if defined(__FMA__)
  return (VDouble)GF_MM(fmadd_pd)(a, b, c);
#else
  return a * b + c;
#endif
}

// x = n log 2 + r with |r| <= log(2) / 2; growth = e^r - 1. Coefficients: Cephes, expf.
struct Reduced {
  VFloat growth;
  VInt n;
};
GF_INLINE Reduced reduce_exp(VFloat x) {
  const VFloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VFloat n = fma(x, splat(1.44269504088896341f), magic) - magic;
  VFloat r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  VFloat p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return {fma(r * r, p, r), __builtin_convertvector(n, VInt)};
}
GF_INLINE VFloat power_of_two(VInt n) {  // -126 <= n <= 127
  return (VFloat)((n + 127) << 23);
}

struct FloatMath {
  static GF_INLINE VFloat exp(VFloat x) {
    const Reduced e = reduce_exp(clamp_lanes(x, splat(-104.0f), splat(89.0f)));
    const VInt half = e.n >> 1;  // in two steps: 2^n itself may be infinite or subnormal
    return (e.growth + 1.0f) * power_of_two(half) * power_of_two(e.n - half);
  }
  static GF_INLINE VFloat expm1(VFloat x) {  // x <= 0
    const Reduced e = reduce_exp(clamp_lanes(x, splat(-80.0f), splat(80.0f)));
    const VFloat s = power_of_two(e.n);
    return fma(s, e.growth, s - 1.0f);
  }
  static GF_INLINE VFloat sigmoid(VFloat x) { return 1.0f / (1.0f + exp(-x)); }
  static GF_INLINE VFloat tanh(VFloat x) {
    const VFloat z = x * x;  // Cephes, tanhf
    VFloat p = splat(-5.70498872745e-3f);
    p = fma(p, z, splat(2.06390887954e-2f));
    p = fma(p, z, splat(-5.37397155531e-2f));
    p = fma(p, z, splat(1.33314422036e-1f));
    p = fma(p, z, splat(-3.33332819422e-1f));
    const VFloat small = fma(p * z, x, x);
    const VFloat size = magnitude(x);
    const VFloat large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    const VFloat signed_large = (VFloat)((VUInt)large | ((VUInt)x & 0x80000000u));
    return size < 0.625f ? small : signed_large;
  }
  static GF_INLINE VFloat log1p_exp(VFloat x) {
    // log(1 + e^x) = max(x, 0) + 2 atanh(s), s = t / (2 + t), t = e^-|x|: s <= 1/3.
    const VFloat t = exp(-magnitude(x)), s = t / (t + 2.0f), z = s * s;
    VFloat p = splat(1.0f / 15.0f);
    p = fma(p, z, splat(1.0f / 13.0f));
    p = fma(p, z, splat(1.0f / 11.0f));
    p = fma(p, z, splat(1.0f / 9.0f));
    p = fma(p, z, splat(1.0f / 7.0f));
    p = fma(p, z, splat(1.0f / 5.0f));
    p = fma(p, z, splat(1.0f / 3.0f));
    const VFloat tail = 2.0f * fma(s * z, p, s);
    return (x > 0.0f ? x : VFloat{}) + tail;
  }
  // Out of line: it is large, and the loops that call it are many.
  static __attribute__((noinline)) VFloat smooth(Act act, int order, VFloat u) {
    return smooth_activation<FloatMath, float>(act, order, u);
  }
};

struct LaneMath {
  static GF_INLINE double exp(double x) { return __builtin_exp(x); }
  static GF_INLINE double expm1(double x) { return __builtin_expm1(x); }
  static GF_INLINE double sigmoid(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }
  static GF_INLINE double tanh(double x) { return __builtin_tanh(x); }
  static GF_INLINE double log1p_exp(double x) { return __builtin_log1p(__builtin_exp(x)); }
};
struct DoubleMath {
  static __attribute__((noinline)) VDouble smooth(Act act, int order, VDouble u) {
    for (int i = 0; i < kCount<double>; ++i) u[i] = smooth_activation<LaneMath, double>(act, order, u[i]);
    return u;
  }
};

// One activation alone, in line: for loops that would otherwise wait for it.
template <Act kAct>
struct InlineMath {
  static GF_INLINE VFloat smooth(Act, int order, VFloat u) { return smooth_activation<FloatMath, float>(kAct, order, u); }
};

template <class T>
struct MathOf {
  using type = FloatMath;
};
template <>
struct MathOf<double> {
  using type = DoubleMath;
};

template <class T>
GF_INLINE Vec<T> curve_of(const Curve<T>& c, Vec<T> u) {
  return curve_at<typename MathOf<T>::type>(c, u);
}

// The sum of the lanes, halves folded together.
template <class T>
GF_INLINE T total(Vec<T> v) {
  T lanes[kCount<T>];
  store(lanes, v);
  for (int half = kCount<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[half + i];
  }
  return lanes[0];
}

// The last n lanes; 0 before them.
template <class T>
GF_INLINE Vec<T> last_lanes(Vec<T> v, int64_t n) {
  using Bits = VecBits<T>;
  Bits keep[2]{Bits{}, ~Bits{}};
  return (Vec<T>)((Bits)v & load_raw<Bits>(reinterpret_cast<const T*>(keep) + n));
}

}  // namespace
}  // namespace genfast
