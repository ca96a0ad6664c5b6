// The forward pass on a CPU, compiled once per instruction set: online softmax over blocks of keys (Milakov and Gimelshein 2018), so the
// scores of a block of queries stay in the first-level cache. An Engine says how the two products are made and in what form keys,
// values and weights lie; the softmax between them is the same for all.
#pragma once
#include "attention_cpu_fma.h"

namespace genfast {
namespace {

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

// Makes the products of one row with a block of keys scores: -inf where the query does not see the key. Returns the largest.
template <class B, bool kBias, bool kMask>
GF_INLINE float finish_scores(float* s, int64_t keys, int64_t visible, float factor, const RowTerms& terms) {
  const VInt lanes = lane_numbers();
  VFloat row_max = splat(kMinusInfinity);
  for (int64_t j = 0; j < keys; j += kLanes) {
    VFloat x = load<float>(s + j);
    if (kBias) x = fma_lanes(x, splat(factor), load_first(static_cast<const B*>(terms.bias) + j, keys - j));
    if (!kBias && factor != 1) x = x * factor;
    if (kMask) x = where_seen(terms.mask + j, keys - j, x);
    const bool cut = j + kLanes > visible;
    if (cut) x = (lanes < static_cast<int>(visible - j)) ? x : splat(kMinusInfinity);
    if (kBias || kMask || cut || factor != 1) store(s + j, x);
    row_max = (x > row_max) ? x : row_max;
  }
  return largest(row_max);
}

template <class Engine, class T, class B, bool kBias, bool kMask>
void run_block(const AttentionParams& p, const Block<Engine>& at, int64_t batch, int64_t head, int64_t first_query) {
  const int64_t rows = p.n - first_query < Engine::kQueries ? p.n - first_query : Engine::kQueries;
  const int64_t depth = Engine::depth(p.d), width = Engine::width(p.d), offset = p.m - p.n;
  const T* q = static_cast<const T*>(p.q) + batch * p.q_at.batch + head * p.q_at.head + first_query * p.q_at.row;
  const ScoreUnit& unit = p.unit;
  const int64_t rows_padded = round_up(rows, Engine::kRows);
  Engine::load_queries(at.queries, q, p.q_at.row, rows, rows_padded, p.d);
  __builtin_memset(at.out, 0, static_cast<size_t>(rows_padded * width) * sizeof(float));
  float row_max[Engine::kQueries];
  VFloat row_sum[Engine::kQueries];  // lane by lane
  for (int64_t r = 0; r < Engine::kQueries; ++r) {
    row_max[r] = kMinusInfinity;
    row_sum[r] = VFloat{};
  }
  const int64_t seen = p.causal ? (first_query + rows + offset < p.m ? first_query + rows + offset : p.m) : p.m;
  for (int64_t key = 0; key < seen; key += kKeyBlock) {
    const int64_t keys = p.m - key < kKeyBlock ? p.m - key : kKeyBlock;
    Engine::score(at.queries, at.keys + key * depth, at.scores, kKeyBlock, rows_padded, round_up(keys, Engine::kKeyGroup), depth);
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
      const float here = finish_scores<B, kBias, kMask>(s, keys, visible, unit.factor, terms);
      const float now = here > row_max[r] ? here : row_max[r];
      const float shift = now == kMinusInfinity ? 0.0f : now;
      VFloat partial{};
      for (int64_t j = 0; j < keys; j += kLanes) {
        const VFloat weight = exp2_lanes<Engine::kShortExp>(power_lanes<kBias>(load<float>(s + j), shift, unit.exponent));
        partial = partial + weight;
        Engine::store_weight(at.weights + r * kKeyBlock + j, weight);
      }
      Engine::clear_weights(at.weights + r * kKeyBlock, keys);
      if (now != row_max[r]) {
        const float rescale =
            row_max[r] == kMinusInfinity ? 0.0f : exp2_lanes(splat(power_between<kBias>(row_max[r], shift, unit.exponent)))[0];
        row_sum[r] = row_sum[r] * rescale;
        float* out = at.out + r * width;
        for (int64_t c = 0; c < width; c += kLanes) store(out + c, load<float>(out + c) * rescale);
        row_max[r] = now;
      }
      row_sum[r] = row_sum[r] + partial;
    }
    Engine::add_values(at.weights, kKeyBlock, at.values + key * width, at.out, rows_padded, keys, width);
  }
  T* o = static_cast<T*>(p.o) + batch * p.o_at.batch + head * p.o_at.head + first_query * p.o_at.row;
  const int64_t row_0 = (batch * p.heads + head) * p.n + first_query;
  for (int64_t r = 0; r < rows; ++r) {
    const float all = total(row_sum[r]), inverse = all == 0 ? 0.0f : 1.0f / all;
    for (int64_t c = 0; c < p.d; c += kLanes) store_first(o + r * p.o_at.row + c, load<float>(at.out + r * width + c) * inverse, p.d - c);
    const float excess = all == 0 ? 0.0f : power_excess<kBias>(row_max[r], unit.exponent);
    const float log_sum = all == 0 ? -kMinusInfinity : __builtin_logf(all) - excess * kLn2;
    p.lse[row_0 + r] = all == 0 ? kMinusInfinity : row_max[r] * unit.logarithm + log_sum;
    if (p.row_stats) p.row_stats[row_0 + r] = {all == 0 ? 0.0f : row_max[r], log_sum * kLog2e};
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
