// The backward pass on tensor cores of sm_80 and newer (mma.sync, cp.async). A block owns rows and walks over the other side; each warp
// holds 16 or 32 of its rows, whose scores, slopes and gradients never leave its registers. Nothing is added in memory: same bits every
// run.
#pragma once
#include "attention_backward_tile.cuh"
#include "attention_mma.cuh"

namespace genfast {
namespace {

// One block of `warps` warps; `blocks` of it share a multiprocessor. Each warp holds `row_tiles` x 16 rows against `walked` rows at a time:
// rows of its own against all that the block walks over, or, with `divide`, the rows of all against a part of it.
struct BackwardTile {
  int warps, row_tiles, walked, blocks;
  bool divide;
  constexpr int rows() const { return (divide ? 1 : warps) * row_tiles * 16; }
  constexpr int walked_rows() const { return (divide ? warps : 1) * walked; }
  constexpr int threads() const { return warps * 32; }
};

// The tile table. A thread holds row_tiles x (width / 2 for each gradient + walked) numbers; everything shared fits in 99 KiB, what sm_86
// gives a block. Two row tiles halve what is read from shared memory. `few`: where larger tiles would leave multiprocessors idle.
constexpr BackwardTile backward_tile(Pass pass, int width, bool few) {
  if (few) return {4, 1, width > 80 ? 16 : 32, 2, true};
  if (pass == Pass::kQueries) {
    if (width > 160) return {4, 1, 32, 2, false};
    if (width > 128) return {4, 1, 64, 2, false};
    return {4, 2, width > 64 ? 32 : 64, 2, false};
  }
  if (pass == Pass::kKeys) return {4, 1, 16, 2, false};
  if (pass == Pass::kValues || width > 128) return {4, 1, 32, 2, false};
  if (width > 64) return {4, 1, width > 80 ? 48 : 64, 2, false};  // with 64 width 128 spills on sm_80
  return {4, 2, 32, 2, false};
}
constexpr int backward_shared_bytes(Pass pass, int width, bool few) {
  const BackwardTile tile = backward_tile(pass, width, few);
  const int rows = (makes_slopes(pass) ? 2 : 1) * tile.rows() + 2 * tile.walked_rows();
  return rows * pitch_of(width) * 2 + (owns_keys(pass) ? tile.walked_rows() * static_cast<int>(sizeof(QueryNumbers)) : 0);
}

// Adds up what the warps of a block hold, in the first of them, through kTiles x 128 numbers of shared memory that nobody else uses.
template <int kWarps, int kTiles>
__device__ __forceinline__ void sum_over_warps(float (&x)[1][kTiles][4], float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (int from = 1; from < kWarps; ++from) {
    __syncthreads();  // the last warp's are read
    if (warp == from) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) shared[i * 32 + lane] = x[0][i / 4][i % 4];
    }
    __syncthreads();  // this warp's are there
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) x[0][i / 4][i % 4] += shared[i * 32 + lane];
    }
  }
}

