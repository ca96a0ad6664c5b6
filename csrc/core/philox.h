// The noise of docs/noise.md (version 2): Philox4x32-10 words, their uniforms and their Box-Muller normals.
// One source for scalar C++, gcc vectors (core/vec.h) and CUDA.
#pragma once
#include <cstdint>

#include "exact_math.h"

namespace genfast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // Salmon et al. 2011, table 2
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t w[4];
};

// The four words of elements 4i .. 4i + 3.
GF_HD Words philox(uint64_t seed, uint32_t stream, uint32_t draw, uint64_t i) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(i), c1 = static_cast<uint32_t>(i >> 32), c2 = draw, c3 = stream;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t h0 = mul_high(kPhiloxM0, c0), l0 = kPhiloxM0 * c0;
    const uint32_t h1 = mul_high(kPhiloxM1, c2), l1 = kPhiloxM1 * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1), exact.
GF_HD float uniform(uint32_t w) {
  return mul(to_float(w >> 8), 0x1p-24f);
}

// Which bits of a uniform the type S keeps: those that it can hold. Rounded to nearest, the largest would become 1.
template <class S>
GF_HD constexpr uint32_t uniform_bits() {
  return 0xffffffffu;
}
template <>
GF_HD constexpr uint32_t uniform_bits<BFloat16>() {
  return 0xffff0000u;
}
template <>
GF_HD constexpr uint32_t uniform_bits<Float16>() {
  return 0xffffe000u;  // a subnormal of float16 is a multiple of 2^-24, as every uniform is: exact
}

// What box_muller computes with: F floats, U the same number of 32-bit words. core/vec.h has the vector twin.
struct ScalarMath {
  using F = float;
  using U = uint32_t;
  using I = int32_t;
  static GF_HD F constant(float c) { return c; }
  static GF_HD F mul(F a, F b) { return genfast::mul(a, b); }
  static GF_HD F add(F a, F b) { return genfast::add(a, b); }
  static GF_HD F sqrt(F a) { return sqrt_rn(a); }
  static GF_HD F from_unsigned(U a) { return to_float(a); }
  static GF_HD F from_signed(I a) { return to_float(a); }
  static GF_HD F as_float(U a) { return genfast::as_float(a); }
  static GF_HD U as_bits(F a) { return genfast::as_bits(a); }
  static GF_HD I as_signed(U a) { return static_cast<I>(a); }
  static GF_HD U as_unsigned(I a) { return static_cast<U>(a); }
};

// Two words to two normals, steps 5 to 12 of docs/noise.md. z0 from the cosine, z1 from the sine.
template <class M>
GF_HD void box_muller(typename M::U a, typename M::U b, typename M::F& z0, typename M::F& z1) {
  using F = typename M::F;
  using U = typename M::U;
  using I = typename M::I;
  const auto axpb = [](F x, F y, float c) { return M::add(M::mul(x, y), M::constant(c)); };
  const auto scaled = [](F x, float k) { return M::mul(x, M::constant(k)); };

  const F u = axpb(M::from_unsigned(a), M::constant(0x1p-32f), 0x1p-33f);
  const I e = M::as_signed(M::as_bits(u) - 0x3f3504f3u) >> 23;
  const F f = M::add(M::as_float(M::as_bits(u) - (M::as_unsigned(e) << 23)), M::constant(-1.0f));
  const F f2 = M::mul(f, f);
  const F f4 = M::mul(f2, f2);
  const F pa = axpb(f, M::constant(0x1.38cf2p-3f), -0x1.05602ep-2f);
  const F pb = axpb(f, M::constant(0x1.0d81f2p-2f), -0x1.22d8f8p-2f);
  const F pc = axpb(f, M::constant(0x1.54728cp-2f), -0x1.99a01ep-2f);
  const F pd = axpb(f, M::constant(0x1.000226p-1f), -0x1.555554p-1f);
  const F series = M::add(M::mul(M::add(M::mul(pa, f2), pb), f4), M::add(M::mul(pc, f2), pd));
  const F p = axpb(series, f, 1.0f);
  const F t = M::add(scaled(M::from_signed(e), -0x1.62e43p+0f), M::add(M::mul(f2, p), scaled(f, -2.0f)));
  const F r = M::sqrt(t);

  const U q = b >> 30;
  const F y = scaled(M::from_signed(M::as_signed((b << 2) | 2u)), 0x1p-32f);
  const F y2 = M::mul(y, y);
  F s = axpb(M::constant(-0x1.32f65cp-8f), y2, 0x1.467fdcp-4f);
  s = axpb(s, y2, -0x1.4abc22p-1f);
  s = axpb(s, y2, 0x1.921fb6p+0f);
  s = M::mul(s, y);
  F c = axpb(M::constant(0x1.d4f7eap-11f), y2, -0x1.55b2b6p-6f);
  c = axpb(c, y2, 0x1.03c1bp-2f);
  c = axpb(c, y2, -0x1.3bd3ccp+0f);
  c = axpb(c, y2, 1.0f);

  const U odd = 0u - (q & 1u);  // all ones in the odd quadrants
  const U s_bits = M::as_bits(s), c_bits = M::as_bits(c), swap = (s_bits ^ c_bits) & odd;
  z0 = M::mul(r, M::as_float((c_bits ^ swap) ^ (((q + 1u) & 2u) << 30)));
  z1 = M::mul(r, M::as_float((s_bits ^ swap) ^ ((q & 2u) << 30)));
}

struct Normals {
  float z[4];
};

// The four normals of elements 4i .. 4i + 3.
GF_HD Normals normals(uint64_t seed, uint32_t stream, uint32_t draw, uint64_t i) {
  const Words k = philox(seed, stream, draw, i);
  Normals n;
  box_muller<ScalarMath>(k.w[0], k.w[1], n.z[0], n.z[1]);
  box_muller<ScalarMath>(k.w[2], k.w[3], n.z[2], n.z[3]);
  return n;
}

}  // namespace genfast
