// The forward pass on a CPU, compiled once per instruction set: softmax online over blocks of keys (Milakov and Gimelshein 2018), so the
// scores of a block of queries stay in the first-level cache. An Engine says how the two products are made and in what form keys,
// values and weights lie; the softmax between them is the same for all.
#pragma once
#include "../../core/vec.h"
#include "attention_cpu.h"

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

// x where the byte of a mask is not zero, else -inf; of `count` bytes, beyond which it is -inf too.
GF_INLINE VFloat where_seen(const uint8_t* p, int64_t count, VFloat x) {
#if defined(__AVX512F__)
  const auto few = static_cast<__mmask16>(count >= kLanes ? 0xffffu : (1u << count) - 1);
  const __m128i bytes = _mm_maskz_loadu_epi8(few, p);
  return (VFloat)_mm512_mask_mov_ps((__m512)splat(kMinusInfinity), _mm_test_epi8_mask(bytes, bytes), (__m512)x);
#else
  uint8_t whole[kLanes] = {};
  __builtin_memcpy(whole, p, count < kLanes ? static_cast<size_t>(count) : sizeof whole);
#if defined(__AVX2__)
  const VInt seen = (VInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(whole)));
#else
  VInt seen;
  for (int i = 0; i < kLanes; ++i) seen[i] = whole[i];
#endif
  return (seen != 0) ? x : splat(kMinusInfinity);
#endif
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

constexpr int64_t round_up(int64_t a, int64_t to) {
  return (a + to - 1) / to * to;
}

template <class T>
GF_INLINE T* take(char*& at, int64_t count) {
  T* p = reinterpret_cast<T*>(at);
  at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  return p;
}

// What a block of queries works on. Rows beyond the last query hold zeros.
template <class Engine>
struct Block {
  typename Engine::Operand* keys;     // packed, for one key head
  typename Engine::Operand* values;   // packed, for one key head
  typename Engine::Operand* queries;  // (Engine::kQueries, Engine::depth(d))
  typename Engine::Operand* weights;  // (Engine::kQueries, kKeyBlock); may be the scores' memory
  float* scores;                      // (Engine::kQueries, kKeyBlock)
  float* out;                         // (Engine::kQueries, Engine::width(d))

  Block(const AttentionParams& p, char* at) {
    const int64_t keys_padded = round_up(p.m, kKeyBlock), depth = Engine::depth(p.d), width = Engine::width(p.d);
    keys = take<typename Engine::Operand>(at, keys_padded * depth);
    values = take<typename Engine::Operand>(at, keys_padded * width);
    queries = take<typename Engine::Operand>(at, Engine::kQueries * depth);
    scores = take<float>(at, Engine::kQueries * kKeyBlock);
    out = take<float>(at, Engine::kQueries * width);
    weights = Engine::weights(scores, at);
    end = at;
  }
  char* end;
};

// Where the scores of one row get their bias and mask from.
struct RowTerms {
  const void* bias;  // at the block's first key, or nullptr
  const uint8_t* mask;
};

// Scales a block of scores of one row, adds bias, hides what the query does not see, and returns the largest.
template <class B, bool kBias, bool kMask>
GF_INLINE float finish_scores(float* s, int64_t keys, int64_t visible, float scale, const RowTerms& terms) {
  const VInt lanes = lane_numbers();
  VFloat most = splat(kMinusInfinity);
  for (int64_t j = 0; j < keys; j += kLanes) {
    VFloat x = load<float>(s + j) * scale;
    if (kBias) x = fma_lanes(load_first(static_cast<const B*>(terms.bias) + j, keys - j), splat(kLog2e), x);
    if (kMask) x = where_seen(terms.mask + j, keys - j, x);
    const bool cut = j + kLanes > visible;
    if (cut) x = (lanes < static_cast<int>(visible - j)) ? x : splat(kMinusInfinity);
    if (kBias || kMask || cut || scale != 1) store(s + j, x);
    most = (x > most) ? x : most;
  }
  return largest(most);
}

