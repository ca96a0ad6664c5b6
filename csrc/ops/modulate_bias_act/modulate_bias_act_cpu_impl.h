// modulate_bias_act, compiled once per instruction set.
#pragma once
#include "../../core/vec_math.h"
#include "modulate_bias_act_cpu.h"

namespace genfast {
namespace {

// n elements of T or of a storage type, n at most a vector's; lanes beyond them are 0.
template <class T, class S>
__attribute__((noinline)) Vec<T> load_part(const S* from, int64_t n) {
  S whole[kCount<T>]{};
  __builtin_memcpy(whole, from, static_cast<size_t>(n) * sizeof(S));
  return load<T>(whole);
}
template <class T, class S>
__attribute__((noinline)) void store_part(S* to, Vec<T> v, int64_t n) {
  S whole[kCount<T>];
  store(whole, v);
  __builtin_memcpy(to, whole, static_cast<size_t>(n) * sizeof(S));
}
template <bool kWhole, class T, class S>
GF_INLINE Vec<T> load_some(const S* from, int64_t n) {
  return kWhole ? load<T>(from) : load_part<T>(from, n);
}
template <bool kWhole, class T, class S>
GF_INLINE void store_some(S* to, Vec<T> v, int64_t n) {
  kWhole ? store(to, v) : store_part<T>(to, v, n);
}

template <class T>
struct Modulation {
  Vec<T> scale, shift, post;  // shift: noise + b
};
template <class T>
struct ModulateResult {
  Vec<T> out{}, g{}, gx{}, post{};  // backward: what is added to the gradient of the noise and to the three sums
};
template <class T>
struct Curves {
  Curve<T> value, slope;
  explicit Curves(const Curve<double>& c)
      : value{c.act, 0, c.clamped, static_cast<T>(c.alpha), static_cast<T>(c.gain), static_cast<T>(c.clamp)}, slope(value) {
    slope.order = 1;
  }
};

template <class T, bool kBackward>
GF_INLINE ModulateResult<T> modulate(const Curves<T>& curves, const Modulation<T>& m, bool posts, Vec<T> x, Vec<T> dy) {
  const Vec<T> u = fma(x, m.scale, m.shift);
  if constexpr (!kBackward) return {curve_of<T>(curves.value, u) * m.post};
  const Vec<T> g = times_slope(dy * m.post, curve_of<T>(curves.slope, u));
  return {g * m.scale, g, g * x, posts ? dy * curve_of<T>(curves.value, u) : Vec<T>{}};
}

template <class T>
GF_INLINE Vec<T> only(Vec<T> v, int64_t n) {  // the first n lanes
  for (int64_t i = n; i < kCount<T>; ++i) v[i] = 0;
  return v;
}

template <class T>
Vec<T> same(const T* at, int64_t i, T otherwise) {
  return splat(at ? at[i] : otherwise);
}

// Channel by channel; each one's coefficients in registers, the noise and its gradient in L1.
template <class T, bool kBackward, class S>
void planes(const ModulateTask& t, const Curves<T>& curves, int64_t sample, int64_t begin, int64_t pixels, T* sums) {
  constexpr int kWidth = kCount<T>;
  const ModulateParams& p = t.p;
  const T* noise = p.noise ? static_cast<const T*>(p.noise) + (p.noise_of_all ? 0 : sample) * p.inner + begin : nullptr;
  T* grad_noise = p.grad_noise ? static_cast<T*>(p.grad_noise) + sample * p.inner + begin : nullptr;
  if (grad_noise) __builtin_memset(grad_noise, 0, static_cast<size_t>(pixels) * sizeof(T));
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t row = sample * p.channels + c, offset = row * p.inner + begin;
    const S *x = static_cast<const S*>(p.x) + offset, *dy = kBackward ? static_cast<const S*>(p.dy) + offset : nullptr;
    S* out = static_cast<S*>(p.out) + offset;
    const Vec<T> b = same(static_cast<const T*>(p.b), c, T(0));
    Modulation<T> m{same(static_cast<const T*>(p.scale), row, T(1)), b, same(static_cast<const T*>(p.post_scale), row, T(1))};
    Vec<T> sum[kModulateSums]{};
    const auto step = [&]<bool kWhole>(int64_t i) __attribute__((always_inline)) {
      const int64_t n = pixels - i;
      if (noise) m.shift = load_some<kWhole, T>(noise + i, n) + b;
      ModulateResult<T> r = modulate<T, kBackward>(curves, m, p.post_scale, load_some<kWhole, T>(x + i, n),
                                                   kBackward ? load_some<kWhole, T>(dy + i, n) : Vec<T>{});
      store_some<kWhole, T>(out + i, r.out, n);
      if constexpr (!kBackward) return;
      if (grad_noise) store_some<kWhole, T>(grad_noise + i, load_some<kWhole, T>(grad_noise + i, n) + r.g, n);
      if constexpr (!kWhole) r = {r.out, only<T>(r.g, n), only<T>(r.gx, n), only<T>(r.post, n)};
      sum[0] += r.g;
      sum[1] += r.gx;
      sum[2] += r.post;
    };
    int64_t i = 0;
    for (; i + kWidth <= pixels; i += kWidth) step.template operator()<true>(i);
    if (i < pixels) step.template operator()<false>(i);
    for (int k = 0; kBackward && k < kModulateSums; ++k) sums[k * p.channels + c] = total<T>(sum[k]);
  }
}

// Pixel by pixel; the coefficients and sums of all channels in L1.
template <class T, bool kBackward, class S>
void pixels_of(const ModulateTask& t, const Curves<T>& curves, int64_t sample, int64_t begin, int64_t pixels, T* sums) {
  constexpr int kWidth = kCount<T>;
  const ModulateParams& p = t.p;
  const int64_t channels = p.channels;
  const T* scale = p.scale ? static_cast<const T*>(p.scale) + sample * channels : nullptr;
  const T* post = p.post_scale ? static_cast<const T*>(p.post_scale) + sample * channels : nullptr;
  const T* b = static_cast<const T*>(p.b);
  const T* noise = p.noise ? static_cast<const T*>(p.noise) + (p.noise_of_all ? 0 : sample) * p.inner : nullptr;
  T* grad_noise = p.grad_noise ? static_cast<T*>(p.grad_noise) + sample * p.inner : nullptr;
  if (sums) __builtin_memset(sums, 0, static_cast<size_t>(kModulateSums * channels) * sizeof(T));
  for (int64_t pixel = begin; pixel < begin + pixels; ++pixel) {
    const int64_t offset = (sample * p.inner + pixel) * channels;
    const S *x = static_cast<const S*>(p.x) + offset, *dy = kBackward ? static_cast<const S*>(p.dy) + offset : nullptr;
    S* out = static_cast<S*>(p.out) + offset;
    const Vec<T> shift = same(noise, pixel, T(0));
    Vec<T> all{};
    const auto step = [&]<bool kWhole>(int64_t c) __attribute__((always_inline)) {
      const int64_t n = channels - c;
      const Modulation<T> m{scale ? load_some<kWhole, T>(scale + c, n) : splat(T(1)), b ? shift + load_some<kWhole, T>(b + c, n) : shift,
                            post ? load_some<kWhole, T>(post + c, n) : splat(T(1))};
      ModulateResult<T> r =
          modulate<T, kBackward>(curves, m, post, load_some<kWhole, T>(x + c, n), kBackward ? load_some<kWhole, T>(dy + c, n) : Vec<T>{});
      store_some<kWhole, T>(out + c, r.out, n);
      if constexpr (!kBackward) return;
      const Vec<T> terms[kModulateSums] = {r.g, r.gx, r.post};
      for (int k = 0; k < (post ? 3 : 2); ++k) {
        T* at = sums + k * channels + c;
        store_some<kWhole, T>(at, load_some<kWhole, T>(at, n) + terms[k], n);
      }
      all += kWhole ? r.g : only<T>(r.g, n);
    };
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) step.template operator()<true>(c);
    if (c < channels) step.template operator()<false>(c);
    if (kBackward && grad_noise) grad_noise[pixel] = total<T>(all);
  }
}

template <class T, class S>
void units_of(const ModulateTask& t, int64_t first, int64_t last) {
  const ModulateParams& p = t.p;
  const Curves<T> curves(p.curve);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t sample = unit / t.chunks, begin = unit % t.chunks * t.chunk, pixels = at_most(t.chunk, p.inner - begin);
    T* sums = p.dy ? static_cast<T*>(t.partial) + unit * kModulateSums * p.channels : nullptr;
    if (p.channels_last) {
      (p.dy ? pixels_of<T, true, S> : pixels_of<T, false, S>)(t, curves, sample, begin, pixels, sums);
    } else {
      (p.dy ? planes<T, true, S> : planes<T, false, S>)(t, curves, sample, begin, pixels, sums);
    }
  }
}

void units(const ModulateTask& t, int64_t first, int64_t last) {
  switch (t.p.dtype) {
    case DType::F32:
      return units_of<float, float>(t, first, last);
    case DType::F64:
      return units_of<double, double>(t, first, last);
    case DType::BF16:
      return units_of<float, BFloat16>(t, first, last);
    case DType::F16:
      return units_of<float, Float16>(t, first, last);
  }
}

}  // namespace
}  // namespace genfast
