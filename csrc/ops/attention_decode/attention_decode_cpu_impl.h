// Decoding on a CPU, compiled once per instruction set. It is bound by reading keys and values, so both are read where they lie, once for
// all rows of a group of heads; products widen them to float32 in registers. Online softmax (Milakov and Gimelshein 2018).
#pragma once
#include <type_traits>

#include "../../core/vec_softmax.h"
#include "attention_decode_cpu.h"

namespace genfast {
namespace {

// Lane i is the sum over the lanes of v[i].
GF_INLINE VFloat totals(VFloat (&v)[kLanes]) {
#if defined(__SSE2__)
  unroll<kLanes / 4>([&]<int j>() {
    const auto half = [](VFloat a, VFloat b)
                          __attribute__((always_inline)) { return (VFloat)GF_MM(unpacklo_ps)(a, b) + (VFloat)GF_MM(unpackhi_ps)(a, b); };
    const VFloat low = half(v[4 * j], v[4 * j + 1]), high = half(v[4 * j + 2], v[4 * j + 3]);
    v[j] = (VFloat)GF_MM(unpacklo_pd)((VDouble)low, (VDouble)high) + (VFloat)GF_MM(unpackhi_pd)((VDouble)low, (VDouble)high);
  });
#if defined(__AVX512F__)
  const auto fold = [](VFloat a, VFloat b) __attribute__((always_inline)) {
    return (VFloat)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) + (VFloat)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
  };
  return fold(fold(v[0], v[1]), fold(v[2], v[3]));
#elif defined(__AVX2__)
  return (VFloat)_mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x20) +
         (VFloat)_mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x31);
#else
  return v[0];
#endif
#else
  VFloat r;
  for (int i = 0; i < kLanes; ++i) r[i] = total(v[i]);
  return r;
#endif
}

// 2 kLanes neighbouring elements: bfloat16 as its even and its odd ones, which costs a shift and a mask, other types as they lie. Whatever
// multiplies or receives them is in the same order.
template <class T>
GF_INLINE void load_pair(const T* p, VFloat& first, VFloat& second) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const VUInt both = load_raw<VUInt>(p);
    first = (VFloat)(both << 16);
    second = (VFloat)(both & 0xffff0000u);
  } else {
    first = load<float>(p);
    second = load<float>(p + kLanes);
  }
}

// Asks for what load_pair(p) will read so many rows later: the rows of a tile are too many streams for the processor to foresee.
constexpr int kRowsAhead = 16;
template <class T>
GF_INLINE void fetch_pair(const T* p) {
  for (size_t i = 0; i < 2 * kLanes * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i);
}

// Elements at p in the order of load_pair, of `count` that remain.
template <class T>
GF_INLINE void load_row(float* to, const T* p, int64_t count) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
    VFloat first, second;
    load_pair(p + c, first, second);
    store(to + c, first);
    store(to + c + kLanes, second);
  }
  for (; c < count; c += kLanes) store(to + c, load_first(p + c, count - c));
}

// What load_pair<T> ordered, back in its place and scaled. U: how it is kept.
template <class T, class U>
GF_INLINE void store_row(U* to, const float* p, int64_t count, float scale) {
  int64_t c = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
      float whole[2 * kLanes];
      for (int i = 0; i < kLanes; ++i) {
        whole[2 * i] = p[c + i];
        whole[2 * i + 1] = p[c + kLanes + i];
      }
      store(to + c, load<float>(whole) * scale);
      store(to + c + kLanes, load<float>(whole + kLanes) * scale);
    }
  }
  for (; c < count; c += kLanes) store_first(to + c, load<float>(p + c) * scale, count - c);
}

