// upfirdn2d, compiled once per instruction set. Planes: input rows are widened into padded rows, over which vectors of outputs move without
// a case for the border. Channels last: vectors run along the channels. A separable filter goes along x into lines of intermediate
// results, then along y; any other filter goes along both at once.
#pragma once
#include "../../core/vec_math.h"
#include "upfirdn2d_cpu.h"

namespace genfast {
namespace {

template <class V, int... i>
GF_INLINE V interleaved_low(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * static_cast<int>(sizeof...(i)))...);
}
template <class V, int... i>
GF_INLINE V interleaved_high(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = static_cast<int>(sizeof...(i));
  return __builtin_shufflevector(a, b, (n / 2 + i / 2 + i % 2 * n)...);
}

// Element `start` and every second one after it of a and b in a row.
template <class V, int... i>
GF_INLINE V every_second(V a, V b, int start, std::integer_sequence<int, i...>) {
  return start == 0 ? __builtin_shufflevector(a, b, (2 * i)...) : __builtin_shufflevector(a, b, (2 * i + 1)...);
}

template <class T, class S>
GF_INLINE Vec<T> load_some(const S* p, int64_t n) {
  S padded[kCount<T>]{};
  __builtin_memcpy(padded, p, static_cast<size_t>(n) * sizeof(S));
  return load<T>(padded);
}
template <class T, class S>
GF_INLINE void store_some(S* p, Vec<T> v, int64_t n) {
  S whole[kCount<T>];
  store(whole, v);
  __builtin_memcpy(p, whole, static_cast<size_t>(n) * sizeof(S));
}

// to[0 .. n) = sum of the rows' elements weighted: to[i] = sum_j weight[j * step] * from[j * pitch + i].
template <class T, class From, class To>
GF_INLINE void weighted_sum(To* to, int64_t n, const From* from, int64_t pitch, const T* weight, int64_t step, int64_t count) {
  constexpr int kWidth = kCount<T>, kVectors = 4;
  int64_t i = 0;
  for (; i + kVectors * kWidth <= n; i += kVectors * kWidth) {
    Vec<T> sum[kVectors]{};
    for (int64_t j = 0; j < count; ++j) {
      const Vec<T> w = splat(weight[j * step]);
      unroll<kVectors>([&]<int v>()
                           __attribute__((always_inline)) { sum[v] = fma(w, load<T>(from + j * pitch + i + v * kWidth), sum[v]); });
    }
    unroll<kVectors>([&]<int v>() __attribute__((always_inline)) { store(to + i + v * kWidth, sum[v]); });
  }
  for (; i < n; i += kWidth) {
    const int64_t left = n - i;
    Vec<T> sum{};
    for (int64_t j = 0; j < count; ++j) {
      const From* at = from + j * pitch + i;
      sum = fma(splat(weight[j * step]), left < kWidth ? load_some<T>(at, left) : load<T>(at), sum);
    }
    left < kWidth ? store_some<T>(to + i, sum, left) : store(to + i, sum);
  }
}

// ---- planes ------------------------------------------------------------------------------------------------------------------

template <class T, class S>
void pad_row(const Upfirdn2dTask& t, const S* in, T* row) {
  const int64_t n = t.p.x.in;
  if (t.advance == 1) {
    int64_t i = 0;
    for (; i + kCount<T> <= n; i += kCount<T>) store(row + t.left + i, load<T>(in + i));
    if (i < n) store_some<T>(row + t.left + i, load_some<T>(in + i, n - i), n - i);
    return;
  }
  int64_t i = 0;
  if (t.advance == 2) {
    constexpr auto lanes = std::make_integer_sequence<int, kCount<T>>{};
    for (; i + 2 * kCount<T> <= n; i += 2 * kCount<T>) {
      const Vec<T> a = load<T>(in + i), b = load<T>(in + i + kCount<T>);
      store(row + (t.left + i) / 2, every_second(a, b, 0, lanes));
      store(row + t.part + (t.left + i) / 2, every_second(a, b, 1, lanes));
    }
  }
  alignas(64) T chunk[kCount<T>];
  for (; i < n; i += kCount<T>) {
    const int64_t count = n - i < kCount<T> ? n - i : kCount<T>;
    store(chunk, count < kCount<T> ? load_some<T>(in + i, count) : load<T>(in + i));
    int64_t part = (t.left + i) % t.advance, at = (t.left + i) / t.advance;
    for (int64_t k = 0; k < count; ++k) {
      row[part * t.part + at] = chunk[k];
      if (++part == t.advance) {
        part = 0;
        ++at;
      }
    }
  }
}

