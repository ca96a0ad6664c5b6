// The noise fill, compiled once per instruction set.
#pragma once
#include "../../core/noise_vec.h"
#include "noise_cpu.h"

namespace genfast {
namespace {

template <class S, bool kUniform>
void fill_range(const NoiseParams& p, int64_t sample, int64_t begin, int64_t end) {
  const NoiseKey key{static_cast<uint64_t>(p.seeds[sample]), p.stream, p.draw};
  S* out = static_cast<S*>(p.out) + sample * p.per_sample;
  alignas(64) float z[kNoiseLaidOut];
  for (int64_t at = begin; at < end; at += kNoiseLaidOut) {
    const int64_t n = end - at < kNoiseLaidOut ? end - at : kNoiseLaidOut;
    if (p.channels > 1) {
      noise_channels_last<kUniform>(key, p.per_sample, p.channels, at, n, z);
    } else {
      noise_range<kUniform>(key, at, n, z);
    }
    if constexpr (kUniform && sizeof(S) == 2) {
      for (int64_t e = 0; e < n; ++e) z[e] = as_float(as_bits(z[e]) & uniform_bits<S>());
    }
    int64_t e = 0;
    for (; e + kLanes <= n; e += kLanes) store(out + at + e, load<float>(z + e));
    if (e == n) continue;
    VFloat last{};
    __builtin_memcpy(&last, z + e, static_cast<size_t>(n - e) * sizeof(float));
    S whole[kLanes];
    store(whole, last);
    __builtin_memcpy(out + at + e, whole, static_cast<size_t>(n - e) * sizeof(S));
  }
}

template <class S>
void fill_units(const NoiseParams& p, int64_t first_unit, int64_t last_unit) {
  const int64_t units = (p.per_sample + kNoiseUnit - 1) / kNoiseUnit;
  while (first_unit < last_unit) {
    const int64_t sample = first_unit / units, unit = first_unit % units;
    const int64_t stop = units - unit < last_unit - first_unit ? units : unit + (last_unit - first_unit);
    const int64_t end = stop * kNoiseUnit < p.per_sample ? stop * kNoiseUnit : p.per_sample;
    p.uniform ? fill_range<S, true>(p, sample, unit * kNoiseUnit, end) : fill_range<S, false>(p, sample, unit * kNoiseUnit, end);
    first_unit += stop - unit;
  }
}

void fill(const NoiseParams& p, int64_t first_unit, int64_t last_unit) {
  switch (p.dtype) {
    case DType::F32:
      return fill_units<float>(p, first_unit, last_unit);
    case DType::F64:
      return fill_units<double>(p, first_unit, last_unit);
    case DType::BF16:
      return fill_units<BFloat16>(p, first_unit, last_unit);
    case DType::F16:
      return fill_units<Float16>(p, first_unit, last_unit);
  }
}

}  // namespace
}  // namespace genfast