template <class S, int kWidth, Pass kPass, bool kFew>
__global__ void __launch_bounds__(backward_tile(kPass, kWidth, kFew).threads(), backward_tile(kPass, kWidth, kFew).blocks)
    backward_kernel(const __grid_constant__ AttentionBackwardParams p, const __grid_constant__ AttentionAccess wide) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr BackwardTile kTile = backward_tile(kPass, kWidth, kFew);
  constexpr bool kDivide = kTile.divide, kOwnsKeys = owns_keys(kPass), kSlopes = makes_slopes(kPass), kValues = makes_values(kPass);
  constexpr int kPitch = pitch_of(kWidth), kRows = kTile.rows(), kRowTiles = kTile.row_tiles, kThreads = kTile.threads();
  constexpr int kWalked = kTile.walked_rows(), kColumnTiles = kTile.walked / 8;
  // 1: q and k, which make the scores; 2: grad_o and v, which make the gradients of the weights.
  GF_DYNAMIC_SHARED(S, own1);
  S* const own2 = own1 + kRows * kPitch;
  S* const walked1 = own2 + (kSlopes ? kRows * kPitch : 0);
  S* const walked2 = walked1 + kWalked * kPitch;
  QueryNumbers* const numbers = reinterpret_cast<QueryNumbers*>(walked2 + kWalked * kPitch);  // of the walked queries
  const AttentionParams& f = p.forward;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, d = static_cast<int>(f.d);
  const GradientBlock at = gradient_block<kPass>(f, kRows, kWalked, static_cast<int>(blockIdx.x));
  const int steps = at.tiles * at.walked_heads;

  const auto load_own = [&](S* tile, const void* data, const AttentionRows& strides) {
    const S* from = row_at(static_cast<const S*>(data), strides, at.batch, at.head, at.first);
    load_rows<S, kRows, kWidth, kPitch, kThreads>(tile, from, strides.row, at.rows, d, wide.rows);
  };
  const auto walked_head = [&](int step) { return at.walked_head + step / at.tiles; };
  const auto walked_row = [&](int step) { return at.begin + step % at.tiles * kWalked; };
  const auto load_walked = [&](S* tile, const void* data, const AttentionRows& strides, int step) {
    const int row = walked_row(step);
    const S* from = row_at(static_cast<const S*>(data), strides, at.batch, walked_head(step), row);
    load_rows<S, kWalked, kWidth, kPitch, kThreads>(tile, from, strides.row, (kOwnsKeys ? f.n : f.m) - row, d, wide.rows);
  };
  const auto load_walked1 = [&](int step) { load_walked(walked1, kOwnsKeys ? f.q : f.k, kOwnsKeys ? f.q_at : f.k_at, step); };
  const auto load_walked2 = [&](int step) { load_walked(walked2, kOwnsKeys ? p.grad_o : f.v, kOwnsKeys ? p.grad_o_at : f.v_at, step); };
  if (steps > 0) {
    load_own(own1, kOwnsKeys ? f.k : f.q, kOwnsKeys ? f.k_at : f.q_at);
    if constexpr (kSlopes) load_own(own2, kOwnsKeys ? f.v : p.grad_o, kOwnsKeys ? f.v_at : p.grad_o_at);
    load_walked2(0);
  }

  // The first of this warp's rows, of the block's and of the walked ones.
  const int own_part = kDivide ? 0 : warp * kRowTiles * 16, walked_part = kDivide ? warp * kTile.walked : 0;
  S* const my1 = own1 + own_part * kPitch;
  S* const my2 = own2 + own_part * kPitch;
  const S* const my_walked1 = walked1 + walked_part * kPitch;
  const S* const my_walked2 = walked2 + walked_part * kPitch;
  // This lane's rows of the block: my_row() + 8 * half + 16 * row tile. Worked out where it is used: registers are dear.
  const auto my_row = [] {
    const int thread = opaque(static_cast<int>(threadIdx.x));
    return (kDivide ? 0 : thread / 32 * kRowTiles * 16) + thread % 32 / 4;
  };

  [[maybe_unused]] QueryNumbers mine[kRowTiles][2];
  if constexpr (!kOwnsKeys) {
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) mine[r / 2][r % 2] = query_numbers(p, at.batch, at.head, at.first + my_row() + 8 * r);
  }
  [[maybe_unused]] float gradient[kSlopes ? kRowTiles : 1][kWidth / 8][4] = {};   // dq or dk, without the scale
  [[maybe_unused]] float of_values[kValues ? kRowTiles : 1][kWidth / 8][4] = {};  // dv

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int row = walked_row(step) + walked_part;
    cp_async_wait_all();
    __syncthreads();  // walked2 is there; walked1 and the numbers are free
    load_walked1(step);
    if constexpr (kOwnsKeys) {
      const int i = static_cast<int>(threadIdx.x);
      if (i < kWalked) numbers[i] = query_numbers(p, at.batch, walked_head(step), walked_row(step) + i);
    }
    [[maybe_unused]] float slope[kRowTiles][kColumnTiles][4] = {};
    if constexpr (kSlopes) multiply<S, kWidth>(slope, lane_rows<kWidth>(my2, lane), lane_columns<kWidth>(my_walked2, lane), d);
    cp_async_wait_all();
    __syncthreads();  // walked1 and the numbers are there; walked2 is free, unless dv needs it
    if (!kValues && step + 1 < steps) load_walked2(step + 1);
    float score[kRowTiles][kColumnTiles][4] = {};
    multiply<S, kWidth>(score, lane_rows<kWidth>(my1, lane), lane_columns<kWidth>(my_walked1, lane), d);

    // Weights and slopes.
    const int columns = opaque(static_cast<int>(threadIdx.x)) % 4 * 2;
    if constexpr (kOwnsKeys) {
      const bool finish = f.bias || f.mask || f.unit.factor != 1.0f || (f.causal && at.first + kRows - 1 > row + f.m - f.n);
      if (finish) {
#pragma unroll
        for (int r = 0; r < 2 * kRowTiles; ++r) {
          const int first = opaque(columns);  // so that no row's offsets are kept for the next
          const KeyTerms terms = key_terms(f, at.batch, walked_head(step), row, at.first + my_row() + 8 * r);
#pragma unroll
          for (int i = 0; i < 2 * kColumnTiles; ++i) {
            float& x = score[r / 2][i / 2][r % 2 * 2 + i % 2];
            x = finish_key_score<S>(f, terms, i / 2 * 8 + first + i % 2, x);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kColumnTiles; ++i) {  // query by query, so that no more than one's numbers take registers
        const QueryNumbers query = numbers[walked_part + columns + i / 2 * 8 + i % 2];
#pragma unroll
        for (int r = 0; r < 2 * kRowTiles; ++r) {
          float& x = score[r / 2][i / 2][r % 2 * 2 + i % 2];
          x = weight_of(x, query.row_max, query.log_sum, f.unit.exponent);
          if constexpr (kSlopes) {
            float& slope_of_x = slope[r / 2][i / 2][r % 2 * 2 + i % 2];
            slope_of_x = x * (slope_of_x - query.delta);
          }
        }
      }
    } else {
      const bool finish = f.bias || f.mask || f.unit.factor != 1.0f || row + kTile.walked > f.m ||
                          (f.causal && row + kTile.walked > at.first + f.m - f.n + 1);
      const QueryBlock queries{at.batch, at.head, at.walked_head, at.rows, at.first, f.n, f.m, 0, 0};
#pragma unroll
      for (int r = 0; r < 2 * kRowTiles; ++r) {
        const QueryNumbers query = mine[r / 2][r % 2];
        RowTerms terms{};
        if (finish) terms = row_terms(f, queries, my_row() + 8 * r, row);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          float &x = score[r / 2][j][r % 2 * 2], &y = score[r / 2][j][r % 2 * 2 + 1];
          if (finish) finish_scores<S>(f, wide, terms, 8 * j + columns, x, y);
          float &dx = slope[r / 2][j][r % 2 * 2], &dy = slope[r / 2][j][r % 2 * 2 + 1];
          dx = weight_of(x, query.row_max, query.log_sum, f.unit.exponent) * (dx - query.delta);
          dy = weight_of(y, query.row_max, query.log_sum, f.unit.exponent) * (dy - query.delta);
        }
      }
    }

    if constexpr (kValues) {
      accumulate<S, kWidth>(of_values, score, lane_rows<kWidth>(my_walked2, lane), d);
      __syncthreads();  // walked2 is free
      if (step + 1 < steps) load_walked2(step + 1);
    }
    if constexpr (kSlopes) accumulate<S, kWidth>(gradient, slope, lane_rows<kWidth>(my_walked1, lane), d);
  }

  if constexpr (kDivide) {
    float* const shared = reinterpret_cast<float*>(walked1);
    static_assert(2 * kWalked * kPitch * static_cast<int>(sizeof(S)) >= 16 * kWidth * 4);
    if constexpr (kSlopes) sum_over_warps<kTile.warps>(gradient, shared);
    if constexpr (kValues) sum_over_warps<kTile.warps>(of_values, shared);
    if (warp > 0) return;
  }
  const GradientBlock own = gradient_block<kPass>(f, kRows, kWalked, opaque(static_cast<int>(blockIdx.x)));  // again: registers are dear
  const int rows = own.rows - own_part;
  if constexpr (kSlopes) {
#pragma unroll
    for (auto& tiles : gradient) {
#pragma unroll
      for (auto& tile : tiles) {
#pragma unroll
        for (float& x : tile) x *= f.scale;
      }
    }
    const AttentionRows& strides = kOwnsKeys ? p.dk_at : p.dq_at;
    S* to = row_at(static_cast<S*>(kOwnsKeys ? p.dk : p.dq), strides, own.batch, own.head, own.first + own_part);
    store_rows<S, kWidth>(gradient, my1, to, strides.row, rows, d, wide.rows);
  }
  if constexpr (kValues) {
    S* to = row_at(static_cast<S*>(p.dv), p.dv_at, own.batch, own.head, own.first + own_part);
    store_rows<S, kWidth>(of_values, kSlopes ? my2 : my1, to, p.dv_at.row, rows, d, wide.rows);
  }
