// What the attention kernels share: how rows reach shared memory, and what bias, mask and causality do to a score.
#pragma once
#include "../../core/exact_math.h"
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kMinusInfinity = -__builtin_inff();

// Which accesses may be wide: decided once, on the host.
struct AttentionAccess {
  bool rows;  // 16 bytes of q, k, v, o
  bool bias;  // two neighbours of the bias
  bool mask;
};

inline bool multiples_of(const AttentionRows& at, int64_t elements) {
  return at.batch % elements == 0 && at.head % elements == 0 && at.row % elements == 0;
}

inline AttentionAccess access_of(const AttentionParams& p) {
  const int64_t n = 16 / size_of(p.dtype);
  const auto aligned = [](const void* data, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
  };
  return {p.d % n == 0 && aligned(p.q, 16) && aligned(p.k, 16) && aligned(p.v, 16) && aligned(p.o, 16) && multiples_of(p.q_at, n) &&
              multiples_of(p.k_at, n) && multiples_of(p.v_at, n) && multiples_of(p.o_at, n),
          aligned(p.bias, 2 * size_of(p.bias_dtype)) && multiples_of(p.bias_at, 2), aligned(p.mask, 2) && multiples_of(p.mask_at, 2)};
}

// What a block works on: one head's queries [first, first + rows) of n, which see some of m keys. They lie before_q and before_k rows into
// what the head's pointers say: 0 but for packed sequences.
struct QueryBlock {
  int batch, head, kv_head, rows;
  int64_t first, n, m, before_q, before_k;
};

// Row `i` of a tensor's `rows` where a sequence begins, whatever the offsets say.
__device__ __forceinline__ int64_t start_at(const AttentionParams& p, const void* starts, int i, int64_t rows) {
  const int64_t row = p.wide_starts ? static_cast<const int64_t*>(starts)[i] : static_cast<const int32_t*>(starts)[i];
  return row < 0 ? 0 : row < rows ? row : rows;
}

// Blocks of queries innermost, so that neighbours share keys and values in the second-level cache; under causality the longest first.
// kPacked: sequences of different lengths; rows is not positive where this one has fewer queries.
template <bool kPacked = false>
__device__ __forceinline__ QueryBlock query_block(const AttentionParams& p, int queries) {
  const int blocks = static_cast<int>((p.n + queries - 1) / queries), unit = static_cast<int>(blockIdx.x);  // below 2^31: query_grid
  const int heads = static_cast<int>(p.heads), block = unit % blocks;
  QueryBlock at;
  at.head = unit / blocks % heads;
  at.batch = unit / blocks / heads;
  at.kv_head = at.head / (heads / static_cast<int>(p.kv_heads));
  at.first = static_cast<int64_t>(p.causal ? blocks - 1 - block : block) * queries;
  at.n = p.n;
  at.m = p.m;
  at.before_q = at.before_k = 0;
  if constexpr (kPacked) {
    at.before_q = start_at(p, p.q_starts, at.batch, p.packed);
    at.before_k = start_at(p, p.k_starts, at.batch, p.packed_keys);
    at.n = start_at(p, p.q_starts, at.batch + 1, p.packed) - at.before_q;
    at.m = start_at(p, p.k_starts, at.batch + 1, p.packed_keys) - at.before_k;
  }
  at.rows = at.n - at.first < queries ? static_cast<int>(at.n - at.first) : queries;
  return at;
}
// Where the log-sum-exp of query `query` of the block's sequence lies.
template <bool kPacked = false>
__device__ __forceinline__ int64_t lse_at(const AttentionParams& p, const QueryBlock& at, int64_t query) {
  return kPacked ? at.head * p.packed + at.before_q + query : (at.batch * p.heads + at.head) * p.n + query;
}
inline unsigned query_grid(const AttentionParams& p, int queries) {
  const int64_t blocks = (p.n + queries - 1) / queries * p.heads * p.batch;
  check(blocks < (int64_t{1} << 31), "q: got ", blocks, " blocks of ", queries, " queries, supported: fewer than 2^31");
  return static_cast<unsigned>(blocks);
}

// Keys that some query of the block sees, from the first.
__device__ __forceinline__ int64_t visible_keys(const AttentionParams& p, const QueryBlock& at) {
  if (!p.causal) return at.m;
  const int64_t end = at.first + at.rows + at.m - at.n;
  return end < 0 ? 0 : end < at.m ? end : at.m;
}

template <class T>
__device__ __forceinline__ T* row_at(T* data, const AttentionRows& at, int64_t batch, int64_t head, int64_t row) {
  return data + batch * at.batch + head * at.head + row * at.row;
}

