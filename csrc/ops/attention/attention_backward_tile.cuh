// What the backward kernels share: which rows a block owns and which it walks over, what a query needs to know of itself, and the tiles of
// a bias's gradient. With P = exp(S - row_max) / row_sum and delta = sum(do o) - dlse (Dao et al. 2022, appendix B.2):
//   dS = P (do v^T - delta)     dq = scale dS k     dk = scale dS^T q     dv = P^T do     dbias = dS, summed where the bias is broadcast
#pragma once
#include "attention_tile.cuh"

namespace genfast {
namespace {

// What one kernel makes: the gradients of the rows its blocks own. A block of kQueries owns rows of q and grad_o and walks over k and v;
// the others own rows of k and v and walk over q and grad_o, of every query head that reads them.
enum class Pass { kQueries, kKeysAndValues, kKeys, kValues };
constexpr bool owns_keys(Pass pass) {
  return pass != Pass::kQueries;
}
constexpr bool makes_slopes(Pass pass) {  // dS, for dq or dk
  return pass != Pass::kValues;
}
constexpr bool makes_values(Pass pass) {  // dv
  return pass == Pass::kKeysAndValues || pass == Pass::kValues;
}

inline AttentionAccess access_of(const AttentionBackwardParams& p) {
  const AttentionParams& f = p.forward;
  AttentionAccess wide = access_of(f);
  const int64_t n = 16 / size_of(f.dtype);
  for (const void* data : {p.grad_o, const_cast<const void*>(p.dq), const_cast<const void*>(p.dk), const_cast<const void*>(p.dv)}) {
    wide.rows &= reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  for (const AttentionRows& at : {p.grad_o_at, p.dq_at, p.dk_at, p.dv_at}) wide.rows &= multiples_of(at, n);
  return wide;
}

// Rows [first, first + rows) of head `head`; walks over `tiles` tiles of rows from `begin` on, in each of `walked_heads` heads.
struct GradientBlock {
  int batch, head, first, rows, walked_head, walked_heads, begin, tiles;
};

// Tiles innermost, as in query_block; under causality those that walk farthest first.
template <Pass kPass>
__device__ __forceinline__ GradientBlock gradient_block(const AttentionParams& p, int rows, int walked, int unit) {
  constexpr bool kOwnsKeys = owns_keys(kPass);
  const int n = static_cast<int>(p.n), m = static_cast<int>(p.m), own = kOwnsKeys ? m : n;  // below 2^30: gradient_grid
  const int heads = static_cast<int>(kOwnsKeys ? p.kv_heads : p.heads), group = static_cast<int>(p.heads / p.kv_heads);
  const int blocks = (own + rows - 1) / rows, block = unit % blocks;
  GradientBlock at;
  at.head = unit / blocks % heads;
  at.batch = unit / blocks / heads;
  at.walked_head = kOwnsKeys ? at.head * group : at.head / group;
  at.walked_heads = kOwnsKeys ? group : 1;
  at.first = (p.causal && !kOwnsKeys ? blocks - 1 - block : block) * rows;
  at.rows = own - at.first < rows ? own - at.first : rows;
  at.begin = 0;
  int end = kOwnsKeys ? n : m;
  if (p.causal) {
    if (kOwnsKeys) {
      const int sees = at.first + n - m;  // the first query that sees the first key
      at.begin = sees < 0 ? 0 : sees;
    } else {
      const int seen = at.first + at.rows + m - n;
      end = seen < end ? seen : end;
    }
  }
  at.tiles = end > at.begin ? (end - at.begin + walked - 1) / walked : 0;
  return at;
}
template <Pass kPass>
unsigned gradient_grid(const AttentionParams& p, int rows) {
  const int64_t own = owns_keys(kPass) ? p.m : p.n, heads = owns_keys(kPass) ? p.kv_heads : p.heads;
  const int64_t blocks = (own + rows - 1) / rows * heads * p.batch;
  check(blocks < (int64_t{1} << 31), "q, k: got ", blocks, " blocks of ", rows, " rows, supported: fewer than 2^31");
  check(p.n < (1 << 30) && p.m < (1 << 30), "q, k: got ", p.n, " and ", p.m, " rows, supported: fewer than 2^30");
  return static_cast<unsigned>(blocks);
}

// What its weights and slopes need to know of a query: RowStats, those of a row that sees nothing where there is no such query, and delta.
struct QueryNumbers {
  float row_max, log_sum, delta;
};
__device__ __forceinline__ QueryNumbers query_numbers(const AttentionBackwardParams& p, int batch, int head, int64_t query) {
  const AttentionParams& f = p.forward;
  const int64_t at = (batch * f.heads + head) * f.n + query;
  const RowStats stats = query < f.n ? f.row_stats[at] : RowStats{0.0f, -kMinusInfinity};
  return {stats.row_max, stats.log_sum, stats.log_sum == -kMinusInfinity ? 0.0f : p.delta[at]};
}
__device__ __forceinline__ float weight_of(float score, float row_max, float log_sum, float exponent) {
  return exp2_fast(fmaf(score - row_max, exponent, -log_sum));
}

// One key's bias and mask from query `first_query` of a head on; queries begin ... end - 1 from there see it.
struct KeyTerms {
  const void* bias;
  const uint8_t* mask;
  int begin, end;
};
__device__ __forceinline__ KeyTerms key_terms(const AttentionParams& p, int batch, int head, int first_query, int key) {
  const int n = static_cast<int>(p.n), m = static_cast<int>(p.m);
  KeyTerms terms{nullptr, nullptr, p.causal ? key + n - m - first_query : 0, key < m ? n - first_query : 0};
  if (p.bias) {
    const int64_t element = batch * p.bias_at.batch + head * p.bias_at.head + first_query * p.bias_at.row + key;
    terms.bias = static_cast<const char*>(p.bias) + element * (p.bias_dtype == DType::F32 ? 4 : 2);
  }
  if (p.mask) terms.mask = row_at(p.mask, p.mask_at, batch, head, first_query) + key;
  return terms;
}
// What finish_scores does, for query `query` of these.
template <class S>
__device__ __forceinline__ float finish_key_score(const AttentionParams& p, const KeyTerms& terms, int query, float x) {
  if (query < terms.begin || query >= terms.end) return kMinusInfinity;
  if (p.mask && !terms.mask[query * p.mask_at.row]) return kMinusInfinity;
  const float factor = p.unit.factor;
  if (!p.bias) return x * factor;
  const int64_t at = query * p.bias_at.row;
  return fmaf(x, factor,
              p.bias_dtype == DType::F32 ? static_cast<const float*>(terms.bias)[at] : widen(static_cast<const S*>(terms.bias)[at]));
}

// ---- the gradient of a bias --------------------------------------------------------------------------------------------------------

// A block owns one tile of the bias's own shape and sums over the dimensions along which the bias is broadcast.
struct BiasExtent {
  int batch, head, query, key;  // numbers of samples, heads, tiles of queries, tiles of keys
};
__host__ __device__ inline BiasExtent bias_tiles(const AttentionParams& p, int queries, int keys) {
  return {static_cast<int>(p.batch), static_cast<int>(p.heads), static_cast<int>((p.n + queries - 1) / queries),
          static_cast<int>((p.m + keys - 1) / keys)};
}

struct BiasBlock {
  BiasExtent first, count;  // the first of each dimension, and how many from there
  int steps;
};
__device__ __forceinline__ BiasBlock bias_block(const AttentionBackwardParams& p, int queries, int keys) {
  const BiasExtent all = bias_tiles(p.forward, queries, keys);
  int unit = static_cast<int>(blockIdx.x);
  const auto take = [&](int64_t stride, int tiles, int& first, int& count) {
    first = stride ? unit % tiles : 0;
    count = stride ? 1 : tiles;
    if (stride) unit /= tiles;
  };
  BiasBlock block;
  take(p.dbias_column, all.key, block.first.key, block.count.key);
  take(p.dbias_at.row, all.query, block.first.query, block.count.query);
  take(p.dbias_at.head, all.head, block.first.head, block.count.head);
  take(p.dbias_at.batch, all.batch, block.first.batch, block.count.batch);
  block.steps = block.count.key * block.count.query * block.count.head * block.count.batch;
  return block;
}
inline unsigned bias_grid(const AttentionBackwardParams& p, int queries, int keys) {
  const BiasExtent all = bias_tiles(p.forward, queries, keys);
  const int64_t tiles = int64_t{all.key} * all.query * all.head * all.batch;
  check(tiles < (int64_t{1} << 31), "bias: got ", tiles, " tiles of ", queries, " x ", keys, " scores, supported: fewer than 2^31");
  return static_cast<unsigned>((p.dbias_column ? all.key : 1) * (p.dbias_at.row ? all.query : 1) * (p.dbias_at.head ? all.head : 1) *
                               (p.dbias_at.batch ? all.batch : 1));
}

// Tile `step` of a block: queries `at` against the keys from `key` on.
struct BiasStep {
  QueryBlock at;
  int64_t key;
};
__device__ __forceinline__ BiasStep bias_step(const AttentionParams& p, const BiasBlock& block, int step, int queries, int keys) {
  BiasStep tile{};
  tile.at.n = p.n;
  tile.at.m = p.m;
  tile.key = static_cast<int64_t>(block.first.key + step % block.count.key) * keys;
  step /= block.count.key;
  tile.at.first = static_cast<int64_t>(block.first.query + step % block.count.query) * queries;
  tile.at.rows = p.n - tile.at.first < queries ? static_cast<int>(p.n - tile.at.first) : queries;
  step /= block.count.query;
  tile.at.head = block.first.head + step % block.count.head;
  tile.at.kv_head = tile.at.head / static_cast<int>(p.heads / p.kv_heads);
  tile.at.batch = block.first.batch + step / block.count.head;
  return tile;
}
// The first step from `step` on in which some query sees some key.
__device__ __forceinline__ int next_bias_step(const AttentionParams& p, const BiasBlock& block, int step, int queries, int keys) {
  while (step < block.steps) {
    const BiasStep tile = bias_step(p, block, step, queries, keys);
    if (tile.key < visible_keys(p, tile.at)) break;
    ++step;
  }
  return step;
}

// Sums a tile of slopes in shared memory (kQueries rows, kKeys + 1 apart) where the bias is broadcast, and writes it.
template <int kQueries, int kKeys, int kThreads>
__device__ __forceinline__ void store_bias_tile(const AttentionBackwardParams& p, const BiasBlock& block, float* tile) {
  static_assert(kQueries <= kThreads && kKeys <= kThreads);
  constexpr int kPitch = kKeys + 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_query = static_cast<int64_t>(block.first.query) * kQueries, first_key = static_cast<int64_t>(block.first.key) * kKeys;
  const int64_t rows_left = p.forward.n - first_query, columns_left = p.forward.m - first_key;
  const int rows = !p.dbias_at.row ? 1 : rows_left < kQueries ? static_cast<int>(rows_left) : kQueries;
  const int columns = !p.dbias_column ? 1 : columns_left < kKeys ? static_cast<int>(columns_left) : kKeys;
  if (!p.dbias_column) {
    if (thread < kQueries) {
      float sum = 0.0f;
      for (int key = 0; key < kKeys; ++key) sum += tile[thread * kPitch + key];
      tile[thread * kPitch] = sum;
    }
    __syncthreads();
  }
  if (!p.dbias_at.row) {
    if (thread < columns) {
      float sum = 0.0f;
      for (int query = 0; query < kQueries; ++query) sum += tile[query * kPitch + thread];
      tile[thread] = sum;
    }
    __syncthreads();
  }
  float* to = row_at(p.dbias, p.dbias_at, block.first.batch, block.first.head, first_query) + first_key * p.dbias_column;
  for (int i = thread; i < rows * columns; i += kThreads)
    to[i / columns * p.dbias_at.row + i % columns] = tile[i / columns * kPitch + i % columns];
}

}  // namespace
}  // namespace genfast
