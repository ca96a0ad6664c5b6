// Decoding on CUDA: which kernel runs, the one for what the tensor cores do not take, and the one that joins the parts.
#include "attention_decode.cuh"

namespace genfast {
namespace {

constexpr int kFmaLanes = 8, kFmaGroups = 32 / kFmaLanes;
template <int kWidth>
constexpr int kFmaRows = 512 / kWidth;  // their outputs fit in registers

// Four elements from p, of `count` that exist; `wide`: they move at once.
template <class S>
__device__ __forceinline__ void load_four(float (&to)[4], const S* from, int count, bool wide) {
  if (wide && count >= 4) {
    const auto four = *reinterpret_cast<const Vec<S, 4>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = widen(four, i);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < count ? widen(from[i]) : 0.0f;
  }
}

// float32, 16 bits before sm_80, and rows that do not lie at multiples of 16 bytes. Fused multiply-adds in float32: eight lanes to a key,
// four keys of a warp at a time, each with its own maximum and sum. A lane holds columns 4 lane + 32 i of kWidth.
template <class S, int kWidth>
__global__ void __launch_bounds__(kThreads) decode_fma_kernel(const __grid_constant__ AttentionDecodeParams p, bool wide) {
  constexpr int kFours = kWidth / 32, kRows = kFmaRows<kWidth>;
  GF_DYNAMIC_SHARED(float, outputs);  // (kWarps, kRows, kWidth)
  GF_SHARED(WarpSums<kRows>, sums);
  GF_SHARED(float[kRows][kWidth], queries);
  const DecodeBlock at = decode_block(p, kRows);
  const int d = static_cast<int>(p.d), warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int column = lane % kFmaLanes * 4, slot = warp * kFmaGroups + lane / kFmaLanes;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kWidth; i += kThreads) {
    const int row = i / kWidth, c = i % kWidth;
    const S* q = static_cast<const S*>(p.q);
    queries[row][c] = row < at.rows && c < d ? widen(q[row_offset(p, at, p.q_at, row) + c]) : 0.0f;
  }
  __syncthreads();

  const S* const k = static_cast<const S*>(p.k) + at.batch * p.k_at.batch + at.kv_head * p.k_at.head + at.first * p.k_at.row + column;
  const S* const v = static_cast<const S*>(p.v) + at.batch * p.v_at.batch + at.kv_head * p.v_at.head + at.first * p.v_at.row + column;
  const ScoreUnit& unit = p.unit;
  float out[kRows][kFours][4] = {}, row_max[kRows], row_sum[kRows] = {};
  int visible[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    row_max[row] = kMinusInfinity;
    visible[row] = visible_keys(p, at, row);
  }

#pragma unroll 1
  for (int step = 0; step < at.keys; step += kWarps * kFmaGroups) {  // alike for all lanes: they exchange sums
    const int key = step + slot;
    const bool here = key < at.keys;
    float x[kFours][4] = {}, y[kFours][4] = {};
    if (here) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) load_four(x[i], k + key * p.k_at.row + 32 * i, d - column - 32 * i, wide);
#pragma unroll
      for (int i = 0; i < kFours; ++i) load_four(y[i], v + key * p.v_at.row + 32 * i, d - column - 32 * i, wide);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < kFours * 4; ++i) score = fmaf(queries[row][column + i / 4 * 32 + i % 4], x[i / 4][i % 4], score);
#pragma unroll
      for (int bits = 1; bits < kFmaLanes; bits *= 2) score += __shfl_xor_sync(~0u, score, bits);
      score *= unit.factor;
      if (p.bias && key < visible[row]) score += bias_at<S>(p, at, row, key);
      if (key >= visible[row]) score = kMinusInfinity;
      const float now = fmaxf(row_max[row], score), shift = now == kMinusInfinity ? 0.0f : now;
      const float rescale = exp2f((row_max[row] - shift) * unit.exponent), weight = exp2f((score - shift) * unit.exponent);
      row_max[row] = now;
      row_sum[row] = fmaf(row_sum[row], rescale, weight);
#pragma unroll
      for (int i = 0; i < kFours * 4; ++i) {
        out[row][i / 4][i % 4] = fmaf(weight, y[i / 4][i % 4], out[row][i / 4][i % 4] * rescale);
      }
    }
  }

#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float all = row_max[row];
#pragma unroll
    for (int bits = kFmaLanes; bits < 32; bits *= 2) all = fmaxf(all, __shfl_xor_sync(~0u, all, bits));
    const float rescale = exp2f((row_max[row] - (all == kMinusInfinity ? 0.0f : all)) * unit.exponent);
    row_sum[row] *= rescale;
#pragma unroll
    for (int bits = kFmaLanes; bits < 32; bits *= 2) row_sum[row] += __shfl_xor_sync(~0u, row_sum[row], bits);