// One output row from `count` padded rows, each with its own taps along x, one row of the filter `pitch` taps after the other.
template <class T, int kResidues, class To>
GF_INLINE void row_block(const Upfirdn2dTask& t, const T* rows, int64_t row_elements, const T* weight, int64_t pitch, int64_t count,
                         int64_t q, int64_t residue, To* to) {
  constexpr int kWidth = kCount<T>, kVectors = 4 / kResidues;
  Vec<T> sum[kResidues][kVectors]{};
  unroll<kResidues>([&]<int r>() __attribute__((always_inline)) {
    const PhaseTap *begin = t.taps + t.first[residue + r], *end = t.taps + t.first[residue + r + 1];
    for (int64_t j = 0; j < count; ++j) {
      const T* row = rows + j * row_elements + q;
      for (const PhaseTap* tap = begin; tap != end; ++tap) {
        const Vec<T> w = splat(weight[j * pitch + tap->tap]);
        unroll<kVectors>([&]<int v>()
                             __attribute__((always_inline)) { sum[r][v] = fma(w, load<T>(row + tap->offset + v * kWidth), sum[r][v]); });
      }
    }
  });
  unroll<kVectors>([&]<int v>() __attribute__((always_inline)) {
    if constexpr (kResidues == 2) {
      constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
      store(to + 2 * v * kWidth, interleaved_low(sum[0][v], sum[1][v], lanes));
      store(to + (2 * v + 1) * kWidth, interleaved_high(sum[0][v], sum[1][v], lanes));
    } else {
      store(to + v * kWidth, sum[0][v]);
    }
  });
}

template <class T, class To>
void filter_row(const Upfirdn2dTask& t, const T* rows, int64_t row_elements, const T* weight, int64_t pitch, int64_t count, To* to) {
  constexpr int64_t kOutputs = 4 * kCount<T>;
  const int64_t n = t.p.x.out;
  alignas(64) To block[kOutputs];
  if (t.residues <= 2) {
    const auto outputs = [&](int64_t q, To* at) __attribute__((always_inline)) {
      t.residues == 1 ? row_block<T, 1>(t, rows, row_elements, weight, pitch, count, q, 0, at)
                      : row_block<T, 2>(t, rows, row_elements, weight, pitch, count, q, 0, at);
    };
    int64_t o = 0;
    for (; o + kOutputs <= n; o += kOutputs) outputs(o / t.residues, to + o);
    if (o == n) return;
    outputs(o / t.residues, block);
    __builtin_memcpy(to + o, block, static_cast<size_t>(n - o) * sizeof(To));
    return;
  }
  for (int64_t r = 0; r < t.residues; ++r) {
    for (int64_t q = 0; q * t.residues + r < n; q += kOutputs) {
      row_block<T, 1>(t, rows, row_elements, weight, pitch, count, q, r, block);
      for (int64_t k = 0; k < kOutputs && (q + k) * t.residues + r < n; ++k) to[(q + k) * t.residues + r] = block[k];
    }
  }
}

// ---- channels last -----------------------------------------------------------------------------------------------------------