#endif
}

// A block of the bias kernel: 64 queries against `keys` keys.
constexpr int kBiasQueries = 64, kBiasThreads = 128;
constexpr int bias_keys(int width) {
  return width > 160 ? 32 : 64;
}
constexpr int bias_shared_bytes(int width) {
  const int operands = 2 * (kBiasQueries + bias_keys(width)) * pitch_of(width) * 2, tile = kBiasQueries * (bias_keys(width) + 1) * 4;
  return operands > tile ? operands : tile;
}

template <class S, int kWidth>
__global__ void __launch_bounds__(kBiasThreads, 2)
    bias_kernel(const __grid_constant__ AttentionBackwardParams p, const __grid_constant__ AttentionAccess wide) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kPitch = pitch_of(kWidth), kKeys = bias_keys(kWidth), kColumnTiles = kKeys / 8;
  GF_DYNAMIC_SHARED(S, queries);
  S* const grads = queries + kBiasQueries * kPitch;
  S* const keys = grads + kBiasQueries * kPitch;
  S* const values = keys + kKeys * kPitch;
  const AttentionParams& f = p.forward;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, d = static_cast<int>(f.d);
  const BiasBlock block = bias_block(p, kBiasQueries, kKeys);
  const auto next = [&](int step) { return next_bias_step(f, block, step, kBiasQueries, kKeys); };
  const auto load = [&](S* rows, const void* of_queries, const AttentionRows& queries_at, S* columns, const void* of_keys,
                        const AttentionRows& keys_at, int step) {
    const BiasStep tile = bias_step(f, block, step, kBiasQueries, kKeys);
    const S* q = row_at(static_cast<const S*>(of_queries), queries_at, tile.at.batch, tile.at.head, tile.at.first);
    load_rows<S, kBiasQueries, kWidth, kPitch, kBiasThreads>(rows, q, queries_at.row, tile.at.rows, d, wide.rows);
    const S* k = row_at(static_cast<const S*>(of_keys), keys_at, tile.at.batch, tile.at.kv_head, tile.key);
    load_rows<S, kKeys, kWidth, kPitch, kBiasThreads>(columns, k, keys_at.row, f.m - tile.key, d, wide.rows);
  };
  const auto load_scored = [&](int step) { load(queries, f.q, f.q_at, keys, f.k, f.k_at, step); };
  const int my_row = warp * 16 + lane / 4, columns = lane % 4 * 2;

  float sum[kColumnTiles][4] = {};
  int step = next(0);
  if (step < block.steps) load_scored(step);