#pragma unroll
    for (int i = 0; i < kFours * 4; ++i) {
      float value = out[row][i / 4][i % 4] * rescale;
#pragma unroll
      for (int bits = kFmaLanes; bits < 32; bits *= 2) value += __shfl_xor_sync(~0u, value, bits);
      if (lane < kFmaLanes) outputs[(warp * kRows + row) * kWidth + column + i / 4 * 32 + i % 4] = value;
    }
    if (lane == 0) {
      sums.row_max[warp][row] = all;
      sums.row_sum[warp][row] = row_sum[row];
    }
  }
  __syncthreads();
  join_warps<S, kRows>(p, at, sums, outputs, kWidth);
}

constexpr int kMergeThreads = 512;

// One block a row: the threads are dealt out to columns and, as far as they go, to parts.
template <class S>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ AttentionDecodeParams p) {
  GF_SHARED(float[kMergeThreads], partial);
  const int d = static_cast<int>(p.d), rows = static_cast<int>(p.rows()), n = static_cast<int>(p.n), splits = static_cast<int>(p.splits);
  const int thread = static_cast<int>(threadIdx.x), r = static_cast<int>(blockIdx.x) % rows;
  const int64_t key_head = static_cast<int>(blockIdx.x) / rows, from = key_head * splits * rows + r;

  // Every warp finds the maximum and the sum for itself.
  const ScoreUnit& unit = p.unit;
  const auto part = [&](int s) { return p.part_stats[from + static_cast<int64_t>(s) * rows]; };
  float row_max = kMinusInfinity, sum = 0.0f;
  for (int s = thread % 32; s < splits; s += 32) row_max = fmaxf(row_max, part(s).row_max);
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, bits));
  const float shift = row_max == kMinusInfinity ? 0.0f : row_max;
  const auto part_sum = [&](int s) { return exp2f((part(s).row_max - shift) * unit.exponent) * part(s).row_sum; };
  for (int s = thread % 32; s < splits; s += 32) sum += part_sum(s);
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);

  const int slices = kMergeThreads / d, slice = thread / d, c = thread % d;
  float value = 0.0f;
  if (slice < slices) {
#pragma unroll 4
    for (int s = slice; s < splits; s += slices) {
      const int64_t at = from + static_cast<int64_t>(s) * rows;
      value = fmaf(part_sum(s), p.parts[at * d + c], value);
    }
  }
  partial[thread] = value;
  __syncthreads();
  if (slice > 0) return;
  for (int s = 1; s < slices; ++s) value += partial[s * d + c];
  const float pair[2] = {sum == 0.0f ? 0.0f : value / sum, 0.0f};
  const int64_t batch = key_head / p.kv_heads, head = key_head % p.kv_heads * p.group() + r / n, query = r % n;
  S* const o = static_cast<S*>(p.o) + batch * p.o_at.batch + head * p.o_at.head + query * p.o_at.row;
  o[c] = element(narrow<S>(pair), 0);
  if (c == 0) p.lse[(batch * p.heads + head) * n + query] = sum == 0.0f ? kMinusInfinity : fmaf(shift, unit.logarithm, logf(sum));
}

bool rows_aligned(const void* data, const DecodeRows& at, int64_t bytes, int64_t size) {
  const int64_t elements = bytes / size;
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 && at.batch % elements == 0 && at.head % elements == 0 &&
         at.row % elements == 0;
}

template <class S>
void launch_fma(const AttentionDecodeParams& p, void* stream) {
  const bool wide = rows_aligned(p.k, p.k_at, 4 * sizeof(S), sizeof(S)) && rows_aligned(p.v, p.v_at, 4 * sizeof(S), sizeof(S));
  const auto launch = [&]<int kWidth>() {
    constexpr int kBytes = kWarps * kFmaRows<kWidth> * kWidth * 4;
    GF_LAUNCH((decode_fma_kernel<S, kWidth>), decode_grid(p, kFmaRows<kWidth>), kThreads, kBytes, stream, p, wide);
  };
  p.d <= 128 ? launch.template operator()<128>() : launch.template operator()<256>();
}

}  // namespace

void launch_attention_decode_cuda(const AttentionDecodeParams& p, void* stream) {
  check(p.d <= 256, "q: got a head dimension of ", p.d, ", supported: up to 256");
  const bool aligned = p.d % 8 == 0 && rows_aligned(p.k, p.k_at, 16, 2) && rows_aligned(p.v, p.v_at, 16, 2);
  if (p.dtype != DType::F32 && aligned && gf_device::compute_capability() >= 80) {
    launch_attention_decode_mma(p, stream);
  } else {
    p.dtype == DType::F32    ? launch_fma<float>(p, stream)
    : p.dtype == DType::BF16 ? launch_fma<BFloat16>(p, stream)
                             : launch_fma<Float16>(p, stream);
  }
  if (p.splits == 1) return;
  const int64_t rows = p.batch * p.heads * p.n;
  check(rows < (int64_t{1} << 31), "q: got ", rows, " rows, supported: fewer than 2^31");
  const auto merge = [&]<class S>(S) { GF_LAUNCH((merge_kernel<S>), static_cast<unsigned>(rows), kMergeThreads, 0, stream, p); };
  p.dtype == DType::F32 ? merge(float{}) : p.dtype == DType::BF16 ? merge(BFloat16{}) : merge(Float16{});
}

}  // namespace genfast
