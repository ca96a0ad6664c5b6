// The tangent of attention on tensor cores of sm_80 and newer: given o and row_stats, with P = exp(S - row_max) / row_sum and the tangents
// of q, k, v,
//   dS = scale (tq k^T + q tk^T)     mu = sum(P dS)     to = (P dS) v + P tv - mu o     tlse = mu
// so nothing is carried from tile to tile but two sums. A warp holds 16 query rows, as in the forward pass.
#pragma once
#include "attention_forward.cuh"

namespace genfast {
namespace {

constexpr int kTangentQueries = 64, kTangentThreads = 128;

// Keys a tile: q, tq and tiles of k, tk, v, tv fit in the 99 KiB that sm_86 gives a block.
constexpr int tangent_keys(int width) {
  return width > 160 ? 16 : width > 80 ? 32 : 64;
}
constexpr int tangent_shared_bytes(int width) {
  return (2 * kTangentQueries + 4 * tangent_keys(width)) * pitch_of(width) * 2;
}

struct TangentAccess {
  AttentionAccess forward;
  bool rows;  // 16 bytes of the tangents too
};

inline TangentAccess access_of(const AttentionTangentParams& p) {
  const int64_t n = 16 / size_of(p.forward.dtype);
  const auto wide = [n](const void* data, const AttentionRows& at) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && multiples_of(at, n);
  };
  const AttentionAccess forward = access_of(p.forward);
  return {forward, forward.rows && wide(p.tq, p.tq_at) && wide(p.tk, p.tk_at) && wide(p.tv, p.tv_at) && wide(p.to, p.to_at)};
}

template <class S, int kWidth>
__global__ void __launch_bounds__(kTangentThreads, 2)
    tangent_kernel(const __grid_constant__ AttentionTangentParams all, const __grid_constant__ TangentAccess wide) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const AttentionParams& p = all.forward;
  constexpr int kPitch = pitch_of(kWidth), kSteps = kWidth / 16, kKeys = tangent_keys(kWidth), kKeyTiles = kKeys / 8;
  constexpr int kTile = kKeys * kPitch, kQueryTile = kTangentQueries * kPitch;
  GF_DYNAMIC_SHARED(S, queries);             // q, tq
  S* const keys = queries + 2 * kQueryTile;  // k, tk
  S* const values = keys + 2 * kTile;        // v, tv
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int d = static_cast<int>(p.d);
  const auto has_step = [&](int s) { return 16 * s < next_narrower(kWidth) || 16 * s < d; };
  const auto has_half = [&](int s) { return 16 * s + 8 < next_narrower(kWidth) || 16 * s + 8 < d; };

  const QueryBlock at = query_block(p, kTangentQueries);
  const int64_t end = visible_keys(p, at);
  const int tiles = static_cast<int>((end + kKeys - 1) / kKeys);
  const auto load_tile = [&](S* tile, const void* data, const AttentionRows& strides, int number) {
    const int64_t key = static_cast<int64_t>(number) * kKeys;
    const S* from = row_at(static_cast<const S*>(data), strides, at.batch, at.kv_head, key);
    load_rows<S, kKeys, kWidth, kPitch, kTangentThreads>(tile, from, strides.row, p.m - key, d, wide.rows);
  };
  const auto load_keys = [&](int number) {
    load_tile(keys, p.k, p.k_at, number);
    load_tile(keys + kTile, all.tk, all.tk_at, number);
  };
  if (tiles > 0) {
    const auto load_queries = [&](S* tile, const void* data, const AttentionRows& strides) {
      const S* from = row_at(static_cast<const S*>(data), strides, at.batch, at.head, at.first);
      load_rows<S, kTangentQueries, kWidth, kPitch, kTangentThreads>(tile, from, strides.row, at.rows, d, wide.rows);
    };
    load_queries(queries, p.q, p.q_at);
    load_queries(queries + kQueryTile, all.tq, all.tq_at);
    load_keys(0);
  }

  S* const my_queries = queries + warp * 16 * kPitch;
  const S* const from_queries = my_queries + lane % 16 * kPitch + lane / 16 * 8;
  const S* const from_keys = keys + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
  const S* const from_values = values + lane % 16 * kPitch + lane / 16 * 8;
  const int row = warp * 16 + g;  // and row + 8
  const float exponent = p.unit.exponent;
  RowStats stats[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int mine = row + 8 * half < at.rows ? row + 8 * half : at.rows - 1;
    stats[half] = p.row_stats[lse_at(p, at, at.first + mine)];
  }

  float out[2 * kSteps][4] = {}, mean[2] = {};
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t key = static_cast<int64_t>(tile) * kKeys;
    cp_async_wait_all();
    __syncthreads();  // the keys are there; the values' memory is free
    load_tile(values, p.v, p.v_at, tile);
    load_tile(values + kTile, all.tv, all.tv_at, tile);

