// The forward pass on tensor cores, sm_80 and newer: mma.sync fed by cp.async, softmax online in registers (Dao 2023, algorithm 1).
// One block of 4 warps does kQueries queries of one head against all their keys, kKeys at a time; keys and values of the next step arrive
// while this one is worked on. docs/attention.md has the tile table and the traffic.
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// What fits: sums of 16 kRowTiles x D and scores of 16 kRowTiles x kKeys in the registers of a warp, and two steps of keys and values in
// 99 KiB of shared memory, the least that sm_80 and newer have.
struct Tile {
  int row_tiles;  // of 16 queries for each warp
  int keys;
};
constexpr Tile tile_of(int d) {
  return d <= 64 ? Tile{2, 64} : d <= 128 ? Tile{2, 32} : Tile{1, 32};
}

template <class S, int D>
struct Shape {
  static constexpr int kRowTiles = tile_of(D).row_tiles, kKeys = tile_of(D).keys, kQueries = 4 * 16 * kRowTiles;
  static constexpr int kRow = D + 8;  // elements of a row in shared memory: the 8 rows that ldmatrix reads lie in different banks
  static constexpr int kStep = 2 * kKeys * kRow;
  static constexpr int kBytes = (kQueries * kRow + 2 * kStep) * static_cast<int>(sizeof(S));
  static_assert(kBytes <= 99 * 1024);
};

// Rows first ... first + kRows - 1 of a matrix of `rows` rows of d elements into shared memory; zeros beyond either.
template <class S, int D, int kRows>
__device__ __forceinline__ void load_rows(S* to, const S* from, int64_t stride, int64_t first, int64_t rows, int d) {
  constexpr int kChunks = D / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    S* at = to + row * (D + 8) + column;
    if (first + row < rows && column < d) {
      cp_async16(at, from + (first + row) * stride + column);
    } else {
      *reinterpret_cast<uint4*>(at) = uint4{0, 0, 0, 0};
    }
  }
}

__device__ __forceinline__ float quad_max(float a) {
  a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
  return fmaxf(a, __shfl_xor_sync(~0u, a, 2));
}
__device__ __forceinline__ float quad_sum(float a) {
  a += __shfl_xor_sync(~0u, a, 1);
  return a + __shfl_xor_sync(~0u, a, 2);
}

template <class S>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return std::is_same_v<S, BFloat16> ? pack_bf16x2(low, high) : pack_f16x2(low, high);
}

// Where a thread's scores lie: s[i][j][2 h + e] is that of row `row` + 16 i + 8 h and key `key` + 8 j + e.
struct Place {
  int64_t batch, head, row, key;
};

// Scores times the scale, plus bias, in powers of two; -inf where a mask hides the key.
template <class S, int kRowTiles, int kColumns>
__device__ __forceinline__ void scale_scores(float (&s)[kRowTiles][kColumns][4], const AttentionParams& p, const Place& at) {
  const float in_bits = p.scale * kLog2e;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][j][e] *= in_bits;
    }
  }
  if (!p.bias && !p.mask) return;
  const int left = p.m - at.key < 8 * kColumns ? static_cast<int>(p.m - at.key) : 8 * kColumns;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = at.row + 16 * i + 8 * h < p.n ? at.row + 16 * i + 8 * h : p.n - 1;
      const int64_t first = at.batch * p.bias_at.batch + at.head * p.bias_at.head + row * p.bias_at.row + at.key;
      const uint8_t* mask = p.mask + (at.batch * p.mask_at.batch + at.head * p.mask_at.head + row * p.mask_at.row + at.key);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + e >= left) continue;
          float& x = s[i][j][2 * h + e];
          if (p.bias) {
            const float add = p.bias_dtype == DType::F32 ? static_cast<const float*>(p.bias)[first + 8 * j + e]
                                                         : widen(static_cast<const S*>(p.bias)[first + 8 * j + e]);
            x = fmaf(add, kLog2e, x);
          }
          if (p.mask && !mask[8 * j + e]) x = kMinusInfinity;
        }
      }
    }
  }
}

