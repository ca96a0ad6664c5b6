// Vectors of one instruction set, chosen by the flags of the unit that includes this. Only the per-ISA units may include it:
// everything lives in an anonymous namespace, so that no symbol built for a wide ISA can be picked by the linker for a narrow one.
// Arithmetic is gcc's vector extension: + - * / round each lane on its own.
#pragma once
#include <cstdint>
#include <utility>

#include "exact_math.h"
#include "philox.h"
#if defined(__SSE2__)
// gcc 12 reports its own "undefined" vectors inside these headers (PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace genfast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#define GF_MM(name) _mm512_##name
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#define GF_MM(name) _mm256_##name
#else
constexpr int kVectorBytes = 16;
#define GF_MM(name) _mm_##name
#endif
constexpr int kLanes = kVectorBytes / 4;  // of float32

#define GF_INLINE inline __attribute__((always_inline))

typedef float VFloat __attribute__((vector_size(kVectorBytes)));
typedef int32_t VInt __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VUInt __attribute__((vector_size(kVectorBytes)));
typedef double VDouble __attribute__((vector_size(kVectorBytes)));
typedef int64_t VLong __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VULong __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VHalves __attribute__((vector_size(kVectorBytes / 2)));  // as many 16-bit words as a VFloat has lanes
typedef float VHalfFloat __attribute__((vector_size(kVectorBytes / 2)));  // as many floats as a VDouble has lanes

// Vec<T>: the vector of T; kCount<T>: its lanes; VecBits<T>: the signed integers of its comparisons.
template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VFloat;
  using bits = VInt;
};
template <>
struct VecOf<double> {
  using type = VDouble;
  using bits = VLong;
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using VecBits = typename VecOf<T>::bits;
template <class T>
constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));

// f<0>() ... f<n - 1>(): unrolled before gcc decides what stays in registers, which a loop is not.
template <int n, class F>
GF_INLINE void unroll(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      __attribute__((always_inline)) { (f.template operator()<i>(), ...); }(std::make_integer_sequence<int, n>{});
}

template <class V>
GF_INLINE V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
GF_INLINE void store_raw(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// c - 0 is c, also for -0.
GF_INLINE VFloat splat(float c) {
  return c - VFloat{};
}
GF_INLINE VDouble splat(double c) {
  return c - VDouble{};
}

// ---- conversions: the vector twins of exact_math.h ----------------------------------------------------------------------

// gcc 12 makes several instructions of __builtin_convertvector where the wide ISAs have one.
GF_INLINE VUInt widen_halves(VHalves v) {
#if defined(__AVX512F__)
  return (VUInt)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (VUInt)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VUInt);
#endif
}
GF_INLINE VHalves narrow_words(VUInt v) {  // each below 2^16
#if defined(__AVX512F__)
  return (VHalves)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  return (VHalves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, VHalves);
#endif
}

GF_INLINE VFloat widen_bf16(VHalves v) {
  return (VFloat)(widen_halves(v) << 16);
}

GF_INLINE VHalves narrow_bf16(VFloat v) {
  const VUInt u = (VUInt)v;
  const VUInt rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VUInt nan = (u >> 16) | 0x40u;
  return narrow_words((v != v) ? nan : rounded);
}

