// What the decoding kernels share. A block of 4 warps works on one part of the keys of one key head, for up to kRows of the rows (heads of
// the group times queries) that share it; its warps take keys in turn, each with its own maximum and sum, and join at the end.
#pragma once
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {

void launch_attention_decode_mma(const AttentionDecodeParams& p, void* stream);

namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr int kWarps = 4, kThreads = 32 * kWarps;

struct DecodeBlock {
  int64_t batch, kv_head, part;
  int64_t length, first;  // the sample's keys; this part's first
  int keys;               // of this part
  int row, rows;          // the first row of this block, and how many follow
};

// Row blocks innermost, then parts: neighbours share keys and values in the second-level cache.
__device__ __forceinline__ DecodeBlock decode_block(const AttentionDecodeParams& p, int rows) {
  const int all = static_cast<int>(p.rows()), blocks = (all + rows - 1) / rows, unit = static_cast<int>(blockIdx.x) / blocks;
  DecodeBlock at;
  at.row = static_cast<int>(blockIdx.x) % blocks * rows;
  at.rows = all - at.row < rows ? all - at.row : rows;
  at.part = unit % static_cast<int>(p.splits);
  at.kv_head = unit / static_cast<int>(p.splits) % static_cast<int>(p.kv_heads);
  at.batch = unit / static_cast<int>(p.splits) / static_cast<int>(p.kv_heads);
  at.length = p.length(at.batch);
  const int64_t keys = p.part_keys(at.length), left = at.length - keys * at.part;
  at.first = keys * at.part;
  at.keys = static_cast<int>(left < 0 ? 0 : left < keys ? left : keys);
  return at;
}
inline unsigned decode_grid(const AttentionDecodeParams& p, int rows) {
  const int64_t blocks = (p.rows() + rows - 1) / rows * p.splits * p.kv_heads * p.batch;
  check(blocks < (int64_t{1} << 31), "q: got ", blocks, " blocks of ", rows, " rows, supported: fewer than 2^31");
  check(p.capacity < (int64_t{1} << 31), "k: got ", p.capacity, " keys, supported: fewer than 2^31");
  return static_cast<unsigned>(blocks);
}

// Where row `row` of this block lies in a tensor of all heads.
__device__ __forceinline__ int64_t row_offset(const AttentionDecodeParams& p, const DecodeBlock& at, const DecodeRows& strides, int row) {
  const int r = at.row + row, n = static_cast<int>(p.n);
  return at.batch * strides.batch + (at.kv_head * p.group() + r / n) * strides.head + r % n * strides.row;
}

// Keys of this part that a row sees: those before this one.
__device__ __forceinline__ int visible_keys(const AttentionDecodeParams& p, const DecodeBlock& at, int row) {
  const int64_t end = row < at.rows ? p.visible(at.length, (at.row + row) % static_cast<int>(p.n)) - at.first : 0;
  return static_cast<int>(end < 0 ? 0 : end < at.keys ? end : at.keys);
}

// What the bias adds to a row's score; `key` counts from the part's first.
template <class S>
__device__ __forceinline__ float bias_at(const AttentionDecodeParams& p, const DecodeBlock& at, int row, int key) {
  const int64_t i = row_offset(p, at, p.bias_at, row) + at.first + key;
  return p.bias_dtype == DType::F32 ? static_cast<const float*>(p.bias)[i] : widen(static_cast<const S*>(p.bias)[i]);
}

// What the warps of a block leave in shared memory for join_warps.
template <int kRows>
struct WarpSums {
  float row_max[kWarps][kRows], row_sum[kWarps][kRows];
};

// Joins the warps' outputs (kWarps, kRows, pitch) and writes the block's rows: the result, or a part of it. Called by all threads, after a
// barrier.
template <class S, int kRows>
__device__ __forceinline__ void join_warps(const AttentionDecodeParams& p, const DecodeBlock& at, const WarpSums<kRows>& sums,
                                           const float* out, int pitch) {
  const int d = static_cast<int>(p.d), n = static_cast<int>(p.n);
  const ScoreUnit& unit = p.unit;
  for (int i = static_cast<int>(threadIdx.x); i < at.rows * d; i += kThreads) {
    const int row = i / d, c = i % d;
    float row_max = kMinusInfinity, sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) row_max = fmaxf(row_max, sums.row_max[w][row]);
    const float shift = row_max == kMinusInfinity ? 0.0f : row_max;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2_fast((sums.row_max[w][row] - shift) * unit.exponent);
      sum = fmaf(weight, sums.row_sum[w][row], sum);
      value = fmaf(weight, out[(w * kRows + row) * pitch + c], value);
    }
    value = sum == 0.0f ? 0.0f : value / sum;
    const int r = at.row + row;
    if (p.splits == 1) {
      const float pair[2] = {value, 0.0f};
      static_cast<S*>(p.o)[row_offset(p, at, p.o_at, row) + c] = element(narrow<S>(pair), 0);
      if (c == 0) {
        const int64_t head = at.kv_head * p.group() + r / n;
        p.lse[(at.batch * p.heads + head) * n + r % n] = sum == 0.0f ? kMinusInfinity : fmaf(shift, unit.logarithm, logf(sum));
      }
    } else {
      const int64_t to = ((at.batch * p.kv_heads + at.kv_head) * p.splits + at.part) * p.rows() + r;
      p.parts[to * d + c] = value;
      if (c == 0) p.part_stats[to] = {row_max, sum};
    }
  }
}

}  // namespace
}  // namespace genfast