// -inf beyond the last key and, under causality, beyond the last that the query sees.
template <int kRowTiles, int kColumns>
__device__ __forceinline__ void hide_scores(float (&s)[kRowTiles][kColumns][4], const AttentionParams& p, const Place& at) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int64_t left = p.m - at.key;
      const int64_t causal = at.row + 16 * i + 8 * h + (p.m - p.n) + 1 - at.key;
      if (p.causal && causal < left) left = causal;
      const int few = static_cast<int>(left < 0 ? 0 : left < 8 * kColumns ? left : 8 * kColumns);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + e >= few) s[i][j][2 * h + e] = kMinusInfinity;
        }
      }
    }
  }
}

template <class S, int D>
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ AttentionParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Sizes = Shape<S, D>;
  constexpr int kRowTiles = Sizes::kRowTiles, kKeys = Sizes::kKeys, kRow = Sizes::kRow;
  GF_DYNAMIC_SHARED(S, queries);
  S* const steps = queries + Sizes::kQueries * kRow;

  const int64_t blocks = (p.n + Sizes::kQueries - 1) / Sizes::kQueries;
  const int64_t unit = blockIdx.x, head = unit / blocks % p.heads, batch = unit / blocks / p.heads;
  const int64_t first = (blocks - 1 - unit % blocks) * Sizes::kQueries;  // under causality the longest first
  const int64_t key_head = head / (p.heads / p.kv_heads), offset = p.m - p.n;
  const int d = static_cast<int>(p.d), lane = static_cast<int>(threadIdx.x) % 32;
  const int row0 = static_cast<int>(threadIdx.x) / 32 * 16 * kRowTiles;
  const S* k = static_cast<const S*>(p.k) + batch * p.k_at.batch + key_head * p.k_at.head;
  const S* v = static_cast<const S*>(p.v) + batch * p.v_at.batch + key_head * p.v_at.head;
  const auto load_step = [&](int64_t key, S* to) {
    load_rows<S, D, kKeys>(to, k, p.k_at.row, key, p.m, d);
    load_rows<S, D, kKeys>(to + kKeys * kRow, v, p.v_at.row, key, p.m, d);
  };
  const int64_t last = first + Sizes::kQueries < p.n ? first + Sizes::kQueries : p.n;
  const int64_t seen = p.causal && last + offset < p.m ? last + offset : p.m;  // by any query of the block; can be below 1

  load_rows<S, D, Sizes::kQueries>(queries, static_cast<const S*>(p.q) + batch * p.q_at.batch + head * p.q_at.head, p.q_at.row, first, p.n,
                                   d);
  load_step(0, steps);

  // Row 16 i + 8 h + g of the warp, where g = lane / 4, belongs to this thread and its three neighbours.
  float out[kRowTiles][D / 8][4] = {}, most[kRowTiles][2], sum[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[i][h] = kMinusInfinity;
      sum[i][h] = 0;
    }
  }
  int now = 0;
  for (int64_t key = 0; key < seen; key += kKeys, now ^= 1) {
    cp_async_wait_all();
    __syncthreads();
    const S* keys = steps + now * Sizes::kStep;
    const S* values = keys + kKeys * kRow;
    if (key + kKeys < seen) load_step(key + kKeys, steps + (now ^ 1) * Sizes::kStep);

    float s[kRowTiles][kKeys / 8][4] = {};
#pragma unroll 2
    for (int c = 0; c < D / 16; ++c) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        load_matrices<false>(a[i], queries + (row0 + 16 * i + lane % 16) * kRow + 16 * c + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        load_matrices<false>(b, keys + (16 * j + lane / 16 * 8 + lane % 8) * kRow + 16 * c + lane / 8 % 2 * 8);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16<S>(s[i][2 * j], a[i], {b[0], b[1]});
          mma_m16n8k16<S>(s[i][2 * j + 1], a[i], {b[2], b[3]});
        }
      }
    }

    const Place place{batch, head, first + row0 + lane / 4, key + lane % 4 * 2};
    scale_scores<S>(s, p, place);
    if (key + kKeys > p.m || (p.causal && key + kKeys > first + row0 + offset + 1)) hide_scores(s, p, place);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float here = most[i][h];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) here = fmaxf(here, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        here = quad_max(here);
        const float shift = here == kMinusInfinity ? 0.0f : here, shrink = exp2_fast(most[i][h] - shift);
        most[i][h] = here;
        float partial = 0;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[i][j][e] = exp2_fast(s[i][j][e] - shift);
            partial += s[i][j][e];
          }
        }
        sum[i][h] = fmaf(sum[i][h], shrink, partial);
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          out[i][j][2 * h] *= shrink;
          out[i][j][2 * h + 1] *= shrink;
        }
      }
    }