#pragma unroll 1
  while (step < block.steps) {
    cp_async_wait_all();
    __syncthreads();  // queries and keys are there; the memory of the others is free
    load(grads, p.grad_o, p.grad_o_at, values, f.v, f.v_at, step);
    float score[1][kColumnTiles][4] = {}, slope[1][kColumnTiles][4] = {};
    multiply<S, kWidth>(score, lane_rows<kWidth>(queries + warp * 16 * kPitch, lane), lane_columns<kWidth>(keys, lane), d);
    cp_async_wait_all();
    __syncthreads();  // gradients and values are there; the memory of the others is free
    const BiasStep tile = bias_step(f, block, step, kBiasQueries, kKeys);
    step = next(step + 1);
    if (step < block.steps) load_scored(step);
    multiply<S, kWidth>(slope, lane_rows<kWidth>(grads + warp * 16 * kPitch, lane), lane_columns<kWidth>(values, lane), d);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowTerms terms = row_terms(f, tile.at, my_row + 8 * half, tile.key);
      const QueryNumbers query = query_numbers(p, tile.at.batch, tile.at.head, tile.at.first + my_row + 8 * half);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        float x = score[0][j][2 * half], y = score[0][j][2 * half + 1];
        finish_scores<S>(f, wide, terms, 8 * j + columns, x, y);
        x = weight_of(x, query.row_max, query.log_sum, f.unit.exponent);
        y = weight_of(y, query.row_max, query.log_sum, f.unit.exponent);
        sum[j][2 * half] = fmaf(x, slope[0][j][2 * half] - query.delta, sum[j][2 * half]);
        sum[j][2 * half + 1] = fmaf(y, slope[0][j][2 * half + 1] - query.delta, sum[j][2 * half + 1]);
      }
    }
  }

  __syncthreads();  // the last tile is used
  float* const slopes = reinterpret_cast<float*>(queries);
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) slopes[(my_row + e / 2 * 8) * (kKeys + 1) + 8 * j + columns + e % 2] = sum[j][e];
  }
  __syncthreads();
  store_bias_tile<kBiasQueries, kKeys, kBiasThreads>(p, block, slopes);
