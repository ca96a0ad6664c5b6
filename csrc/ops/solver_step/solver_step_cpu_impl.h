// The arithmetic of docs/solver-step.md, compiled once per instruction set. A tile of kTileVectors vectors stays in registers: its
// inputs are read once, the terms of all outputs are accumulated, its outputs are written once. Which terms a row has is decided by
// branches that go the same way for every tile.
#pragma once
#include "../../core/noise_vec.h"
#include "solver_step_cpu.h"

namespace genfast {
namespace {

constexpr int kTileVectors = 2;
template <class T>
constexpr int kTile = kTileVectors * kCount<T>;

// Pointers to element 0 of one sample (or of its stand-in for a tail).
template <class S, class M>
struct Sources {
  const S* x;
  const M* cond;
  const M* uncond;
};

template <class S, class M>
Sources<S, M> sources_of(const Step& s, int64_t sample) {
  const int64_t at = sample * s.per_sample;
  const M* uncond = static_cast<const M*>(s.p->uncond);
  return {static_cast<const S*>(s.p->slot[0]) + at, static_cast<const M*>(s.p->cond) + at, uncond ? uncond + at : nullptr};
}

// x, m and d of one vector.
template <class T>
struct Denoised {
  Vec<T> x, m, d;
};

// The part of a row that leads to d, with the two factors of one sample.
template <class T>
struct Prediction {
  T ax, am, guidance, clip, factor, threshold, start;
  bool with_ax, with_am, with_clip, with_factor, with_threshold, needs_x, needs_d, needs_m;

  Prediction(const Step& s, int64_t sample)
      : ax(static_cast<T>(s.ax)),
        am(static_cast<T>(s.am)),
        guidance(static_cast<T>(s.guidance)),
        clip(static_cast<T>(s.clip)),
        factor(s.rescale ? static_cast<T>(s.factors[2 * sample]) : T(1)),
        threshold(s.threshold ? static_cast<T>(s.factors[2 * sample + 1]) : T(1)),
        // A sum begins with -0: -0 + v is v for every v, so its first term needs no case of its own. An empty sum is +0.
        start(s.ax != 0 || s.am != 0 ? T(-0.0) : T(0)),
        with_ax(s.ax != 0),
        with_am(s.am != 0),
        with_clip(s.clip != 0),
        with_factor(s.rescale),
        with_threshold(s.threshold),
        needs_x(s.needs_x),
        needs_d(s.needs_d),
        needs_m(s.needs_m) {}

  template <class S, class M>
  GF_INLINE Denoised<T> at(const Sources<S, M>& from, int64_t i) const {
    Vec<T> x{}, m{}, d{};
    if (needs_x) x = load<T>(from.x + i);
    if (needs_m) {
      m = load<T>(from.cond + i);
      if (from.uncond) {
        const Vec<T> u = load<T>(from.uncond + i);
        m = u + guidance * (m - u);
      }
      if (with_factor) m = m * factor;
    }
    if (needs_d) {
      d = splat(start);
      if (with_ax) d = d + ax * x;
      if (with_am) d = d + am * m;
      if (with_clip) d = clamp_lanes(d, splat(-clip), splat(clip));
      if (with_threshold) d = clamp_lanes(d, splat(-threshold), splat(threshold)) / threshold;
    }
    return {x, m, d};
  }
};

// What a row adds up and where it goes; pointers to element 0 of the sample, or of its stand-in for a tail. Outputs that the row
// does not have keep zero coefficients.
template <class T, class S>
struct Sums {
  T start[kMaxOutputs]{}, x[kMaxOutputs]{}, d[kMaxOutputs]{}, m[kMaxOutputs]{}, noise[kMaxOutputs]{};
  T history[kMaxHistory][kMaxOutputs]{};
  const S* from[kMaxHistory];
  S* to[kMaxOutputs]{};
  bool stream[kMaxOutputs]{};
  int terms, outputs;

