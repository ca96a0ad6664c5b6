// The forward pass on tensor cores of sm_80 and newer (mma.sync, cp.async): online softmax over tiles of keys (Milakov and Gimelshein 2018;
// Dao 2023). Each warp holds 16 or 32 query rows: their scores, weights and outputs never leave its registers.
#pragma once
#include "attention_mma.cuh"

namespace genfast {
namespace {

// One block: `warps` x `row_tiles` x 16 queries against `keys` keys at a time; `blocks` of it share a multiprocessor.
struct ForwardTile {
  int warps, row_tiles, keys, blocks;
  constexpr int queries() const { return warps * row_tiles * 16; }
  constexpr int threads() const { return warps * 32; }
};

enum class ForwardKind { kLong, kShortKeys, kFewQueries, kPacked };

// The tile table. Keys: K and V of one tile and Q fit in 99 KiB, what sm_86 gives a block. Rows: the outputs of a warp (row_tiles x width /
// 2 registers a thread) leave room for its scores (row_tiles x keys / 2).
constexpr ForwardTile forward_tile(ForwardKind kind, int width) {
  if (width > 160) return {4, 1, 64, 2};
  switch (kind) {
    case ForwardKind::kShortKeys:  // 77 keys in one tile, 154 in two
      return {4, 1, 80, width > 80 ? 2 : 3};
    case ForwardKind::kFewQueries:  // more blocks
    case ForwardKind::kPacked:      // few queries in any sequence
      return {4, 1, 64, width > 80 ? 2 : 3};
    default:
      return width > 128 ? ForwardTile{8, 1, 64, 1} : ForwardTile{4, 2, width > 80 ? 48 : 64, 2};  // with 64 keys width 128 spills
  }
}

inline ForwardKind forward_kind(const AttentionParams& p) {
  const int64_t long_tiles = (p.n + 127) / 128 * p.heads * p.batch;
  if (p.m <= 80 || (p.m > 128 && p.m <= 160)) return ForwardKind::kShortKeys;
  return p.n <= 64 || long_tiles < 2 * gf_device::multiprocessors() ? ForwardKind::kFewQueries : ForwardKind::kLong;
}

constexpr int forward_shared_bytes(ForwardTile tile, int width) {
  return (tile.queries() + 2 * tile.keys) * pitch_of(width) * 2;
}

template <class S, int kWidth, ForwardKind kKind>
__global__ void __launch_bounds__(forward_tile(kKind, kWidth).threads(), forward_tile(kKind, kWidth).blocks)
    forward_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ AttentionAccess wide) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr ForwardTile kTile = forward_tile(kKind, kWidth);
  constexpr int kPitch = pitch_of(kWidth), kColumnTiles = kWidth / 8, kKeys = kTile.keys, kKeyTiles = kKeys / 8,
                kRowTiles = kTile.row_tiles;
  constexpr int kThreads = kTile.threads(), kQueries = kTile.queries();
  GF_DYNAMIC_SHARED(S, queries);
  S* const keys = queries + kQueries * kPitch;
  S* const values = keys + kKeys * kPitch;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int d = static_cast<int>(p.d);

  constexpr bool kPacked = kKind == ForwardKind::kPacked;
  const QueryBlock at = query_block<kPacked>(p, kQueries);
  if (kPacked && at.rows <= 0) return;
  const int64_t end = visible_keys(p, at);
  const int tiles = static_cast<int>((end + kKeys - 1) / kKeys);
  const S* k = row_at(static_cast<const S*>(p.k), p.k_at, at.batch, at.kv_head, at.before_k);
  const S* v = row_at(static_cast<const S*>(p.v), p.v_at, at.batch, at.kv_head, at.before_k);
  const auto load_tile = [&](S* tile, const S* from, int64_t stride, int number) {
    const int64_t key = static_cast<int64_t>(number) * kKeys;
    load_rows<S, kKeys, kWidth, kPitch, kThreads>(tile, from + key * stride, stride, at.m - key, d, wide.rows);
  };
  if (tiles > 0) {
    const S* q = row_at(static_cast<const S*>(p.q), p.q_at, at.batch, at.head, at.before_q + at.first);
    load_rows<S, kQueries, kWidth, kPitch, kThreads>(queries, q, p.q_at.row, at.rows, d, wide.rows);
    load_tile(keys, k, p.k_at.row, 0);
  }

  S* const my_queries = queries + warp * kRowTiles * 16 * kPitch;
  const S* const from_queries = lane_rows<kWidth>(my_queries, lane);
  const S* const from_keys = lane_columns<kWidth>(keys, lane);
  const S* const from_values = lane_rows<kWidth>(values, lane);
  // This lane's rows of the block: my_row() + 8 * half + 16 * row tile. Worked out where it is used: registers are dear.
  const auto my_row = [] {
    const int thread = opaque(static_cast<int>(threadIdx.x));
    return thread / 32 * kRowTiles * 16 + thread % 32 / 4;
  };
  const ScoreUnit& unit = p.unit;