// The scores of R queries (rows `width` apart) against kLanes / R keys, of which `keys` exist: the sums fill half the registers.
template <int R, class T>
GF_INLINE void score_tile(const float* q, int64_t width, const T* k, int64_t stride, int64_t keys, int64_t d, float* scores) {
  constexpr int K = kLanes / R;
  const T* key[K];
  for (int i = 0; i < K; ++i) key[i] = k + (i < keys ? i : keys - 1) * stride;
  VFloat sum[kLanes] = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= d; c += 2 * kLanes) {
    unroll<K>([&]<int i>() __attribute__((always_inline)) {
      VFloat x, y;
      fetch_pair(key[i] + c + kRowsAhead * stride);
      load_pair(key[i] + c, x, y);
      unroll<R>([&]<int r>() __attribute__((always_inline)) {
        const float* row = q + r * width + c;
        sum[r * K + i] = fma_lanes(y, load<float>(row + kLanes), fma_lanes(x, load<float>(row), sum[r * K + i]));
      });
    });
  }
  for (; c < d; c += kLanes) {
    unroll<K>([&]<int i>() __attribute__((always_inline)) {
      const VFloat x = load_first(key[i] + c, d - c);
      unroll<R>([&]<int r>()
                    __attribute__((always_inline)) { sum[r * K + i] = fma_lanes(x, load<float>(q + r * width + c), sum[r * K + i]); });
    });
  }
  float all[kLanes];
  store(all, totals(sum));
  for (int r = 0; r < R; ++r) __builtin_memcpy(scores + r * kDecodeKeys, all + r * K, K * sizeof(float));
}

// out (R rows, C vectors) = rescale out + weights (R, keys) values (keys, C vectors). C is even, in the order of load_pair; or 1, and
// `count` elements exist.
template <int R, int C, class T>
GF_INLINE void value_tile(const float* weights, const T* v, int64_t stride, int64_t keys, const float* rescale, float* out, int64_t width,
                          int64_t count) {
  VFloat sum[R][C] = {};
  for (int64_t j = 0; j < keys; ++j) {
    VFloat x[C];
    if constexpr (C == 1) {
      x[0] = load_first(v + j * stride, count);
    } else {
      unroll<C / 2>([&]<int c>() __attribute__((always_inline)) {
        fetch_pair(v + (j + kRowsAhead) * stride + 2 * c * kLanes);
        load_pair(v + j * stride + 2 * c * kLanes, x[2 * c], x[2 * c + 1]);
      });
    }
    unroll<R>([&]<int r>() __attribute__((always_inline)) {
      const VFloat w = splat(weights[r * kDecodeKeys + j]);
      unroll<C>([&]<int c>() __attribute__((always_inline)) { sum[r][c] = fma_lanes(x[c], w, sum[r][c]); });
    });
  }
  unroll<R>([&]<int r>() __attribute__((always_inline)) {
    unroll<C>([&]<int c>() __attribute__((always_inline)) {
      float* to = out + r * width + c * kLanes;
      store(to, fma_lanes(load<float>(to), splat(rescale[r]), sum[r][c]));
    });
  });
}

constexpr int kRowTile = kLanes / 2 < 8 ? kLanes / 2 : 8;

// Calls f<R>(row) for tiles of R = kRowTile, ..., 4, 2, 1 rows that cover them all.
template <int R = kRowTile, class F>
GF_INLINE void in_row_tiles(int64_t rows, F f, int64_t row = 0) {
  for (; row + R <= rows; row += R) f.template operator()<R>(row);
  if constexpr (R > 1) in_row_tiles<R / 2>(rows, f, row);
}

struct Scratch {
  float *q, *out, *scores, *row_max, *row_sum, *rescale;  // (rows, width) twice, (rows, kDecodeKeys), (rows), (rows, kLanes), (rows)
  int64_t width, floats;

  Scratch(const AttentionDecodeParams& p, float* at) : width((p.d + kLanes - 1) / kLanes * kLanes) {
    const int64_t rows = p.rows();
    q = at;
    out = q + rows * width;
    scores = out + rows * width;
    row_sum = scores + rows * kDecodeKeys;
    row_max = row_sum + rows * kLanes;
    rescale = row_max + rows;
    floats = rescale + rows - at;
  }
};

int64_t scratch_floats(const AttentionDecodeParams& p) {
  alignas(64) float* const base = nullptr;
  return Scratch(p, base).floats;
}