  Sums(const Step& s, int64_t sample) : terms(s.history), outputs(s.outputs) {
    for (int k = 0; k < outputs; ++k) {
      bool any = false;
      for (double c : s.coef[k]) any |= c != 0;
      start[k] = any ? T(-0.0) : T(0);
      x[k] = static_cast<T>(s.coef[k][kTermX]);
      d[k] = static_cast<T>(s.coef[k][kTermD]);
      m[k] = static_cast<T>(s.coef[k][kTermM]);
      noise[k] = static_cast<T>(s.coef[k][kTermNoise]);
      for (int j = 0; j < terms; ++j) history[j][k] = static_cast<T>(s.coef[k][kTermH + j]);
      to[k] = static_cast<S*>(s.output_slot[k]) + sample * s.per_sample;
      stream[k] = s.stream[k];
    }
    for (int j = 0; j < terms; ++j) from[j] = static_cast<const S*>(s.history_slot[j]) + sample * s.per_sample;
  }
};

// One tile from element i; z is its noise, read only where an output uses it. kOutputs is 1 or 2 for rows of exactly that many outputs,
// and kMaxOutputs for any row: each version takes seconds to compile, so there are only those that a benchmark can tell apart.
template <class T, class S, class M, int kOutputs>
GF_INLINE void tile(const Prediction<T>& prediction, const Sources<S, M>& from, const Sums<T, S>& sums, int64_t i, const Vec<T>* z) {
  constexpr int kWidth = kCount<T>;
  Vec<T> acc[kOutputs][kTileVectors]{};
  unroll<kTileVectors>([&]<int v>() __attribute__((always_inline)) {
    const Denoised<T> in = prediction.at(from, i + v * kWidth);
    unroll<kOutputs>([&]<int k>() __attribute__((always_inline)) {
      if (kOutputs == kMaxOutputs && k >= sums.outputs) return;
      Vec<T> sum = splat(sums.start[k]);
      if (sums.x[k] != 0) sum = sum + sums.x[k] * in.x;
      if (sums.d[k] != 0) sum = sum + sums.d[k] * in.d;
      if (sums.m[k] != 0) sum = sum + sums.m[k] * in.m;
      acc[k][v] = sum;
    });
  });
  for (int j = 0; j < sums.terms; ++j) {
    Vec<T> h[kTileVectors];
    unroll<kTileVectors>([&]<int v>() __attribute__((always_inline)) { h[v] = load<T>(sums.from[j] + i + v * kWidth); });
    unroll<kOutputs>([&]<int k>() __attribute__((always_inline)) {
      if (sums.history[j][k] != 0)
        unroll<kTileVectors>([&]<int v>() __attribute__((always_inline)) { acc[k][v] = acc[k][v] + sums.history[j][k] * h[v]; });
    });
  }
  unroll<kOutputs>([&]<int k>() __attribute__((always_inline)) {
    if (kOutputs == kMaxOutputs && k >= sums.outputs) return;
    if (sums.noise[k] != 0)
      unroll<kTileVectors>([&]<int v>() __attribute__((always_inline)) { acc[k][v] = acc[k][v] + sums.noise[k] * z[v]; });
    unroll<kTileVectors>([&]<int v>() __attribute__((always_inline)) {
      S* to = sums.to[k] + i + v * kWidth;
      sums.stream[k] ? store_stream(to, acc[k][v]) : store(to, acc[k][v]);
    });
  });
}

// The last n < kTile elements: copied to where a whole tile may be read and written.
template <class T, class S, class M>
[[gnu::noinline]] void tail(const Prediction<T>& prediction, const Sources<S, M>& from, const Sums<T, S>& sums, int64_t i, int64_t n,
                            const Vec<T>* z) {
  alignas(64) S x[kTile<T>]{}, history[kMaxHistory][kTile<T>]{}, out[kMaxOutputs][kTile<T>];
  alignas(64) M cond[kTile<T>]{}, uncond[kTile<T>]{};
  const size_t count = static_cast<size_t>(n);
  Sources<S, M> padded{x, cond, from.uncond ? uncond : nullptr};
  Sums<T, S> local = sums;
  if (prediction.needs_x) __builtin_memcpy(x, from.x + i, count * sizeof(S));
  if (prediction.needs_m) {
    __builtin_memcpy(cond, from.cond + i, count * sizeof(M));
    if (from.uncond) __builtin_memcpy(uncond, from.uncond + i, count * sizeof(M));
  }
  for (int j = 0; j < sums.terms; ++j) {
    __builtin_memcpy(history[j], sums.from[j] + i, count * sizeof(S));
    local.from[j] = history[j];
  }
  for (int k = 0; k < sums.outputs; ++k) {
    local.to[k] = out[k];
    local.stream[k] = false;
  }
  tile<T, S, M, kMaxOutputs>(prediction, padded, local, 0, z);
  for (int k = 0; k < sums.outputs; ++k) __builtin_memcpy(sums.to[k] + i, out[k], count * sizeof(S));
}

// ---- what follows a row: the next model input and the watch, both from output 0 as it was rounded --------------------------

template <class T, class S, class I>
void write_input(const Step& s, const S* out, int64_t at, int64_t n) {
  const T c_in = static_cast<T>(s.next_c_in);
  const int64_t total = s.batch * s.per_sample;
  for (int copy = 0; copy < s.p->copies; ++copy) {
    I* to = static_cast<I*>(s.p->model_input) + copy * total + at;
    int64_t i = 0;
    for (; i + kCount<T> <= n; i += kCount<T>) store(to + i, c_in * load<T>(out + i));
    if (i == n) continue;
    S in[kCount<T>]{};
    I result[kCount<T>];
    __builtin_memcpy(in, out + i, static_cast<size_t>(n - i) * sizeof(S));
    store(result, c_in * load<T>(in));
    __builtin_memcpy(to + i, result, static_cast<size_t>(n - i) * sizeof(I));
  }
}

template <class T, class S>
bool all_finite(const S* out, int64_t n) {
  // v - v is 0 for finite v and NaN otherwise.
  VecBits<T> bad{};
  int64_t i = 0;
  for (; i + kCount<T> <= n; i += kCount<T>) {
    const Vec<T> v = load<T>(out + i);
    bad |= (v - v) != Vec<T>{};
  }
  if (i < n) {
    S in[kCount<T>]{};
    __builtin_memcpy(in, out + i, static_cast<size_t>(n - i) * sizeof(S));
    const Vec<T> v = load<T>(in);
    bad |= (v - v) != Vec<T>{};
  }
  return !any(bad);
}

template <class T, class S>
__attribute__((noinline)) void after_row(const Step& s, const S* out, int64_t sample, int64_t begin, int64_t n) {
  if (s.p->watch && !all_finite<T>(out + begin, n)) {
    // Threads that share a sample all write the same row.
    int64_t* watch = s.p->watch + sample;
    if (__atomic_load_n(watch, __ATOMIC_RELAXED) > s.row) __atomic_store_n(watch, s.row, __ATOMIC_RELAXED);
  }
  if (!s.p->model_input || s.next_c_in == 0) return;
  const int64_t at = sample * s.per_sample + begin;
  switch (s.p->input) {
    case DType::F32:
      return write_input<T, S, float>(s, out + begin, at, n);
    case DType::F64:
      return write_input<T, S, double>(s, out + begin, at, n);
    case DType::BF16:
      return write_input<T, S, BFloat16>(s, out + begin, at, n);
    case DType::F16:
      return write_input<T, S, Float16>(s, out + begin, at, n);
  }
}

// ---- a row over elements begin .. end - 1 of a sample; begin is a multiple of kChunk ----------------------------------------

template <class T, class S, class M, int kOutputs, bool kNoise>
void row_range(const Step& s, int64_t sample, int64_t begin, int64_t end) {
  const Prediction<T> prediction(s, sample);
  const Sources<S, M> from = sources_of<S, M>(s, sample);
  const Sums<T, S> sums(s, sample);
  const bool follows = sums.outputs > 0 && (s.p->watch || (s.p->model_input && s.next_c_in != 0));
  const NoiseKey key{kNoise ? static_cast<uint64_t>(s.p->seeds[sample]) : 0, 0, static_cast<uint32_t>(s.draw)};
  // In C-order the normals go from the words through registers into the sum; otherwise they are laid out first.
  const bool direct = __is_same(T, float) && s.p->channels == 1;
  NoiseWords words;
  alignas(64) float laid_out[kNoise ? kNoiseLaidOut : 1];
  // Pieces are small enough that what follows a row finds its output in L1.
  const int64_t length = kNoise && !direct ? kNoiseLaidOut : kNoiseTile;

  for (int64_t piece = begin; piece < end; piece += length) {
    const int64_t stop = piece + length < end ? piece + length : end;
    int64_t i = piece;
    if constexpr (kNoise) {
      if (direct) {
        make_words(key, static_cast<uint64_t>(piece) / 4, static_cast<int>((stop - piece + kBlock - 1) / kBlock), words);
      } else if (s.p->channels == 1) {
        noise_range<false>(key, piece, stop - piece, laid_out);
      } else {
        noise_channels_last<false>(key, s.per_sample, s.p->channels, piece, stop - piece, laid_out);
      }
      Vec<T> z[4];
      constexpr int kFour = 4 * kCount<T>;
      for (; i < stop; i += kFour) {
        if constexpr (__is_same(T, float)) {
          if (direct) noise_block<false>(words, static_cast<int>((i - piece) / kBlock), z);
        }
        if (!direct) {
          for (int v = 0; v < 4; ++v) z[v] = load<T>(laid_out + (i - piece) + v * kCount<T>);
        }
        for (int v = 0; v < 4; v += kTileVectors) {
          const int64_t e = i + v * kCount<T>;
          if (e + kTile<T> <= stop) {
            tile<T, S, M, kOutputs>(prediction, from, sums, e, z + v);
          } else if (e < stop) {
            tail<T, S, M>(prediction, from, sums, e, stop - e, z + v);
          }
        }
      }
    } else {
      for (; i + kTile<T> <= stop; i += kTile<T>) tile<T, S, M, kOutputs>(prediction, from, sums, i, nullptr);
      if (i < stop) tail<T, S, M>(prediction, from, sums, i, stop - i, nullptr);
    }
    if (follows) after_row<T>(s, sums.to[0], sample, piece, stop - piece);
  }
}

// Calls f<T, S, M>() for the state's and the model's dtypes.
template <class F>
GF_INLINE auto visit_dtypes(const SolverStepParams& p, const F& f) {
  const auto with_state = [&]<class S>() {
    switch (p.model) {
      case DType::BF16:
        return f.template operator()<float, S, BFloat16>();
      case DType::F16:
        return f.template operator()<float, S, Float16>();
      default:
        return f.template operator()<float, S, float>();
    }
  };
  switch (p.state) {
    case DType::F64:
      return p.model == DType::F64 ? f.template operator()<double, double, double>() : f.template operator()<double, double, float>();
    case DType::BF16:
      return with_state.template operator()<BFloat16>();
    case DType::F16:
      return with_state.template operator()<Float16>();
    default:
      return with_state.template operator()<float>();
  }
}

void rows(const Step& s, int64_t first_unit, int64_t last_unit) {
  using Range = void (*)(const Step&, int64_t, int64_t, int64_t);
  const Range range = visit_dtypes(*s.p, [&]<class T, class S, class M>() -> Range {
    if (s.noise) return row_range<T, S, M, kMaxOutputs, true>;
    constexpr Range table[] = {row_range<T, S, M, 1, false>, row_range<T, S, M, 2, false>, row_range<T, S, M, kMaxOutputs, false>};
    return table[s.outputs - 1];
  });
  const int64_t chunks = chunks_per_sample(s.per_sample);
  while (first_unit < last_unit) {
    const int64_t sample = first_unit / chunks, chunk = first_unit % chunks;
    const int64_t stop = chunks - chunk < last_unit - first_unit ? chunks : chunk + (last_unit - first_unit);
    range(s, sample, chunk * kChunk, stop * kChunk < s.per_sample ? stop * kChunk : s.per_sample);
    first_unit += stop - chunk;
  }
  stream_fence();
}

// ---- rescale: sums of the conditional and the guided output ------------------------------------------------------------------

template <class T>
struct Accumulators {
  alignas(64) double sum[4][kSumLanes];