template <class B>
GF_INLINE void fetch(const B* p, int64_t count) {
  const char* at = reinterpret_cast<const char*>(p);
  const int64_t bytes = (count < kKeyBlock ? count : kKeyBlock) * static_cast<int64_t>(sizeof(B));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

template <class Engine, class T, class B, bool kBias, bool kMask>
void run_block(const AttentionParams& p, const Block<Engine>& at, int64_t batch, int64_t head, int64_t first_query) {
  const int64_t rows = p.n - first_query < Engine::kQueries ? p.n - first_query : Engine::kQueries;
  const int64_t depth = Engine::depth(p.d), width = Engine::width(p.d), offset = p.m - p.n;
  const T* q = static_cast<const T*>(p.q) + batch * p.q_at.batch + head * p.q_at.head + first_query * p.q_at.row;
  const float in_bits = p.scale * kLog2e;  // scores are kept in powers of two
  const int64_t rows_padded = round_up(rows, Engine::kRows);
  Engine::load_queries(at.queries, q, p.q_at.row, rows, rows_padded, p.d, in_bits);
  __builtin_memset(at.out, 0, static_cast<size_t>(rows_padded * width) * sizeof(float));
  float most[Engine::kQueries];
  VFloat sum[Engine::kQueries];  // lane by lane
  for (int64_t r = 0; r < Engine::kQueries; ++r) {
    most[r] = kMinusInfinity;
    sum[r] = VFloat{};
  }
  const int64_t seen = p.causal ? (first_query + rows + offset < p.m ? first_query + rows + offset : p.m) : p.m;
  for (int64_t key = 0; key < seen; key += kKeyBlock) {
    const int64_t keys = p.m - key < kKeyBlock ? p.m - key : kKeyBlock;
    Engine::score(at.queries, at.keys + key * depth, at.scores, rows_padded, round_up(keys, Engine::kKeyGroup), depth);
    for (int64_t r = 0; r < rows; ++r) {
      float* s = at.scores + r * kKeyBlock;
      RowTerms terms{nullptr, nullptr};
      const int64_t row = first_query + r;
      if (kBias) {
        terms.bias = static_cast<const B*>(p.bias) + batch * p.bias_at.batch + head * p.bias_at.head + row * p.bias_at.row + key;
      }
      if (kMask) terms.mask = p.mask + batch * p.mask_at.batch + head * p.mask_at.head + row * p.mask_at.row + key;
      // The next block's terms come from far away: they are fetched while this block is worked on.
      if (key + kKeyBlock < seen) {
        if (kBias) fetch(static_cast<const B*>(terms.bias) + kKeyBlock, p.m - key - kKeyBlock);
        if (kMask) fetch(terms.mask + kKeyBlock, p.m - key - kKeyBlock);
      }
      int64_t visible = p.causal ? row + offset + 1 - key : keys;
      visible = visible < 0 ? 0 : visible < keys ? visible : keys;
      // Scores that need nothing but a positive factor get it on their way into the exponential.
      float factor = 1, here;
      if (!kBias && !kMask && visible == keys && keys % kLanes == 0 && (Engine::kScaled || in_bits > 0)) {
        factor = Engine::kScaled ? 1.0f : in_bits;
        VFloat largest_lanes = load<float>(s);
        for (int64_t j = kLanes; j < keys; j += kLanes) {
          const VFloat x = load<float>(s + j);
          largest_lanes = (x > largest_lanes) ? x : largest_lanes;
        }
        here = largest(largest_lanes) * factor;
      } else {
        here = finish_scores<B, kBias, kMask>(s, keys, visible, Engine::kScaled ? 1.0f : in_bits, terms);
      }
      const float now = here > most[r] ? here : most[r];
      const float shift = now == kMinusInfinity ? 0.0f : now;
      VFloat partial{};
      for (int64_t j = 0; j < keys; j += kLanes) {
        const VFloat weight = exp2_lanes<Engine::kShortExp>(fma_lanes(load<float>(s + j), splat(factor), splat(-shift)));
        partial = partial + weight;
        Engine::store_weight(at.weights + r * kKeyBlock + j, weight);
      }
      Engine::clear_weights(at.weights + r * kKeyBlock, keys);
      if (now != most[r]) {
        const float shrink = most[r] == kMinusInfinity ? 0.0f : exp2_lanes(splat(most[r] - shift))[0];
        sum[r] = sum[r] * shrink;
        float* out = at.out + r * width;
        for (int64_t c = 0; c < width; c += kLanes) store(out + c, load<float>(out + c) * shrink);
        most[r] = now;
      }
      sum[r] = sum[r] + partial;
    }
    Engine::add_values(at.weights, at.values + key * width, at.out, rows_padded, keys, width);
  }
  T* o = static_cast<T*>(p.o) + batch * p.o_at.batch + head * p.o_at.head + first_query * p.o_at.row;
  float* lse = p.lse + (batch * p.heads + head) * p.n + first_query;
  for (int64_t r = 0; r < rows; ++r) {
    const float all = total(sum[r]), inverse = all == 0 ? 0.0f : 1.0f / all;
    for (int64_t c = 0; c < p.d; c += kLanes) store_first(o + r * p.o_at.row + c, load<float>(at.out + r * width + c) * inverse, p.d - c);
    lse[r] = all == 0 ? kMinusInfinity : most[r] * kLn2 + __builtin_logf(all);
  }
}

template <class Engine, class T>
void run_typed(const AttentionParams& p, int64_t first_unit, int64_t last_unit, char* scratch) {
  const Block<Engine> at(p, scratch);
  const int64_t blocks = query_blocks(p, Engine::kQueries), group = p.heads / p.kv_heads;
  int64_t packed = -1;
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t batch = unit / blocks / p.heads, head = unit / blocks % p.heads, first_query = unit % blocks * Engine::kQueries;
    const int64_t key_head = batch * p.kv_heads + head / group;
    if (packed != key_head) {
      packed = key_head;
      const int64_t h = head / group;
      Engine::pack_keys(at.keys, static_cast<const T*>(p.k) + batch * p.k_at.batch + h * p.k_at.head, p.k_at.row, p.m, p.d);
      Engine::pack_values(at.values, static_cast<const T*>(p.v) + batch * p.v_at.batch + h * p.v_at.head, p.v_at.row, p.m, p.d);
    }
    const auto run = [&]<class B, bool kBias>() {
      p.mask ? run_block<Engine, T, B, kBias, true>(p, at, batch, head, first_query)
             : run_block<Engine, T, B, kBias, false>(p, at, batch, head, first_query);
    };
    if (!p.bias) {
      run.template operator()<float, false>();
    } else if (p.bias_dtype == DType::F32) {
      run.template operator()<float, true>();
    } else {
      run.template operator()<T, true>();
    }
  }
}