#pragma unroll
    for (int c = 0; c < kKeys / 16; ++c) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
          const float (&x)[4] = s[i][2 * c + quarter / 2];
          a[i][quarter] = pack<S>(x[quarter % 2 * 2], x[quarter % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        uint32_t b[4];
        load_matrices<true>(b, values + (16 * c + lane % 16) * kRow + 16 * j + lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma_m16n8k16<S>(out[i][2 * j], a[i], {b[0], b[1]});
          if (j < D / 16 - 1 || d > D - 8) mma_m16n8k16<S>(out[i][2 * j + 1], a[i], {b[2], b[3]});
        }
      }
    }
  }

  cp_async_wait_all();  // nothing may arrive in shared memory that no longer belongs to this block
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first + row0 + 16 * i + 8 * h + lane / 4;
      const float all = quad_sum(sum[i][h]), inverse = all == 0 ? 0.0f : 1.0f / all;
      if (row >= p.n) continue;
      S* o = static_cast<S*>(p.o) + batch * p.o_at.batch + head * p.o_at.head + row * p.o_at.row;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        if (8 * j >= d) break;
        const int column = 8 * j + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(o + column) = pack<S>(out[i][j][2 * h] * inverse, out[i][j][2 * h + 1] * inverse);
      }
      if (lane % 4 == 0) {
        p.lse[(batch * p.heads + head) * p.n + row] = all == 0 ? kMinusInfinity : fmaf(most[i][h], kLn2, logf(all));
      }
    }
  }
#else
  __trap();  // genfast/ops/attention.py sends older GPUs elsewhere
#endif
}

template <class S, int D>
void launch_dim(const AttentionParams& p, void* stream) {
  using Sizes = Shape<S, D>;
  const int64_t units = (p.n + Sizes::kQueries - 1) / Sizes::kQueries * p.heads * p.batch;
  check(units <= INT32_MAX, "q: got ", units, " blocks of queries, supported: 2**31 - 1");
  GF_ALLOW_SHARED((attention_kernel<S, D>), Sizes::kBytes);
  GF_LAUNCH((attention_kernel<S, D>), dim3(static_cast<unsigned>(units)), dim3(kThreads), Sizes::kBytes, stream, p);
}

// Head dimensions with a kernel; others run in the next one, whose last columns are zeros in shared memory alone.
template <class S, int D, int... Rest>
void launch_next(const AttentionParams& p, void* stream) {
  if constexpr (sizeof...(Rest) > 0) {
    if (p.d > D) return launch_next<S, Rest...>(p, stream);
  }
  launch_dim<S, D>(p, stream);
}

bool aligned(const void* data, const AttentionRows& at) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && at.batch % 8 == 0 && at.head % 8 == 0 && at.row % 8 == 0;
}

}  // namespace

void launch_attention_cuda(const AttentionParams& p, void* stream) {
  check(p.dtype == DType::BF16 || p.dtype == DType::F16, "q: got float32, supported on CUDA: bfloat16, float16");
  check(p.d % 8 == 0 && p.d <= 256, "q: got a head dimension of ", p.d, ", supported on CUDA: multiples of 8 up to 256");
  check(aligned(p.q, p.q_at) && aligned(p.k, p.k_at) && aligned(p.v, p.v_at) && aligned(p.o, p.o_at),
        "q, k, v: got rows that do not begin at multiples of 16 bytes, supported on CUDA: those that do");
  const auto run = [&]<class S>(S) { launch_next<S, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256>(p, stream); };
  p.dtype == DType::BF16 ? run(BFloat16{}) : run(Float16{});
}

}  // namespace genfast