  GF_INLINE void add(int which, int lane, Vec<T> v) {
    double* sums = sum[which] + lane;
    double* squares = sum[which + 1] + lane;
    if constexpr (__is_same(T, double)) {
      store(sums, load<double>(sums) + v);
      store(squares, load<double>(squares) + v * v);
    } else {
      alignas(64) float lanes[kLanes];
      store(lanes, v);
      for (int half = 0; half < kLanes; half += kCount<double>) {
        const VDouble w = load<double>(lanes + half);
        store(sums + half, load<double>(sums + half) + w);
        store(squares + half, load<double>(squares + half) + w * w);
      }
    }
  }
};

template <class T, class S, class M>
void sum_units(const Step& s, double* sums, int64_t first_unit, int64_t last_unit) {
  const int64_t chunks = chunks_per_sample(s.per_sample);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t sample = unit / chunks, begin = unit % chunks * kChunk;
    const int64_t n = begin + kChunk < s.per_sample ? kChunk : s.per_sample - begin;
    const Sources<S, M> from = sources_of<S, M>(s, sample);
    const M* cond = from.cond + begin;
    const M* uncond = from.uncond + begin;
    const T guidance = static_cast<T>(s.guidance);
    Accumulators<T> acc{};
    int64_t i = 0;
    for (; i + kCount<T> <= n; i += kCount<T>) {
      const Vec<T> c = load<T>(cond + i), u = load<T>(uncond + i);
      acc.add(0, static_cast<int>(i % kSumLanes), c);
      acc.add(2, static_cast<int>(i % kSumLanes), u + guidance * (c - u));
    }
    if (i < n) {
      M c[kCount<T>]{}, u[kCount<T>]{};
      __builtin_memcpy(c, cond + i, static_cast<size_t>(n - i) * sizeof(M));
      __builtin_memcpy(u, uncond + i, static_cast<size_t>(n - i) * sizeof(M));
      Vec<T> vc = load<T>(c), vu = load<T>(u), guided = vu + guidance * (vc - vu);
      for (int64_t k = n - i; k < kCount<T>; ++k) guided[k] = 0;  // adding zero leaves a lane as it is
      acc.add(0, static_cast<int>(i % kSumLanes), vc);
      acc.add(2, static_cast<int>(i % kSumLanes), guided);
    }
    for (int which = 0; which < 4; ++which) {
      double* lane = acc.sum[which];
      for (int half = kSumLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
      }
      sums[4 * unit + which] = lane[0];
    }
  }
}

void sums(const Step& s, double* out, int64_t first_unit, int64_t last_unit) {
  visit_dtypes(*s.p, [&]<class T, class S, class M>() { sum_units<T, S, M>(s, out, first_unit, last_unit); });
}

// ---- dynamic threshold: |d| before the threshold itself ----------------------------------------------------------------------

template <class T>
Prediction<T> before_threshold(const Step& s, int64_t sample) {
  Prediction<T> prediction(s, sample);
  prediction.with_threshold = false;
  prediction.needs_x = s.ax != 0;
  prediction.needs_m = s.am != 0;
  prediction.needs_d = true;
  return prediction;
}

// Elements i, i + stride, ... (n <= kTile of them) side by side.
template <class T, class S, class M>
struct Gathered {
  alignas(64) S x[kTile<T>]{};
  alignas(64) M cond[kTile<T>]{}, uncond[kTile<T>]{};

