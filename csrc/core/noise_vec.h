// docs/noise.md for a range of elements, in vectors. Only the per-ISA units may include this, as with vec.h.
#pragma once
#include <cstdint>

#include "philox.h"
#include "vec.h"

namespace genfast {
namespace {

struct NoiseKey {
  uint64_t seed;
  uint32_t stream;
  uint32_t draw;
};

constexpr int kBlock = 4 * kLanes;  // elements that one set of vectors makes
constexpr int kNoiseTile = 1024;    // elements whose words are kept at a time: 4 KiB, in L1

// Elements laid out at a time in channels_last: each channel makes its share of them in one go, and whole blocks only.
constexpr int kNoiseLaidOut = 4096;

// The Philox words of kNoiseTile elements: w[j] holds word j of the counters. Inside a group of kLanes counters, lane p holds
// counter (p % 4) * (kLanes / 4) + p / 4, which is what transpose_blocks turns into memory order.
struct alignas(64) NoiseWords {
  uint32_t w[4][kNoiseTile / 4];
};

// Words of `groups` * kBlock elements from counter `i`, a multiple of kLanes.
GF_INLINE void make_words(const NoiseKey& key, uint64_t i, int groups, NoiseWords& words) {
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
    k0[r] = static_cast<uint32_t>(key.seed) + r * kPhiloxW0;
    k1[r] = static_cast<uint32_t>(key.seed >> 32) + r * kPhiloxW1;
  }
  VULong even, odd;
  for (int k = 0; k < kLanes / 2; ++k) {
    even[k] = static_cast<uint64_t>((2 * k) % 4 * (kLanes / 4) + 2 * k / 4);
    odd[k] = static_cast<uint64_t>((2 * k + 1) % 4 * (kLanes / 4) + (2 * k + 1) / 4);
  }
  const VULong m0 = VULong{} + kPhiloxM0, m1 = VULong{} + kPhiloxM1;
  for (int g = 0; g < groups; ++g, i += kLanes) {
    // Only the low 32 bits of a lane count; what the products leave above them is never read.
    const uint64_t low = static_cast<uint32_t>(i);
    VULong a0 = even + low, a1 = VULong{} + (i >> 32), a2 = VULong{} + key.draw, a3 = VULong{} + key.stream;
    VULong b0 = odd + low, b1 = a1, b2 = a2, b3 = a3;
#pragma GCC unroll 10
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const VULong pa0 = multiply_wide(a0, m0), pa1 = multiply_wide(a2, m1);
      const VULong pb0 = multiply_wide(b0, m0), pb1 = multiply_wide(b2, m1);
      a0 = (pa1 >> 32) ^ a1 ^ k0[r];
      a1 = pa1;
      a2 = (pa0 >> 32) ^ a3 ^ k1[r];
      a3 = pa0;
      b0 = (pb1 >> 32) ^ b1 ^ k0[r];
      b1 = pb1;
      b2 = (pb0 >> 32) ^ b3 ^ k1[r];
      b3 = pb0;
    }
    store_raw(words.w[0] + g * kLanes, pack_low(a0, b0));
    store_raw(words.w[1] + g * kLanes, pack_low(a1, b1));
    store_raw(words.w[2] + g * kLanes, pack_low(a2, b2));
    store_raw(words.w[3] + g * kLanes, pack_low(a3, b3));
  }
}

// The kBlock numbers of group g, in memory order.
template <bool kUniform>
GF_INLINE void noise_block(const NoiseWords& words, int g, VFloat (&z)[4]) {
  VUInt w[4];
  for (int j = 0; j < 4; ++j) w[j] = load_raw<VUInt>(words.w[j] + g * kLanes);
  if constexpr (kUniform) {
    for (int j = 0; j < 4; ++j) z[j] = VectorMath::from_signed((VInt)(w[j] >> 8)) * 0x1p-24f;
  } else {
    box_muller<VectorMath>(w[0], w[1], z[0], z[1]);
    box_muller<VectorMath>(w[2], w[3], z[2], z[3]);
  }
  transpose_blocks(z);
}

// Logical elements begin .. begin + n - 1 into out; any begin and n.
template <bool kUniform>
[[gnu::noinline]] inline void noise_range(const NoiseKey& key, int64_t begin, int64_t n, float* out) {
  NoiseWords words;
  const int64_t end = begin + n;
  for (int64_t at = begin / kBlock * kBlock; at < end; at += kNoiseTile) {
    const int64_t stop = at + kNoiseTile < end ? at + kNoiseTile : end;
    make_words(key, static_cast<uint64_t>(at) / 4, static_cast<int>((stop - at + kBlock - 1) / kBlock), words);
    for (int64_t e = at; e < stop; e += kBlock) {
      VFloat z[4];
      noise_block<kUniform>(words, static_cast<int>((e - at) / kBlock), z);
      if (e >= begin && e + kBlock <= end) {
        for (int k = 0; k < 4; ++k) store(out + (e - begin) + k * kLanes, z[k]);
      } else {
        const int64_t from = e < begin ? begin : e, to = e + kBlock < end ? e + kBlock : end;
        alignas(64) float whole[kBlock];
        for (int k = 0; k < 4; ++k) store(whole + k * kLanes, z[k]);
        __builtin_memcpy(out + (from - begin), whole + (from - e), static_cast<size_t>(to - from) * sizeof(float));
      }
    }
  }
}

// Storage positions begin .. begin + n - 1 (n at most kNoiseLaidOut) of a sample that lies channels_last.
template <bool kUniform>
[[gnu::noinline]] inline void noise_channels_last(const NoiseKey& key, int64_t per_sample, int64_t channels, int64_t begin, int64_t n,
                                                  float* out) {
  alignas(64) float row[kNoiseLaidOut];
  const int64_t spatial = per_sample / channels, end = begin + n;
  for (int64_t c = 0; c < channels; ++c) {
    // Positions s * channels + c inside [begin, end).
    const int64_t first = begin > c ? (begin - c + channels - 1) / channels : 0;
    const int64_t last = end > c ? (end - c + channels - 1) / channels : 0;
    if (first >= last) continue;
    noise_range<kUniform>(key, c * spatial + first, last - first, row);
    float* to = out + (first * channels + c - begin);
    for (int64_t s = 0; s < last - first; ++s) to[s * channels] = row[s];
  }
}

}  // namespace
}  // namespace genfast