// One output row from input rows y.begin .. y.end - 1 of an image. `weight` is the filter's row for the first of them, `step` taps before
// the next one's.
template <class T, class S, class To>
void filter_row_of_channels(const Upfirdn2dTask& t, const S* image, FirSpan y, const T* weight, int64_t step, To* to) {
  constexpr int kWidth = kCount<T>, kVectors = 4;
  const Upfirdn2dParams& p = t.p;
  const int64_t channels = p.channels, pitch = p.x.in * channels;
  for (int64_t o = 0; o < p.x.out; ++o, to += channels) {
    const FirSpan x = fir_span(p.x, o);
    const auto sum_at = [&]<int vectors>(int64_t c, int64_t left) __attribute__((always_inline)) {
      Vec<T> sum[vectors]{};
      for (int64_t iy = y.begin; iy < y.end; ++iy) {
        const T* w = weight + (iy - y.begin) * step + x.tap;
        const S* at = image + iy * pitch + x.begin * channels + c;
        for (int64_t ix = x.begin; ix < x.end; ++ix, w += p.x.up, at += channels) {
          unroll<vectors>([&]<int v>() __attribute__((always_inline)) {
            sum[v] = fma(splat(*w), left < kWidth ? load_some<T>(at, left) : load<T>(at + v * kWidth), sum[v]);
          });
        }
      }
      unroll<vectors>([&]<int v>() __attribute__((always_inline)) {
        left < kWidth ? store_some<T>(to + c, sum[v], left) : store(to + c + v * kWidth, sum[v]);
      });
    };
    int64_t c = 0;
    for (; c + kVectors * kWidth <= channels; c += kVectors * kWidth) sum_at.template operator()<kVectors>(c, kWidth);
    for (; c < channels; c += kWidth) sum_at.template operator()<1>(c, channels - c);
  }
}

// ---- strips ------------------------------------------------------------------------------------------------------------------

template <class T, class S>
void strips_of(const Upfirdn2dTask& t, int64_t first, int64_t last, T* scratch) {
  const Upfirdn2dParams& p = t.p;
  const T *fx = static_cast<const T*>(p.fx), *fy = static_cast<const T*>(p.fy);
  const int64_t depth = p.channels_last ? p.channels : 1;  // elements of a pixel in a plane or image
  const int64_t row_elements = t.advance * t.part, out_row = p.x.out * depth, in_row = p.x.in * depth;
  T *rows = scratch, *lines = scratch + (p.channels_last ? 0 : fy ? 1 : t.input_rows) * row_elements;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t plane = unit / t.strips, begin = unit % t.strips * t.strip_rows;
    const int64_t end = begin + t.strip_rows < p.y.out ? begin + t.strip_rows : p.y.out;
    const S* in = static_cast<const S*>(p.in) + plane * p.y.in * in_row;
    S* out = static_cast<S*>(p.out) + plane * p.y.out * out_row;

    // The input rows that this strip meets; they need not touch the plane at all.
    const int64_t top = fir_span(p.y, begin).begin;
    int64_t bottom = top;
    for (int64_t o = begin; o < end; ++o) {
      const int64_t past = fir_span(p.y, o).end;
      bottom = past > bottom ? past : bottom;
    }
    for (int64_t iy = top; iy < bottom; ++iy) {
      const S* row = in + iy * in_row;
      T* line = lines + (iy - top) * t.line;
      if (p.channels_last) {
        if (fy) filter_row_of_channels(t, row, FirSpan{0, 0, 1}, fx, 0, line);
      } else if (fy) {
        pad_row(t, row, rows);
        filter_row(t, rows, 0, fx, 0, 1, line);
      } else {
        pad_row(t, row, rows + (iy - top) * row_elements);
      }
    }
    for (int64_t o = begin; o < end; ++o) {
      const FirSpan y = fir_span(p.y, o);
      S* to = out + o * out_row;
      if (fy) {
        weighted_sum(to, out_row, lines + (y.begin - top) * t.line, t.line, fy + y.tap, p.y.up, y.end - y.begin);
      } else if (p.channels_last) {
        filter_row_of_channels(t, in, y, fx + y.tap * p.x.taps, p.y.up * p.x.taps, to);
      } else {
        filter_row(t, rows + (y.begin - top) * row_elements, row_elements, fx + y.tap * p.x.taps, p.y.up * p.x.taps, y.end - y.begin, to);
      }
    }
  }
}

void strips(const Upfirdn2dTask& t, int64_t first, int64_t last, void* scratch) {
  switch (t.p.dtype) {
    case DType::F32:
      return strips_of<float, float>(t, first, last, static_cast<float*>(scratch));
    case DType::F64:
      return strips_of<double, double>(t, first, last, static_cast<double*>(scratch));
    case DType::BF16:
      return strips_of<float, BFloat16>(t, first, last, static_cast<float*>(scratch));
    case DType::F16:
      return strips_of<float, Float16>(t, first, last, static_cast<float*>(scratch));
  }
}

}  // namespace
}  // namespace genfast
