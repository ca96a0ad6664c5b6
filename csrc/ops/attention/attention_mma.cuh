// What the kernels on tensor cores share (mma.sync, sm_80 and newer): the widths they are compiled for, products of a warp's 16 or 32 rows
// with a tile in shared memory, and how those rows get out.
#pragma once
#include "attention_tile.cuh"

namespace genfast {
namespace {

// Widths of head the kernels are compiled for. A narrower head skips the tiles of 8 or 16 columns that it does not have.
constexpr int kHeadWidths[] = {48, 64, 80, 128, 160, 256};
constexpr int next_narrower(int width) {
  int narrower = 0;
  for (int w : kHeadWidths) narrower = w < width ? w : narrower;
  return narrower;
}

// Whether 16-column step s of a head of d columns, or its upper half, holds anything; certain where a narrower kernel could not have
// served.
template <int kWidth>
__device__ __forceinline__ bool has_step(int s, int d) {
  return 16 * s < next_narrower(kWidth) || 16 * s < d;
}
template <int kWidth>
__device__ __forceinline__ bool has_half(int s, int d) {
  return 16 * s + 8 < next_narrower(kWidth) || 16 * s + 8 < d;
}

// A row is 16 bytes longer than its elements: an odd number of 16-byte units, so that ldmatrix meets no bank twice.
constexpr int pitch_of(int width) {
  return width + 8;
}

// Where this lane points ldmatrix in a tile: rows as a, or as a transposed b; rows as the columns of b.
template <int kWidth, class S>
__device__ __forceinline__ const S* lane_rows(const S* tile, int lane) {
  return tile + lane % 16 * pitch_of(kWidth) + lane / 16 * 8;
}
template <int kWidth, class S>
__device__ __forceinline__ const S* lane_columns(const S* tile, int lane) {
  return tile + (lane / 16 * 8 + lane % 8) * pitch_of(kWidth) + lane / 8 % 2 * 8;
}

template <class S>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return std::is_same_v<S, BFloat16> ? pack_bf16x2(low, high) : pack_f16x2(low, high);
}

// out += rows columns^T over the head: `rows` from lane_rows, `columns` from lane_columns.
template <class S, int kWidth, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply(float (&out)[kRowTiles][kColumnTiles][4], const S* rows, const S* columns, int d) {
#pragma unroll
  for (int s = 0; s < kWidth / 16; ++s) {
    if (!has_step<kWidth>(s, d)) continue;
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_matrices<false>(a[r], rows + r * 16 * pitch_of(kWidth) + s * 16);
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t b[4];
      load_matrices<false>(b, columns + j * 8 * pitch_of(kWidth) + s * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma_m16n8k16<S>(out[r][j], a[r], {b[0], b[1]});
        mma_m16n8k16<S>(out[r][j + 1], a[r], {b[2], b[3]});
      }
    }
  }
}

// out += weights rows: the accumulators of two neighbouring tiles of weights, rounded to S, are the fragment of one. `rows` from lane_rows.
template <class S, int kWidth, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void accumulate(float (&out)[kRowTiles][kWidth / 8][4], const float (&weights)[kRowTiles][kColumnTiles][4],
                                           const S* rows, int d) {
#pragma unroll
  for (int i = 0; i < kColumnTiles / 2; ++i) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int u = 0; u < 4; ++u) a[r][u] = pack<S>(weights[r][2 * i + u / 2][u % 2 * 2], weights[r][2 * i + u / 2][u % 2 * 2 + 1]);
    }
#pragma unroll
    for (int s = 0; s < kWidth / 16; ++s) {
      if (!has_step<kWidth>(s, d)) continue;
      uint32_t b[4];
      load_matrices<true>(b, rows + i * 16 * pitch_of(kWidth) + s * 16);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) mma_m16n8k16<S>(out[r][2 * s], a[r], {b[0], b[1]});
      if (!has_half<kWidth>(s, d)) continue;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) mma_m16n8k16<S>(out[r][2 * s + 1], a[r], {b[2], b[3]});
    }
  }
}

// Writes the first `rows` of a warp's rows, rounded to S, through `own`, shared memory that no other warp uses, so that rows are written
// whole.
template <class S, int kWidth, int kRowTiles>
__device__ __forceinline__ void store_rows(const float (&out)[kRowTiles][kWidth / 8][4], S* own, S* to, int64_t stride, int rows, int d,
                                           bool wide) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      S* row = own + (16 * r + 8 * half + g) * pitch_of(kWidth) + 2 * t;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
        *reinterpret_cast<uint32_t*>(row + 8 * j) = pack<S>(out[r][j][2 * half], out[r][j][2 * half + 1]);
    }
  }
  __syncwarp();
  constexpr int kChunks = kWidth / 8;
#pragma unroll 4
  for (int i = lane; i < kRowTiles * 16 * kChunks; i += 32) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (row >= rows || column >= d) continue;
    const S* from = own + row * pitch_of(kWidth) + column;
    S* at = to + row * stride + column;
    if (wide) {
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && column + e < d; ++e) at[e] = from[e];
    }
  }
}

}  // namespace
}  // namespace genfast