template <class Engine>
size_t scratch_bytes_of(const AttentionParams& p) {
  alignas(64) char* base = nullptr;
  return static_cast<size_t>(Block<Engine>(p, base).end - base);
}

// Products by fused multiply-adds: everything is widened to float32 when it is packed.
struct FmaEngine {
  using Operand = float;
  static constexpr int kQueries = kFmaQueries;
  static constexpr bool kScaled = true;  // queries carry the scale
  static constexpr bool kShortExp = false;
  static constexpr int kRows = 6;  // a tile of 6 x kColumns vectors of sums leaves registers for its operands
#if defined(__AVX512F__)
  static constexpr int kColumns = 4;
#else
  static constexpr int kColumns = 2;
#endif
  static constexpr int kKeyGroup = kColumns * kLanes;
  static int64_t depth(int64_t d) { return d; }
  static int64_t width(int64_t d) { return round_up(d, kLanes); }
  static float* weights(float* scores, char*&) { return scores; }
  static GF_INLINE void store_weight(float* p, VFloat v) { store(p, v); }
  static void clear_weights(float*, int64_t) {}  // add_values reads no further than the keys

  template <class T>
  static void load_queries(float* to, const T* q, int64_t stride, int64_t rows, int64_t rows_padded, int64_t d, float scale) {
    for (int64_t r = 0; r < rows_padded; ++r) {
      for (int64_t c = 0; c < d; c += kLanes) {
        store_first(to + r * d + c, r < rows ? load_first(q + r * stride + c, d - c) * scale : VFloat{}, d - c);
      }
    }
  }