#if defined(__AVX512F__)
GF_INLINE VFloat widen_f16(VHalves v) {
  return (VFloat)_mm512_cvtph_ps((__m256i)v);
}
GF_INLINE VHalves narrow_f16(VFloat v) {
  return (VHalves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
GF_INLINE VFloat widen_f16(VHalves v) {
  return (VFloat)_mm256_cvtph_ps((__m128i)v);
}
GF_INLINE VHalves narrow_f16(VFloat v) {
  return (VHalves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// A long sequence for each lane: called, not inlined, so that units without F16C stay small.
[[gnu::noinline, maybe_unused]] inline VFloat widen_f16(VHalves v) {
  VFloat r{};
  for (int i = 0; i < kLanes; ++i) r[i] = genfast::widen_f16(Float16{v[i]});
  return r;
}
[[gnu::noinline, maybe_unused]] inline VHalves narrow_f16(VFloat v) {
  VHalves r{};
  for (int i = 0; i < kLanes; ++i) r[i] = genfast::narrow_f16(v[i]).bits;
  return r;
}
#endif

// ---- load<T>(p): kCount<T> elements of any storage type, widened to T -----------------------------------------------------

template <class T>
GF_INLINE Vec<T> load(const T* p) {
  return load_raw<Vec<T>>(p);
}
template <class T>
  requires __is_same
(T, float) GF_INLINE VFloat load(const BFloat16* p) {
  return widen_bf16(load_raw<VHalves>(p));
}
template <class T>
  requires __is_same
(T, float) GF_INLINE VFloat load(const Float16* p) {
  return widen_f16(load_raw<VHalves>(p));
}
template <class T>
  requires __is_same
(T, double) GF_INLINE VDouble load(const float* p) {
  return __builtin_convertvector(load_raw<VHalfFloat>(p), VDouble);
}

// ---- store(p, v): rounds to the storage type. float64 to a 16-bit type goes through float32, as torch's cast does ---------

GF_INLINE void store(float* p, VFloat v) {
  store_raw(p, v);
}
GF_INLINE void store(double* p, VDouble v) {
  store_raw(p, v);
}
GF_INLINE void store(BFloat16* p, VFloat v) {
  store_raw(p, narrow_bf16(v));
}
GF_INLINE void store(Float16* p, VFloat v) {
  store_raw(p, narrow_f16(v));
}
GF_INLINE void store(float* p, VDouble v) {
  store_raw(p, __builtin_convertvector(v, VHalfFloat));
}
GF_INLINE void store(double* p, VFloat v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v[i];
}
GF_INLINE void store(BFloat16* p, VDouble v) {
  for (int i = 0; i < kCount<double>; ++i) p[i] = genfast::narrow_bf16(static_cast<float>(v[i]));
}
GF_INLINE void store(Float16* p, VDouble v) {
  for (int i = 0; i < kCount<double>; ++i) p[i] = genfast::narrow_f16(static_cast<float>(v[i]));
}

// ---- store_stream(p, v): past the caches; p aligned to the stored width, and a fence before others read -------------------

#if defined(__SSE2__)
GF_INLINE void stream_raw(void* p, VFloat v) {
  GF_MM(stream_ps)(static_cast<float*>(p), v);
}
#if defined(__AVX512F__)
GF_INLINE void stream_raw(void* p, VHalves v) {
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
}
#elif defined(__AVX2__)
GF_INLINE void stream_raw(void* p, VHalves v) {
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
}
#else
GF_INLINE void stream_raw(void* p, VHalves v) {
  store_raw(p, v);
}
#endif
GF_INLINE void stream_fence() {
  _mm_sfence();
}
#else
template <class V>
GF_INLINE void stream_raw(void* p, V v) {
  store_raw(p, v);
}
GF_INLINE void stream_fence() {}
#endif
GF_INLINE void store_stream(float* p, VFloat v) {
  stream_raw(p, v);
}
GF_INLINE void store_stream(double* p, VDouble v) {
  stream_raw(p, (VFloat)v);
}
GF_INLINE void store_stream(BFloat16* p, VFloat v) {
  stream_raw(p, narrow_bf16(v));
}
GF_INLINE void store_stream(Float16* p, VFloat v) {
  stream_raw(p, narrow_f16(v));
}

// ---- selections ---------------------------------------------------------------------------------------------------------

// min(max(v, lo), hi); a NaN in v stays.
template <class V>
GF_INLINE V clamp_lanes(V v, V lo, V hi) {
  v = (v < lo) ? lo : v;
  return (v > hi) ? hi : v;
}

GF_INLINE VFloat magnitude(VFloat v) {
  return (VFloat)((VUInt)v & 0x7fffffffu);
}
GF_INLINE VDouble magnitude(VDouble v) {
  return (VDouble)((VULong)v & 0x7fffffffffffffffull);
}

template <class V>
GF_INLINE bool any(V mask) {
  VULong m = (VULong)mask;
  uint64_t r = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) r |= m[i];
  return r != 0;
}

// Appends the lanes of v that are >= bound to out (which has room for a whole vector) and returns how many there were.
#if defined(__AVX512F__)
GF_INLINE int64_t append_at_least(float* out, VFloat v, VFloat bound) {
  const __mmask16 keep = _mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ);
  if (keep == 0) return 0;
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(keep, v));
  return __builtin_popcount(keep);
}
GF_INLINE int64_t append_at_least(double* out, VDouble v, VDouble bound) {
  const __mmask8 keep = _mm512_cmp_pd_mask(v, bound, _CMP_GE_OQ);
  if (keep == 0) return 0;
  _mm512_storeu_pd(out, _mm512_maskz_compress_pd(keep, v));
  return __builtin_popcount(keep);
}
#else
template <class T>
GF_INLINE int64_t append_at_least(T* out, Vec<T> v, Vec<T> bound) {
  const VecBits<T> keep = v >= bound;
#if defined(__SSE2__)
  if (GF_MM(movemask_ps)((VFloat)keep) == 0) return 0;
#else
  if (!any(keep)) return 0;
#endif
  int64_t n = 0;
  for (int i = 0; i < kCount<T>; ++i) {
    out[n] = v[i];
    n -= keep[i];  // a true lane is -1
  }
  return n;
}
#endif

// ---- what philox and box_muller need -------------------------------------------------------------------------------------

// The 64-bit products of the low halves.
GF_INLINE VULong multiply_wide(VULong a, VULong b) {
#if defined(__AVX512F__)
  return (VULong)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VULong)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VULong)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

