// What online softmax needs of vectors, for the per-ISA units: exponential, folds, parts of rows, a transpose.
#pragma once
#include "vec.h"

namespace genfast {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kMinusInfinity = -__builtin_inff();

GF_INLINE VFloat fma_lanes(VFloat a, VFloat b, VFloat c) {
#if defined(__FMA__)
  return (VFloat)GF_MM(fmadd_ps)(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^x, to 2e-9 of it and a rounding, or with kShort to 4e-6 of it; below 2^-126 zero; NaN stays.
template <bool kShort = false>
GF_INLINE VFloat exp2_lanes(VFloat x) {
  // Results below the normal numbers would cost a hundred times as much as others, and hidden keys have them all.
  const VFloat lowest = splat(-126.0f);
  const auto vanishes = x < lowest;
  x = vanishes ? lowest : x;
#if defined(__AVX512F__)
  const VFloat whole = (VFloat)_mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VFloat shift = splat(12582912.0f);
  const VFloat whole = (x + shift) - shift;
#endif
  const VFloat f = x - whole;
  VFloat y;
  if constexpr (kShort) {
    y = splat(0.009570096619427204f);
    y = fma_lanes(y, f, splat(0.05591786280274391f));
    y = fma_lanes(y, f, splat(0.240247443318367f));
    y = fma_lanes(y, f, splat(0.6931217908859253f));
    y = fma_lanes(y, f, splat(0.9999992847442627f));
  } else {
    y = splat(1.5345808060380413e-4f);
    y = fma_lanes(y, f, splat(1.3399932067841291e-3f));
    y = fma_lanes(y, f, splat(9.618489071726799e-3f));
    y = fma_lanes(y, f, splat(5.550328642129898e-2f));
    y = fma_lanes(y, f, splat(0.24022646248340607f));
    y = fma_lanes(y, f, splat(0.6931471824645996f));
    y = fma_lanes(y, f, splat(1.0f));
  }
#if defined(__AVX512F__)
  return vanishes ? VFloat{} : (VFloat)_mm512_scalef_ps(y, whole);
#else
  const VInt exponent = (__builtin_convertvector(whole, VInt) + 127) << 23;
  return vanishes ? VFloat{} : y * (VFloat)exponent;
#endif
}

// exponent (x - row_max): the difference first where kWide says that x and row_max have no room for the exponent, because a bias was added;
// else, where it can be fused, in one step. Then exponent row_max is rounded, which makes all powers of a row too large by power_excess.
template <bool kWide>
GF_INLINE VFloat power_lanes(VFloat x, float row_max, float exponent) {
#if defined(__FMA__)
  if constexpr (!kWide) return fma_lanes(x, splat(exponent), splat(-row_max * exponent));
#endif
  return (x - row_max) * exponent;
}
template <bool kWide>
GF_INLINE float power_excess(float row_max, float exponent) {
#if defined(__FMA__)
  if constexpr (!kWide) return __builtin_fmaf(row_max, exponent, -(row_max * exponent));
#endif
  return 0.0f;
}
// From sums of such powers for row_max `from` to those for `to`.
template <bool kWide>
GF_INLINE float power_between(float from, float to, float exponent) {
#if defined(__FMA__)
  if constexpr (!kWide) return from * exponent - to * exponent;
#endif
  return (from - to) * exponent;
}

// Folds halves together: log2(kLanes) steps.
template <class F>
GF_INLINE float reduce(VFloat v, F f) {
#if defined(__AVX512F__)
  v = f(v, (VFloat)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e));
  v = f(v, (VFloat)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1));
#elif defined(__AVX2__)
  v = f(v, (VFloat)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1));
#endif
#if defined(__SSE2__)
  v = f(v, (VFloat)GF_MM(shuffle_ps)(v, v, 0x4e));
  v = f(v, (VFloat)GF_MM(shuffle_ps)(v, v, 0xb1));
  return v[0];
#else
  float r = v[0];
  for (int i = 1; i < kLanes; ++i) r = f(splat(v[i]), splat(r))[0];
  return r;
#endif
}
GF_INLINE float largest(VFloat v) {
  return reduce(v, [](VFloat a, VFloat b) __attribute__((always_inline)) { return (a > b) ? a : b; });
}
GF_INLINE float total(VFloat v) {
  return reduce(v, [](VFloat a, VFloat b) __attribute__((always_inline)) { return a + b; });
}

GF_INLINE VInt lane_numbers() {
  VInt v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// The first `count` (at least 1) elements at p, widened; zeros follow.
template <class T>
GF_INLINE VFloat load_first(const T* p, int64_t count) {
  if (count >= kLanes) return load<float>(p);
#if defined(__AVX512F__)
  const auto few = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    return (VFloat)_mm512_maskz_loadu_ps(few, p);
  } else {
    T whole[kLanes];
    store_raw(whole, _mm256_maskz_loadu_epi16(few, p));
    return load<float>(whole);
  }
#else
  T whole[kLanes] = {};
  __builtin_memcpy(whole, p, static_cast<size_t>(count) * sizeof(T));
  return load<float>(whole);
#endif
}
template <class T>
GF_INLINE void store_first(T* p, VFloat v, int64_t count) {
  if (count >= kLanes) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
    return;
  }
#endif
  T whole[kLanes];
  store(whole, v);
  __builtin_memcpy(p, whole, static_cast<size_t>(count) * sizeof(T));
}

// Lane j of v[i] becomes lane i of v[j].
GF_INLINE void transpose(VFloat (&v)[kLanes]) {
  unroll<kLanes / 4>([&]<int a>() { transpose_blocks(*reinterpret_cast<VFloat(*)[4]>(&v[4 * a])); });
#if defined(__AVX512F__)
  unroll<4>([&]<int j>() {
    const __m512 even0 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x88), odd0 = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x88), odd1 = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xdd);
    v[j] = (VFloat)_mm512_shuffle_f32x4(even0, even1, 0x88);
    v[4 + j] = (VFloat)_mm512_shuffle_f32x4(odd0, odd1, 0x88);
    v[8 + j] = (VFloat)_mm512_shuffle_f32x4(even0, even1, 0xdd);
    v[12 + j] = (VFloat)_mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  });
#elif defined(__AVX2__)
  unroll<4>([&]<int j>() {
    const __m256 low = v[j], high = v[4 + j];
    v[j] = (VFloat)_mm256_permute2f128_ps(low, high, 0x20);
    v[4 + j] = (VFloat)_mm256_permute2f128_ps(low, high, 0x31);
  });
#endif
}

}  // namespace
}  // namespace genfast