// A tile of kRows rows in shared memory, kPitch elements apart, from `rows` rows of d elements. Columns up to the next multiple of 16 and
// rows beyond `rows` become zeros. The wide way has landed after cp_async_wait_all().
template <class S, int kRows, int kColumns, int kPitch, int kThreads>
__device__ __forceinline__ void load_rows(S* tile, const S* from, int64_t stride, int64_t rows, int d, bool wide) {
  constexpr int kChunks = kColumns / 8;
  const int columns = (d + 15) / 16 * 16, thread = opaque(static_cast<int>(threadIdx.x));
  if (wide) {
    if constexpr (kThreads % kChunks == 0 && kRows % (kThreads / kChunks) == 0) {  // a thread stays in its column
      constexpr int kStep = kThreads / kChunks;
      const int first = thread / kChunks, column = thread % kChunks * 8;
      if (column >= columns) return;
      from += first * stride + column;
#pragma unroll
      for (int row = first, i = 0; i < kRows / kStep; ++i, row += kStep, from += kStep * stride) {
        cp_async16(tile + row * kPitch + column, from, row < rows && column < d);
      }
    } else {
#pragma unroll
      for (int i = 0; i < (kRows * kChunks + kThreads - 1) / kThreads; ++i) {
        const int at = i * kThreads + thread, row = at / kChunks, column = at % kChunks * 8;
        if (row < kRows && column < columns) {
          cp_async16(tile + row * kPitch + column, from + row * stride + column, row < rows && column < d);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int at = thread; at < kRows * kColumns; at += kThreads) {
      const int row = at / kColumns, column = at % kColumns;
      if (column < columns) tile[row * kPitch + column] = row < rows && column < d ? from[row * stride + column] : S{};
    }
  }
}

// Elements i and i + 1, the second only if `both`; `wide`: they move at once.
template <class S>
__device__ __forceinline__ void load_pair(float (&to)[2], const S* from, bool both, bool wide) {
  if (wide && both) {
    const auto pair = *reinterpret_cast<const Vec<S, 2>*>(from);
    to[0] = widen(pair, 0);
    to[1] = widen(pair, 1);
  } else {
    to[0] = widen(from[0]);
    to[1] = both ? widen(from[1]) : 0.0f;
  }
}

// One row's bias and mask from key `first_key` on, and how many keys from there it may see.
struct RowTerms {
  const void* bias;
  const uint8_t* mask;
  int visible;
};

__device__ __forceinline__ RowTerms row_terms(const AttentionParams& p, const QueryBlock& at, int row, int64_t first_key) {
  const int64_t query = at.first + (row < at.rows ? row : at.rows - 1);
  const int64_t last = p.causal && query + at.m - at.n + 1 < at.m ? query + at.m - at.n + 1 : at.m, visible = last - first_key;
  RowTerms terms{nullptr, nullptr, static_cast<int>(visible < 0 ? 0 : visible < INT32_MAX ? visible : INT32_MAX)};
  if (p.bias) {
    const int64_t element = at.batch * p.bias_at.batch + at.head * p.bias_at.head + query * p.bias_at.row + first_key;
    terms.bias = static_cast<const char*>(p.bias) + element * (p.bias_dtype == DType::F32 ? 4 : 2);
  }
  if (p.mask) terms.mask = row_at(p.mask, p.mask_at, at.batch, at.head, query) + first_key;
  return terms;
}

// Products of a query with keys `key` and `key` + 1 become scores: -inf where the query does not see the key. S: the dtype of a bias that
// is not float32. Where there is nothing to hide and no bias, and the unit's factor is 1, products are scores as they are.
template <class S>
__device__ __forceinline__ void finish_scores(const AttentionParams& p, const AttentionAccess& wide, const RowTerms& terms, int key,
                                              float& x, float& y) {
  const float factor = p.unit.factor;
  const bool any = key < terms.visible, both = key + 1 < terms.visible;
  if (p.bias && any) {
    float bias[2];
    if (p.bias_dtype == DType::F32) {
      load_pair(bias, static_cast<const float*>(terms.bias) + key, both, wide.bias);
    } else {
      load_pair(bias, static_cast<const S*>(terms.bias) + key, both, wide.bias);
    }
    x = fmaf(x, factor, bias[0]);
    y = fmaf(y, factor, bias[1]);
  } else {
    x *= factor;
    y *= factor;
  }
  bool first = any, second = both;
  if (p.mask && any) {
    if (wide.mask && both) {
      const unsigned pair = *reinterpret_cast<const uint16_t*>(terms.mask + key);
      first = pair & 0xff;
      second = pair >> 8;
    } else {
      first = terms.mask[key];
      if (both) second = terms.mask[key + 1];
    }
  }
  if (!first) x = kMinusInfinity;
  if (!second) y = kMinusInfinity;
}

// ---- online softmax: powers of two of scores relative to row_max, which is 0 here where no key has been seen ----

// How a tile's scores enter the exponential: 2^(factor score - shift).
struct Power {
  float factor, shift;
};
// Without a bias in one step; exponent row_max is rounded then, alike for all scores of the row. With one, scores have no room for the
// exponent before the difference is taken: that has been done for them.
__device__ __forceinline__ Power power_of(bool bias, float exponent, float row_max) {
  return bias ? Power{1.0f, 0.0f} : Power{exponent, mul(row_max, exponent)};
}
// What sums relative to row_max `from` are to be multiplied by for row_max `to`. Rounded by name, as the shifts are.
__device__ __forceinline__ float rescale_of(bool bias, float exponent, float from, float to) {
  return exp2_fast(bias ? (from - to) * exponent : sub(mul(from, exponent), mul(to, exponent)));
}
// The log-sum-exp and, where it is asked for, RowStats of query number `at`: `sum` as it was added up. A query that sees nothing has 0.
__device__ __forceinline__ void store_row_stats(const AttentionParams& p, int64_t at, float row_max, float sum) {
  const ScoreUnit& unit = p.unit;
  const bool nothing = sum == 0.0f;
  // By how much the shift's rounding made all powers too large.
  const float excess = nothing || p.bias ? 0.0f : fmaf(row_max, unit.exponent, -mul(row_max, unit.exponent));
  const float log_sum = nothing ? -kMinusInfinity : fmaf(-excess, kLn2, logf(sum));
  p.lse[at] = nothing ? kMinusInfinity : fmaf(row_max, unit.logarithm, log_sum);
  if (p.row_stats) p.row_stats[at] = {nothing ? 0.0f : row_max, log_sum * kLog2e};
}

}  // namespace
}  // namespace genfast