  Sources<S, M> gather(const Sources<S, M>& from, int64_t i, int64_t stride, int64_t n) {
    for (int64_t k = 0; k < n; ++k, i += stride) {
      x[k] = from.x[i];
      cond[k] = from.cond[i];
      if (from.uncond) uncond[k] = from.uncond[i];
    }
    return {x, cond, from.uncond ? uncond : nullptr};
  }
};

void magnitudes(const Step& s, int64_t sample, int64_t stride, int64_t count, void* out) {
  visit_dtypes(*s.p, [&]<class T, class S, class M>() {
    const Prediction<T> prediction = before_threshold<T>(s, sample);
    const Sources<S, M> from = sources_of<S, M>(s, sample);
    Gathered<T, S, M> few;
    for (int64_t k = 0; k < count; k += kCount<T>) {
      const int64_t n = count - k < kCount<T> ? count - k : kCount<T>;
      T result[kCount<T>];
      store(result, magnitude(prediction.at(few.gather(from, k * stride, stride, n), 0).d));
      __builtin_memcpy(static_cast<T*>(out) + k, result, static_cast<size_t>(n) * sizeof(T));
    }
  });
}

int64_t candidates(const Step& s, int64_t sample, int64_t begin, int64_t end, double bound, void* out) {
  return visit_dtypes(*s.p, [&]<class T, class S, class M>() -> int64_t {
    const Prediction<T> prediction = before_threshold<T>(s, sample);
    const Sources<S, M> from = sources_of<S, M>(s, sample);
    const Vec<T> least = splat(static_cast<T>(bound));
    T* to = static_cast<T*>(out);
    VecBits<T> nan{};
    int64_t i = begin;
    for (; i + kCount<T> <= end; i += kCount<T>) {
      const Vec<T> d = prediction.at(from, i).d;
      nan |= d != d;
      to += append_at_least(to, magnitude(d), least);
    }
    if (i < end) {
      Gathered<T, S, M> few;
      Vec<T> d = prediction.at(few.gather(from, i, 1, end - i), 0).d;
      for (int64_t k = 0; k < end - i; ++k) {
        nan |= Vec<T>{} + d[k] != Vec<T>{} + d[k];
        const T value = d[k] < 0 ? -d[k] : d[k];
        if (value >= least[0]) *to++ = value;
      }
    }
    return any(nan) ? -1 : to - static_cast<T*>(out);
  });
}

}  // namespace
}  // namespace genfast