#endif
}

template <class S, int kWidth, Pass kPass, bool kFew>
void launch_backward_as(const AttentionBackwardParams& p, void* stream) {
  constexpr BackwardTile kTile = backward_tile(kPass, kWidth, kFew);
  constexpr int kBytes = backward_shared_bytes(kPass, kWidth, kFew);
  if (kBytes > 48 * 1024) GF_ALLOW_SHARED((backward_kernel<S, kWidth, kPass, kFew>), kBytes);
  GF_LAUNCH((backward_kernel<S, kWidth, kPass, kFew>), gradient_grid<kPass>(p.forward, kTile.rows()), kTile.threads(), kBytes, stream, p,
            access_of(p));
}

template <class S, int kWidth, Pass kPass>
void launch_backward_pass(const AttentionBackwardParams& p, void* stream) {
  const bool few =
      static_cast<int>(gradient_grid<kPass>(p.forward, backward_tile(kPass, kWidth, false).rows())) <= gf_device::multiprocessors();
  few ? launch_backward_as<S, kWidth, kPass, true>(p, stream) : launch_backward_as<S, kWidth, kPass, false>(p, stream);
}

template <class S, int kIndex = 0>
void launch_backward(const AttentionBackwardParams& p, void* stream) {
  constexpr int kWidth = kHeadWidths[kIndex];
  if constexpr (kIndex + 1 < sizeof kHeadWidths / sizeof kHeadWidths[0]) {
    if (p.forward.d > kWidth) return launch_backward<S, kIndex + 1>(p, stream);
  }
  launch_backward_pass<S, kWidth, Pass::kQueries>(p, stream);
  if constexpr (kWidth > 160) {  // two gradients of this width do not fit into the registers of a warp
    launch_backward_pass<S, kWidth, Pass::kKeys>(p, stream);
    launch_backward_pass<S, kWidth, Pass::kValues>(p, stream);
  } else {
    launch_backward_pass<S, kWidth, Pass::kKeysAndValues>(p, stream);
  }
  if (!p.dbias) return;
  constexpr int kBytes = bias_shared_bytes(kWidth);
  if (kBytes > 48 * 1024) GF_ALLOW_SHARED((bias_kernel<S, kWidth>), kBytes);
  GF_LAUNCH((bias_kernel<S, kWidth>), bias_grid(p, kBiasQueries, bias_keys(kWidth)), kBiasThreads, kBytes, stream, p, access_of(p));
}

}  // namespace
}  // namespace genfast