// Products of one row with a block of keys become weights. row_max and row_sum (kLanes of them) go on; what was summed before is to be
// multiplied by rescale.
template <class B>
GF_INLINE void finish_row(float* s, int64_t keys, int64_t visible, const B* bias, const ScoreUnit& score, float& row_max, float* row_sum,
                          float& rescale) {
  const VInt lanes = lane_numbers();
  VFloat here = splat(kMinusInfinity);
  visible = visible < 0 ? 0 : visible < keys ? visible : keys;
  for (int64_t j = 0; j < keys; j += kLanes) {
    VFloat x = load<float>(s + j);
    x = bias && j < visible ? fma_lanes(x, splat(score.factor), load_first(bias + j, visible - j)) : x * score.factor;
    if (j + kLanes > visible) x = (lanes < static_cast<int>(visible - j)) ? x : splat(kMinusInfinity);
    store(s + j, x);
    here = (x > here) ? x : here;
  }
  const float found = largest(here), now = found > row_max ? found : row_max, shift = now == kMinusInfinity ? 0.0f : now;
  rescale = row_max == kMinusInfinity ? 0.0f : exp2_lanes(splat((row_max - shift) * score.exponent))[0];
  VFloat sum = load<float>(row_sum) * rescale;
  for (int64_t j = 0; j < keys; j += kLanes) {
    const VFloat weight = exp2_lanes(power_lanes<true>(load<float>(s + j), shift, score.exponent));
    sum = sum + weight;
    store(s + j, weight);
  }
  store(row_sum, sum);
  row_max = now;
}

#if defined(__AVX512F__)
constexpr int kValueTiles = 16;  // vectors of sums of one tile of values
#else
constexpr int kValueTiles = 8;
#endif