  float out[kRowTiles][kColumnTiles][4] = {};
  float row_max[kRowTiles][2], row_sum[kRowTiles][2];
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    row_max[r / 2][r % 2] = kMinusInfinity;
    row_sum[r / 2][r % 2] = 0.0f;
  }

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t key = static_cast<int64_t>(tile) * kKeys;
    cp_async_wait_all();
    __syncthreads();  // the keys are there; the values' memory is free
    load_tile(values, v, p.v_at.row, tile);

    float score[kRowTiles][kKeyTiles][4] = {};
    multiply<S, kWidth>(score, from_queries, from_keys, d);
    cp_async_wait_all();
    __syncthreads();  // the values are there; the keys' memory is free
    if (tile + 1 < tiles) load_tile(keys, k, p.k_at.row, tile + 1);

    const bool edge = key + kKeys > at.m || (p.causal && key + kKeys > at.first + at.m - at.n + 1);
    const bool finish = p.bias || p.mask || edge || unit.factor != 1.0f;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (finish) {
          const int columns = opaque(static_cast<int>(threadIdx.x)) % 4 * 2;
          const RowTerms terms = row_terms(p, at, my_row() + 16 * r + 8 * half, key);
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j) {
            finish_scores<S>(p, wide, terms, 8 * j + columns, score[r][j][2 * half], score[r][j][2 * half + 1]);
          }
        }
        float here = kMinusInfinity;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j) here = fmaxf(here, fmaxf(score[r][j][2 * half], score[r][j][2 * half + 1]));
        here = fmaxf(here, __shfl_xor_sync(~0u, here, 1));
        here = fmaxf(here, __shfl_xor_sync(~0u, here, 2));
        const float now = fmaxf(row_max[r][half], here), shift = now == kMinusInfinity ? 0.0f : now;
        const float rescale = rescale_of(p.bias, unit.exponent, row_max[r][half], shift);
        const Power power = power_of(p.bias, unit.exponent, shift);
        row_max[r][half] = now;
        if (p.bias) {
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j) {
            score[r][j][2 * half] = (score[r][j][2 * half] - shift) * unit.exponent;
            score[r][j][2 * half + 1] = (score[r][j][2 * half + 1] - shift) * unit.exponent;
          }
        }
        float part = 0.0f;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j) {
          float &x = score[r][j][2 * half], &y = score[r][j][2 * half + 1];
          x = exp2_fast(fmaf(x, power.factor, -power.shift));
          y = exp2_fast(fmaf(y, power.factor, -power.shift));
          part += x + y;
        }
        row_sum[r][half] = fmaf(row_sum[r][half], rescale, part);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          out[r][j][2 * half] *= rescale;
          out[r][j][2 * half + 1] *= rescale;
        }
      }
    }
    accumulate<S, kWidth>(out, score, from_values, d);
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = row_sum[r][half];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      const float inverse = all == 0.0f ? 0.0f : 1.0f / all;
      const int row = my_row() + 16 * r + 8 * half;
      if (lane % 4 == 0 && row < at.rows) store_row_stats(p, lse_at<kPacked>(p, at, at.first + row), row_max[r][half], all);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        out[r][j][2 * half] *= inverse;
        out[r][j][2 * half + 1] *= inverse;
      }
    }
  }
  const int before = warp * kRowTiles * 16;
  S* o = row_at(static_cast<S*>(p.o), p.o_at, at.batch, at.head, at.before_q + at.first + before);
  store_rows<S, kWidth>(out, my_queries, o, p.o_at.row, at.rows - before, d, wide.rows);
#endif
}

template <class S, int kWidth, ForwardKind kKind>
void launch_forward_as(const AttentionParams& p, void* stream) {
  constexpr ForwardTile kTile = forward_tile(kKind, kWidth);
  constexpr int kBytes = forward_shared_bytes(kTile, kWidth);
  if (kBytes > 48 * 1024) GF_ALLOW_SHARED((forward_kernel<S, kWidth, kKind>), kBytes);
  GF_LAUNCH((forward_kernel<S, kWidth, kKind>), query_grid(p, kTile.queries()), kTile.threads(), kBytes, stream, p, access_of(p));
}

template <class S, int kIndex = 0>
void launch_forward(const AttentionParams& p, void* stream) {
  constexpr int kWidth = kHeadWidths[kIndex];
  if constexpr (kIndex + 1 < sizeof kHeadWidths / sizeof kHeadWidths[0]) {
    if (p.d > kWidth) return launch_forward<S, kIndex + 1>(p, stream);
  }
  if (p.q_starts) return launch_forward_as<S, kWidth, ForwardKind::kPacked>(p, stream);
  if constexpr (kWidth > 160) {
    launch_forward_as<S, kWidth, ForwardKind::kFewQueries>(p, stream);  // one tile serves all
  } else {
    switch (forward_kind(p)) {
      case ForwardKind::kShortKeys:
        return launch_forward_as<S, kWidth, ForwardKind::kShortKeys>(p, stream);
      case ForwardKind::kFewQueries:
        return launch_forward_as<S, kWidth, ForwardKind::kFewQueries>(p, stream);
      default:
        return launch_forward_as<S, kWidth, ForwardKind::kLong>(p, stream);
    }
  }
}

}  // namespace
}  // namespace genfast