    float weight[kKeyTiles][4] = {}, slope[kKeyTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (!has_step(s)) continue;
      uint32_t q[4], tq[4];
      load_matrices<false>(q, from_queries + s * 16);
      load_matrices<false>(tq, from_queries + kQueryTile + s * 16);
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t k[4], tk[4];
        load_matrices<false>(k, from_keys + j * 8 * kPitch + s * 16);
        load_matrices<false>(tk, from_keys + kTile + j * 8 * kPitch + s * 16);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          mma_m16n8k16<S>(weight[j + u], q, {k[2 * u], k[2 * u + 1]});
          mma_m16n8k16<S>(slope[j + u], tq, {k[2 * u], k[2 * u + 1]});
          mma_m16n8k16<S>(slope[j + u], q, {tk[2 * u], tk[2 * u + 1]});
        }
      }
    }
    cp_async_wait_all();
    __syncthreads();  // the values are there; the keys' memory is free
    if (tile + 1 < tiles) load_keys(tile + 1);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowTerms terms = row_terms(p, at, row + 8 * half, key);
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        float &x = weight[j][2 * half], &y = weight[j][2 * half + 1];
        finish_scores<S>(p, wide.forward, terms, 8 * j + 2 * t, x, y);
        x = exp2_fast(fmaf(x - stats[half].row_max, exponent, -stats[half].log_sum));
        y = exp2_fast(fmaf(y - stats[half].row_max, exponent, -stats[half].log_sum));
        float &dx = slope[j][2 * half], &dy = slope[j][2 * half + 1];
        dx *= p.scale * x;
        dy *= p.scale * y;
        mean[half] += dx + dy;
      }
    }

#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      uint32_t weights[4], slopes[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        weights[u] = pack<S>(weight[2 * i + u / 2][u % 2 * 2], weight[2 * i + u / 2][u % 2 * 2 + 1]);
        slopes[u] = pack<S>(slope[2 * i + u / 2][u % 2 * 2], slope[2 * i + u / 2][u % 2 * 2 + 1]);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (!has_step(s)) continue;
        uint32_t v[4], tv[4];
        load_matrices<true>(v, from_values + i * 16 * kPitch + s * 16);
        load_matrices<true>(tv, from_values + kTile + i * 16 * kPitch + s * 16);
        mma_m16n8k16<S>(out[2 * s], slopes, {v[0], v[1]});
        mma_m16n8k16<S>(out[2 * s], weights, {tv[0], tv[1]});
        if (!has_half(s)) continue;
        mma_m16n8k16<S>(out[2 * s + 1], slopes, {v[2], v[3]});
        mma_m16n8k16<S>(out[2 * s + 1], weights, {tv[2], tv[3]});
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float mu = mean[half];
    mu += __shfl_xor_sync(~0u, mu, 1);
    mu += __shfl_xor_sync(~0u, mu, 2);
    if (row + 8 * half >= at.rows) continue;
    const int64_t query = at.first + row + 8 * half;
    if (t == 0) all.tlse[lse_at(p, at, query)] = mu;
    const S* o = row_at(static_cast<const S*>(p.o), p.o_at, at.batch, at.head, query);
    S* to = row_at(static_cast<S*>(all.to), all.to_at, at.batch, at.head, query);
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) {
      const int column = 8 * j + 2 * t;
      if (column >= d) continue;
      const bool both = column + 1 < d;
      float value[2];
      load_pair(value, o + column, both, wide.rows);
      value[0] = fmaf(-mu, value[0], out[j][2 * half]);
      value[1] = fmaf(-mu, value[1], out[j][2 * half + 1]);
      if (wide.rows) {
        *reinterpret_cast<uint32_t*>(to + column) = pack<S>(value[0], value[1]);
      } else {
        const auto narrow_pair = narrow<S>(value);
        to[column] = element(narrow_pair, 0);
        if (both) to[column + 1] = element(narrow_pair, 1);
      }
    }
  }
#endif
}

template <class S, int kIndex = 0>
void launch_tangent(const AttentionTangentParams& p, void* stream) {
  constexpr int kWidth = kHeadWidths[kIndex], kBytes = tangent_shared_bytes(kWidth);
  if constexpr (kIndex + 1 < sizeof kHeadWidths / sizeof kHeadWidths[0]) {
    if (p.forward.d > kWidth) return launch_tangent<S, kIndex + 1>(p, stream);
  }
  if (kBytes > 48 * 1024) GF_ALLOW_SHARED((tangent_kernel<S, kWidth>), kBytes);
  GF_LAUNCH((tangent_kernel<S, kWidth>), query_grid(p.forward, kTangentQueries), kTangentThreads, kBytes, stream, p, access_of(p));
}

}  // namespace
}  // namespace genfast