template <class T>
void run_unit(const AttentionDecodeParams& p, int64_t unit, const Scratch& at) {
  const int64_t part = unit % p.splits, key_head = unit / p.splits % p.kv_heads, b = unit / p.splits / p.kv_heads;
  const int64_t length = p.length(b), rows = p.rows(), chunk = p.part_keys(length), first_head = key_head * p.group();
  const int64_t end = chunk * (part + 1) < length ? chunk * (part + 1) : length;
  const ScoreUnit& score = p.unit;
  for (int64_t r = 0; r < rows; ++r) {
    const T* q = static_cast<const T*>(p.q) + b * p.q_at.batch + (first_head + r / p.n) * p.q_at.head + r % p.n * p.q_at.row;
    load_row(at.q + r * at.width, q, p.d);
    at.row_max[r] = kMinusInfinity;
  }
  __builtin_memset(at.out, 0, static_cast<size_t>(rows * at.width) * sizeof(float));
  __builtin_memset(at.row_sum, 0, static_cast<size_t>(rows * kLanes) * sizeof(float));

  for (int64_t key = chunk * part; key < end; key += kDecodeKeys) {
    const int64_t keys = end - key < kDecodeKeys ? end - key : kDecodeKeys;
    const T* k = static_cast<const T*>(p.k) + b * p.k_at.batch + key_head * p.k_at.head + key * p.k_at.row;
    const T* v = static_cast<const T*>(p.v) + b * p.v_at.batch + key_head * p.v_at.head + key * p.v_at.row;
    in_row_tiles(rows, [&]<int R>(int64_t r) {
      for (int64_t j = 0; j < keys; j += kLanes / R) {
        score_tile<R>(at.q + r * at.width, at.width, k + j * p.k_at.row, p.k_at.row, keys - j, p.d, at.scores + r * kDecodeKeys + j);
      }
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t visible = p.visible(length, r % p.n) - key;
      const auto finish = [&]<class B>(const B* bias) {
        if (bias) bias += b * p.bias_at.batch + (first_head + r / p.n) * p.bias_at.head + r % p.n * p.bias_at.row + key;
        finish_row(at.scores + r * kDecodeKeys, keys, visible, bias, score, at.row_max[r], at.row_sum + r * kLanes, at.rescale[r]);
      };
      p.bias_dtype == DType::F32 ? finish(static_cast<const float*>(p.bias)) : finish(static_cast<const T*>(p.bias));
    }
    in_row_tiles(rows, [&]<int R>(int64_t r) {
      constexpr int C = kValueTiles / R < 8 ? kValueTiles / R : 8;
      const auto tile = [&]<int N>(int64_t c) {
        value_tile<R, N>(at.scores + r * kDecodeKeys, v + c, p.v_at.row, keys, at.rescale + r, at.out + r * at.width + c, at.width,
                         p.d - c);
      };
      int64_t c = 0;
      for (; c + C * kLanes <= p.d; c += C * kLanes) tile.template operator()<C>(c);
      for (; c + 2 * kLanes <= p.d; c += 2 * kLanes) tile.template operator()<2>(c);
      for (; c < p.d; c += kLanes) tile.template operator()<1>(c);
    });
  }

  for (int64_t r = 0; r < rows; ++r) {
    const float sum = total(load<float>(at.row_sum + r * kLanes)), inverse = sum == 0 ? 0.0f : 1.0f / sum;
    const float* out = at.out + r * at.width;
    if (p.splits == 1) {
      const int64_t head = first_head + r / p.n, query = r % p.n;
      T* o = static_cast<T*>(p.o) + b * p.o_at.batch + head * p.o_at.head + query * p.o_at.row;
      store_row<T>(o, out, p.d, inverse);
      p.lse[(b * p.heads + head) * p.n + query] = sum == 0 ? kMinusInfinity : at.row_max[r] * score.logarithm + __builtin_logf(sum);
    } else {
      float* o = p.parts + (unit * rows + r) * p.d;
      store_row<T>(o, out, p.d, inverse);
      p.part_stats[unit * rows + r] = {at.row_max[r], sum};
    }
  }
}

template <class F>
void visit_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::BF16:
      return f(BFloat16{});
    case DType::F16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

void run(const AttentionDecodeParams& p, int64_t first_unit, int64_t last_unit, float* scratch) {
  const Scratch at(p, scratch);
  visit_storage(p.dtype, [&]<class T>(T) {
    for (int64_t unit = first_unit; unit < last_unit; ++unit) run_unit<T>(p, unit, at);
  });
}

void merge(const AttentionDecodeParams& p, int64_t first, int64_t last) {
  visit_storage(p.dtype, [&]<class T>(T) {
    const int64_t rows = p.rows();
    const ScoreUnit& score = p.unit;
    for (int64_t at = first * rows; at < last * rows; ++at) {
      const int64_t key_head = at / rows, r = at % rows, b = key_head / p.kv_heads;
      const int64_t head = key_head % p.kv_heads * p.group() + r / p.n, query = r % p.n, from = key_head * p.splits * rows + r;
      float row_max = kMinusInfinity, sum = 0;
      for (int64_t s = 0; s < p.splits; ++s) {
        const float x = p.part_stats[from + s * rows].row_max;
        row_max = x > row_max ? x : row_max;
      }
      const float shift = row_max == kMinusInfinity ? 0.0f : row_max;
      const auto part_sum = [&](int64_t s) {  // of the part's exponentials, in the unit of the whole
        const PartStats part = p.part_stats[from + s * rows];
        return exp2_lanes(splat((part.row_max - shift) * score.exponent)) * part.row_sum;
      };
      for (int64_t s = 0; s < p.splits; ++s) sum += part_sum(s)[0];
      const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
      T* o = static_cast<T*>(p.o) + b * p.o_at.batch + head * p.o_at.head + query * p.o_at.row;
      for (int64_t c = 0; c < p.d; c += kLanes) {
        VFloat out{};
        for (int64_t s = 0; s < p.splits; ++s) {
          out = fma_lanes(load_first(p.parts + (from + s * rows) * p.d + c, p.d - c), part_sum(s), out);
        }
        store_first(o + c, out * inverse, p.d - c);
      }
      p.lse[(b * p.heads + head) * p.n + query] = sum == 0 ? kMinusInfinity : shift * score.logarithm + __builtin_logf(sum);
    }
  });
}

}  // namespace
}  // namespace genfast
