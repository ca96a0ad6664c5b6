// Attention on CUDA: which kernel runs, and the one for what the tensor cores do not take: float32, and every dtype before sm_80. It
// multiplies and adds in float32 (FMA, no TF32): 32 queries of a head against 32 keys at a time, 8 threads to a row.
#include "attention_hopper.h"
#include "attention_tile.cuh"

namespace genfast {

void launch_attention_bf16(const AttentionParams& p, void* stream);
void launch_attention_f16(const AttentionParams& p, void* stream);

namespace {

constexpr int kRows = 32, kKeys = 32, kLanes = 8, kThreads = kRows * kLanes;
constexpr int kWeightPitch = kKeys + 1;

// An odd number of words, so that neighbouring rows begin in different banks.
__host__ __device__ __forceinline__ int fma_pitch(int64_t d) {
  return static_cast<int>(d) | 1;
}

// kWidth: the widest head; a thread holds every eighth column of its row's output.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) forward_fma_kernel(const __grid_constant__ AttentionParams p) {
  GF_DYNAMIC_SHARED(float, queries);
  const int pitch = fma_pitch(p.d), d = static_cast<int>(p.d);
  float* const block = queries + kRows * pitch;  // keys, then values
  float* const weights = block + kKeys * pitch;
  const int row = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const QueryBlock at = p.q_starts ? query_block<true>(p, kRows) : query_block(p, kRows);
  if (at.rows <= 0) return;
  const int64_t end = visible_keys(p, at);
  const ScoreUnit& unit = p.unit;

  const auto load = [&](float* to, const void* data, const AttentionRows& strides, int64_t head, int64_t first, int64_t rows) {
    visit_dtype(p.dtype, [&]<class S>(S) {
      if constexpr (!std::is_same_v<S, double>) {
        const S* from = row_at(static_cast<const S*>(data), strides, at.batch, head, first);
        for (int i = static_cast<int>(threadIdx.x); i < kRows * d; i += kThreads) {
          const int r = i / d, c = i % d;
          to[r * pitch + c] = r < rows ? widen(from[r * strides.row + c]) : 0.0f;
        }
      }
    });
  };
  load(queries, p.q, p.q_at, at.head, at.before_q + at.first, at.rows);

  float out[kWidth / kLanes] = {}, row_max = kMinusInfinity, row_sum = 0.0f;
#pragma unroll 1
  for (int64_t key = 0; key < end; key += kKeys) {
    __syncthreads();  // the last tile's values are used
    load(block, p.k, p.k_at, at.kv_head, at.before_k + key, at.m - key);
    __syncthreads();
    float score[kKeys / kLanes] = {};
#pragma unroll 4
    for (int c = 0; c < d; ++c) {
      const float q = queries[row * pitch + c];
#pragma unroll
      for (int j = 0; j < kKeys / kLanes; ++j) score[j] = fmaf(q, block[(j * kLanes + lane) * pitch + c], score[j]);
    }
    const RowTerms terms = row_terms(p, at, row, key);
    float here = kMinusInfinity;
#pragma unroll
    for (int j = 0; j < kKeys / kLanes; ++j) {
      float beyond = 0.0f;
      RowTerms one = terms;  // this key alone, not its neighbour
      const int mine = j * kLanes + lane;
      one.visible = terms.visible < mine + 1 ? terms.visible : mine + 1;
      if (p.dtype == DType::F16) {
        finish_scores<Float16>(p, {}, one, mine, score[j], beyond);
      } else {
        finish_scores<BFloat16>(p, {}, one, mine, score[j], beyond);
      }
      here = fmaxf(here, score[j]);
    }
#pragma unroll
    for (int bits = 1; bits < kLanes; bits *= 2) here = fmaxf(here, __shfl_xor_sync(~0u, here, bits));
    const float now = fmaxf(row_max, here), shift = now == kMinusInfinity ? 0.0f : now,
                rescale = rescale_of(p.bias, unit.exponent, row_max, shift);
    const Power power = power_of(p.bias, unit.exponent, shift);
    row_max = now;
    row_sum *= rescale;
#pragma unroll
    for (int j = 0; j < kKeys / kLanes; ++j) {
      const float weight = exp2f(fmaf(p.bias ? (score[j] - shift) * unit.exponent : score[j], power.factor, -power.shift));
      row_sum += weight;
      weights[row * kWeightPitch + j * kLanes + lane] = weight;
    }
    __syncthreads();  // the keys are used; the weights are there
    load(block, p.v, p.v_at, at.kv_head, at.before_k + key, at.m - key);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWidth / kLanes; ++i) out[i] *= rescale;
    for (int j = 0; j < kKeys; ++j) {
      const float weight = weights[row * kWeightPitch + j];
#pragma unroll
      for (int i = 0; i < kWidth / kLanes; ++i) {
        const int c = i * kLanes + lane;
        if (c < d) out[i] = fmaf(weight, block[j * pitch + c], out[i]);
      }
    }
  }

#pragma unroll
  for (int bits = 1; bits < kLanes; bits *= 2) row_sum += __shfl_xor_sync(~0u, row_sum, bits);
  if (row >= at.rows) return;
  const int64_t n = at.first + row;
  if (lane == 0) store_row_stats(p, p.q_starts ? lse_at<true>(p, at, n) : lse_at(p, at, n), row_max, row_sum);
  const float inverse = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  visit_dtype(p.dtype, [&]<class S>(S) {
    S* o = row_at(static_cast<S*>(p.o), p.o_at, at.batch, at.head, at.before_q + n);
#pragma unroll
    for (int i = 0; i < kWidth / kLanes; ++i) {
      const float value[2] = {out[i] * inverse, 0.0f};
      if (i * kLanes + lane < d) o[i * kLanes + lane] = element(narrow<S>(value), 0);
    }
  });
}

template <int kWidth>
void launch_fma(const AttentionParams& p, void* stream) {
  const int bytes = ((kRows + kKeys) * fma_pitch(p.d) + kRows * kWeightPitch) * 4;
  if (bytes > 48 * 1024) GF_ALLOW_SHARED((forward_fma_kernel<kWidth>), bytes);
  GF_LAUNCH((forward_fma_kernel<kWidth>), query_grid(p, kRows), kThreads, bytes, stream, p);
}

}  // namespace

void launch_attention_cuda(const AttentionParams& p, void* stream) {
  check(p.d <= 256, "q: got a head dimension of ", p.d, ", supported: up to 256");
#if defined(GENFAST_HOPPER) || defined(GF_EMULATE)  // the build's architectures hold 90a
  if (launch_attention_hopper(p, stream)) return;
#endif
  if (p.dtype != DType::F32 && gf_device::compute_capability() >= 80) {
    return p.dtype == DType::BF16 ? launch_attention_bf16(p, stream) : launch_attention_f16(p, stream);
  }
  p.d <= 64 ? launch_fma<64>(p, stream) : p.d <= 128 ? launch_fma<128>(p, stream) : launch_fma<256>(p, stream);
}

}  // namespace genfast
