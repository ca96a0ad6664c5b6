// The forward pass on a CPU, compiled once per instruction set: softmax online over blocks of keys (Milakov and Gimelshein 2018), so the
// scores of a block of queries stay in the first-level cache. An Engine says how the two products are made and in what form keys,
// values and weights lie; the softmax between them is the same for all.
#pragma once
#include "../../core/vec_softmax.h"
#include "attention_cpu.h"

namespace genfast {
namespace {

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