  // Panels of kKeyGroup keys: (panel, d, kKeyGroup).
  template <class T>
  static void pack_keys(float* to, const T* k, int64_t stride, int64_t m, int64_t d) {
    for (int64_t first = 0; first < m; first += kKeyGroup) {
      const int64_t keys = m - first < kKeyGroup ? m - first : kKeyGroup;
      float* panel = to + first * d;
      for (int64_t c = 0; c < d; c += kLanes) {
        const int64_t columns = d - c < kLanes ? d - c : kLanes;
        for (int64_t j = 0; j < kKeyGroup; j += kLanes) {
          VFloat v[kLanes];
          for (int i = 0; i < kLanes; ++i) v[i] = j + i < keys ? load_first(k + (first + j + i) * stride + c, columns) : VFloat{};
          transpose(v);
          for (int64_t x = 0; x < columns; ++x) store(panel + (c + x) * kKeyGroup + j, v[x]);
        }
      }
    }
  }

  template <class T>
  static void pack_values(float* to, const T* v, int64_t stride, int64_t m, int64_t d) {
    const int64_t w = width(d);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t c = 0; c < d; c += kLanes) store(to + i * w + c, load_first(v + i * stride + c, d - c));
    }
  }

  // c (kRows, N vectors) = or += a (kRows, depth) b (depth, N vectors)
  template <int N, bool kAdd>
  static GF_INLINE void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth) {
    VFloat sum[kRows][N];
    unroll<kRows>([&]<int r>() { unroll<N>([&]<int n>() { sum[r][n] = kAdd ? load<float>(c + r * c_row + n * kLanes) : VFloat{}; }); });
    for (int64_t k = 0; k < depth; ++k) {
      VFloat column[N];
      unroll<N>([&]<int n>() { column[n] = load<float>(b + k * b_row + n * kLanes); });
      unroll<kRows>([&]<int r>() {
        const VFloat x = splat(a[r * a_row + k]);
        unroll<N>([&]<int n>() { sum[r][n] = fma_lanes(x, column[n], sum[r][n]); });
      });
    }
    unroll<kRows>([&]<int r>() { unroll<N>([&]<int n>() { store(c + r * c_row + n * kLanes, sum[r][n]); }); });
  }

  static void score(const float* q, const float* keys, float* scores, int64_t rows, int64_t count, int64_t depth) {
    for (int64_t j = 0; j < count; j += kKeyGroup) {
      for (int64_t r = 0; r < rows; r += kRows) {
        tile<kColumns, false>(q + r * depth, depth, keys + j * depth, kKeyGroup, scores + r * kKeyBlock + j, kKeyBlock, depth);
      }
    }
  }

  static void add_values(const float* weights, const float* values, float* out, int64_t rows, int64_t keys, int64_t width) {
    const auto columns = [&]<int N>(int64_t c) {
      for (int64_t r = 0; r < rows; r += kRows) {
        tile<N, true>(weights + r * kKeyBlock, kKeyBlock, values + c, width, out + r * width + c, width, keys);
      }
    };
    int64_t vectors = width / kLanes, c = 0;
    for (int64_t tiles = (vectors + kColumns - 1) / kColumns; tiles > 0; --tiles) {  // as even as they can be
      const int64_t now = (vectors + tiles - 1) / tiles;
      if (now == 1) columns.template operator()<1>(c);
      if (now == 2) columns.template operator()<2>(c);
      if constexpr (kColumns > 2) {
        if (now == 3) columns.template operator()<3>(c);
        if (now == 4) columns.template operator()<4>(c);
      }
      c += now * kLanes;
      vectors -= now;
    }
  }
};

[[maybe_unused]] size_t fma_scratch_bytes(const AttentionParams& p) {
  return scratch_bytes_of<FmaEngine>(p);
}

[[maybe_unused]] void fma_run(const AttentionParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  char* at = static_cast<char*>(scratch);
  switch (p.dtype) {
    case DType::BF16:
      return run_typed<FmaEngine, BFloat16>(p, first_unit, last_unit, at);
    case DType::F16:
      return run_typed<FmaEngine, Float16>(p, first_unit, last_unit, at);
    default:
      return run_typed<FmaEngine, float>(p, first_unit, last_unit, at);
  }
}

}  // namespace
}  // namespace genfast
