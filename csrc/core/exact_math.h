// Arithmetic whose bits do not depend on the compiler or the device: every operation is rounded on its own, to nearest.
// Usable from C++ and CUDA. Units that include this are compiled with -ffp-contract=off and never with fast-math; device code
// asks for the rounding by name, because nvcc contracts by default.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define GF_HD __host__ __device__ __forceinline__
#else
#define GF_HD inline __attribute__((always_inline))
#endif

namespace genfast {

#if defined(__CUDA_ARCH__)
GF_HD float mul(float a, float b) {
  return __fmul_rn(a, b);
}
GF_HD float add(float a, float b) {
  return __fadd_rn(a, b);
}
GF_HD float sub(float a, float b) {
  return __fsub_rn(a, b);
}
GF_HD float div(float a, float b) {
  return __fdiv_rn(a, b);
}
GF_HD float sqrt_rn(float a) {
  return __fsqrt_rn(a);
}
GF_HD double mul(double a, double b) {
  return __dmul_rn(a, b);
}
GF_HD double add(double a, double b) {
  return __dadd_rn(a, b);
}
GF_HD double sub(double a, double b) {
  return __dsub_rn(a, b);
}
GF_HD double div(double a, double b) {
  return __ddiv_rn(a, b);
}
GF_HD double sqrt_rn(double a) {
  return __dsqrt_rn(a);
}
GF_HD float to_float(int32_t a) {
  return __int2float_rn(a);
}
GF_HD float to_float(uint32_t a) {
  return __uint2float_rn(a);
}
GF_HD float as_float(uint32_t a) {
  return __uint_as_float(a);
}
GF_HD uint32_t as_bits(float a) {
  return __float_as_uint(a);
}
GF_HD uint32_t mul_high(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}
#else
GF_HD float mul(float a, float b) {
  return a * b;
}
GF_HD float add(float a, float b) {
  return a + b;
}
GF_HD float sub(float a, float b) {
  return a - b;
}
GF_HD float div(float a, float b) {
  return a / b;
}
GF_HD float sqrt_rn(float a) {
  return __builtin_sqrtf(a);
}
GF_HD double mul(double a, double b) {
  return a * b;
}
GF_HD double add(double a, double b) {
  return a + b;
}
GF_HD double sub(double a, double b) {
  return a - b;
}
GF_HD double div(double a, double b) {
  return a / b;
}
GF_HD double sqrt_rn(double a) {
  return __builtin_sqrt(a);
}
GF_HD float to_float(int32_t a) {
  return static_cast<float>(a);
}
GF_HD float to_float(uint32_t a) {
  return static_cast<float>(a);
}
GF_HD float as_float(uint32_t a) {
  float f;
  __builtin_memcpy(&f, &a, 4);
  return f;
}
GF_HD uint32_t as_bits(float a) {
  uint32_t u;
  __builtin_memcpy(&u, &a, 4);
  return u;
}
GF_HD uint32_t mul_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
#endif

// min(max(v, lo), hi) for lo <= hi. A NaN in v stays: both comparisons are false.
template <class T>
GF_HD T clamp_keep_nan(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// The 16-bit formats as storage. Conversions round to nearest even; a NaN stays a NaN.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

GF_HD float widen_bf16(BFloat16 a) {
  return as_float(static_cast<uint32_t>(a.bits) << 16);
}

GF_HD BFloat16 narrow_bf16(float a) {
  const uint32_t u = as_bits(a);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

GF_HD float widen_f16(Float16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16;
  const uint32_t body = a.bits & 0x7fffu;
  if (body >= 0x7c00u) return as_float(sign | 0x7f800000u | ((body & 0x3ffu) << 13));
  if (body < 0x400u) return as_float(sign | as_bits(mul(to_float(body), 0x1p-24f)));  // zero and subnormals: exact
  return as_float(sign | ((body << 13) + 0x38000000u));
}

GF_HD Float16 narrow_f16(float a) {
  const uint32_t sign = (as_bits(a) >> 16) & 0x8000u;
  uint32_t u = as_bits(a) & 0x7fffffffu;
  if (u > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (u >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (u < 0x38800000u) {
    // Below the smallest normal half: adding 0.5 puts the half's last bit at float32's last bit, so the sum rounds as wanted.
    return {static_cast<uint16_t>(sign | (as_bits(add(as_float(u), 0.5f)) - 0x3f000000u))};
  }
  u += 0xfffu + ((u >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((u - 0x38000000u) >> 13))};
}

}  // namespace genfast