// 32-bit lane 2k is the low half of a's lane k, lane 2k + 1 of b's.
GF_INLINE VUInt pack_low(VULong a, VULong b) {
#if defined(__AVX512F__)
  return (VUInt)_mm512_mask_shuffle_epi32((__m512i)a, 0xAAAA, (__m512i)b, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  return (VUInt)_mm256_blend_epi32((__m256i)a, _mm256_slli_epi64((__m256i)b, 32), 0xAA);
#else
  return (VUInt)((a & 0xffffffffull) | (b << 32));
#endif
}

// Transposes the 4 x 4 blocks of 128 bits: lane 4b + j of in[k] becomes lane 4b + k of out[j].
GF_INLINE void transpose_blocks(VFloat (&v)[4]) {
#if defined(__SSE2__)
  const auto t0 = GF_MM(unpacklo_ps)(v[0], v[1]), t1 = GF_MM(unpackhi_ps)(v[0], v[1]);
  const auto t2 = GF_MM(unpacklo_ps)(v[2], v[3]), t3 = GF_MM(unpackhi_ps)(v[2], v[3]);
  v[0] = (VFloat)GF_MM(unpacklo_pd)((VDouble)t0, (VDouble)t2);
  v[1] = (VFloat)GF_MM(unpackhi_pd)((VDouble)t0, (VDouble)t2);
  v[2] = (VFloat)GF_MM(unpacklo_pd)((VDouble)t1, (VDouble)t3);
  v[3] = (VFloat)GF_MM(unpackhi_pd)((VDouble)t1, (VDouble)t3);
#else
  const VFloat in[4] = {v[0], v[1], v[2], v[3]};
  for (int b = 0; b < kLanes; b += 4) {
    for (int j = 0; j < 4; ++j) {
      for (int k = 0; k < 4; ++k) v[j][b + k] = in[k][b + j];
    }
  }
#endif
}

struct VectorMath {
  using F = VFloat;
  using U = VUInt;
  using I = VInt;
  static GF_INLINE F constant(float c) { return splat(c); }
  static GF_INLINE F mul(F a, F b) { return a * b; }
  static GF_INLINE F add(F a, F b) { return a + b; }
  static GF_INLINE F sqrt(F a) {
#if defined(__SSE2__)
    return (F)GF_MM(sqrt_ps)(a);
#else
    for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
  }
  static GF_INLINE F from_unsigned(U a) {
#if defined(__AVX512F__)
    return (F)_mm512_cvtepu32_ps((__m512i)a);
#else
    // Both halves are exact, and so is the product: the sum rounds once.
    return from_signed((I)(a >> 16)) * 65536.0f + from_signed((I)(a & 0xffffu));
#endif
  }
  static GF_INLINE F from_signed(I a) { return __builtin_convertvector(a, F); }
  static GF_INLINE F as_float(U a) { return (F)a; }
  static GF_INLINE U as_bits(F a) { return (U)a; }
  static GF_INLINE I as_signed(U a) { return (I)a; }
  static GF_INLINE U as_unsigned(I a) { return (U)a; }
};

}  // namespace
}  // namespace genfast
