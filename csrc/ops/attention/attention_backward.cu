// Attention's backward pass on CUDA: delta, which kernels run, and those for what the tensor cores do not take: float32, and every dtype
// before sm_80. They multiply and add in float32 (FMA, no TF32): a thread makes the scores and slopes of one row that its block owns.
#include "attention_backward_tile.cuh"
#include "attention_hopper.h"

namespace genfast {

void launch_attention_backward_bf16(const AttentionBackwardParams& p, void* stream);
void launch_attention_backward_f16(const AttentionBackwardParams& p, void* stream);

namespace {

constexpr int kThreads = 256;

// delta = sum(grad_o o) - grad_lse: 8 threads to a row.
constexpr int kDeltaLanes = 8, kDeltaRows = kThreads / kDeltaLanes;

template <class S>
__global__ void __launch_bounds__(kThreads) delta_kernel(const __grid_constant__ AttentionBackwardParams p, const bool wide) {
  constexpr int kVector = 16 / sizeof(S);
  const AttentionParams& f = p.forward;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const int64_t rows = f.batch * f.heads * f.n;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kDeltaRows + static_cast<int>(threadIdx.x) / kDeltaLanes;
  const int64_t row = unit < rows ? unit : rows - 1, query = row % f.n, head = row / f.n % f.heads, batch = row / f.n / f.heads;
  const S* o = row_at(static_cast<const S*>(f.o), f.o_at, batch, head, query);
  const S* grad = row_at(static_cast<const S*>(p.grad_o), p.grad_o_at, batch, head, query);
  float sum = 0.0f;
  for (int64_t c = lane * kVector; c < f.d; c += kDeltaLanes * kVector) {
    if (wide) {
      const auto a = *reinterpret_cast<const Vec<S, kVector>*>(o + c), b = *reinterpret_cast<const Vec<S, kVector>*>(grad + c);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum = fmaf(widen(a, i), widen(b, i), sum);
    } else {  // in the same order
      for (int64_t i = c; i < c + kVector && i < f.d; ++i) sum = fmaf(widen(o[i]), widen(grad[i]), sum);
    }
  }
#pragma unroll
  for (int bits = 1; bits < kDeltaLanes; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  if (lane == 0 && unit < rows) p.delta[row] = p.grad_lse ? sum - p.grad_lse[row] : sum;
}

// A block works on kRows rows against kRows rows; kLanes threads share a row and have every kLanes-th column of it.
constexpr int fma_rows(int width) {
  return width > 64 ? 16 : 32;  // rows of both sides and of four tensors lie in shared memory
}
// An odd number of words, so that neighbouring rows begin in different banks.
__host__ __device__ __forceinline__ int fma_pitch(int64_t d) {
  return static_cast<int>(d) | 1;
}

// Rows of d elements, widened; those beyond `rows` become zeros.
template <int kRows>
__device__ __forceinline__ void load_fma_rows(float* to, DType dtype, const void* data, const AttentionRows& strides, int batch, int head,
                                              int64_t first, int64_t rows, int d) {
  visit_dtype(dtype, [&]<class S>(S) {
    if constexpr (!std::is_same_v<S, double>) {
      const S* from = row_at(static_cast<const S*>(data), strides, batch, head, first);
      for (int i = static_cast<int>(threadIdx.x); i < kRows * d; i += kThreads) {
        const int r = i / d, c = i % d;
        to[r * fma_pitch(d) + c] = r < rows ? widen(from[r * strides.row + c]) : 0.0f;
      }
    }
  });
}

// What finish_scores does, for one query and one key.
__device__ __forceinline__ float finish_score(const AttentionParams& p, int batch, int head, int64_t query, int64_t key, float x) {
  if (query >= p.n || key >= p.m || (p.causal && key > query + p.m - p.n)) return kMinusInfinity;
  if (p.mask && !row_at(p.mask, p.mask_at, batch, head, query)[key]) return kMinusInfinity;
  const float factor = p.unit.factor;
  if (!p.bias) return x * factor;
  const auto bias = [&]<class S>(S) { return widen(row_at(static_cast<const S*>(p.bias), p.bias_at, batch, head, query)[key]); };
  return fmaf(x, factor, p.bias_dtype == DType::F32 ? bias(0.0f) : p.bias_dtype == DType::F16 ? bias(Float16{}) : bias(BFloat16{}));
}

__device__ __forceinline__ float dot(const float* a, const float* b, int d) {
  float sum = 0.0f;
#pragma unroll 4
  for (int c = 0; c < d; ++c) sum = fmaf(a[c], b[c], sum);
  return sum;
}

template <int kWidth, Pass kPass>
__global__ void __launch_bounds__(kThreads, 2) backward_fma_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr int kRows = fma_rows(kWidth), kLanes = kThreads / kRows, kEach = kRows / kLanes, kPitch = kRows + 1;
  constexpr bool kOwnsKeys = owns_keys(kPass), kValues = makes_values(kPass);
  const AttentionParams& f = p.forward;
  const int d = static_cast<int>(f.d), pitch = fma_pitch(d);
  // 1: q and k, which make the scores; 2: grad_o and v, which make the gradients of the weights.
  GF_DYNAMIC_SHARED(float, own1);
  float* const own2 = own1 + kRows * pitch;
  float* const walked1 = own2 + kRows * pitch;
  float* const walked2 = walked1 + kRows * pitch;
  float* const weights = walked2 + kRows * pitch;
  float* const slopes = weights + kRows * kPitch;
  const int row = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const GradientBlock at = gradient_block<kPass>(f, kRows, kRows, static_cast<int>(blockIdx.x));
  const float exponent = f.unit.exponent;
  const auto load = [&](float* to, const void* data, const AttentionRows& strides, int head, int64_t first, int64_t rows) {
    load_fma_rows<kRows>(to, f.dtype, data, strides, at.batch, head, first, rows, d);
  };
  load(own1, kOwnsKeys ? f.k : f.q, kOwnsKeys ? f.k_at : f.q_at, at.head, at.first, at.rows);
  load(own2, kOwnsKeys ? f.v : p.grad_o, kOwnsKeys ? f.v_at : p.grad_o_at, at.head, at.first, at.rows);

  float gradient[kWidth / kLanes] = {}, of_values[kWidth / kLanes] = {};
#pragma unroll 1
  for (int step = 0; step < at.tiles * at.walked_heads; ++step) {
    const int head = at.walked_head + step / at.tiles;
    const int64_t begin = at.begin + static_cast<int64_t>(step % at.tiles) * kRows, left = (kOwnsKeys ? f.n : f.m) - begin;
    __syncthreads();  // the last tile is used
    load(walked1, kOwnsKeys ? f.q : f.k, kOwnsKeys ? f.q_at : f.k_at, head, begin, left);
    load(walked2, kOwnsKeys ? p.grad_o : f.v, kOwnsKeys ? p.grad_o_at : f.v_at, head, begin, left);
    __syncthreads();  // the tile is there
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = i * kLanes + lane;
      const int64_t query = kOwnsKeys ? begin + column : at.first + row, key = kOwnsKeys ? at.first + row : begin + column;
      const int query_head = kOwnsKeys ? head : at.head;
      const QueryNumbers numbers = query_numbers(p, at.batch, query_head, query);
      const float score = finish_score(f, at.batch, query_head, query, key, dot(own1 + row * pitch, walked1 + column * pitch, d));
      const float weight = exp2f(fmaf(score - numbers.row_max, exponent, -numbers.log_sum));
      weights[row * kPitch + column] = weight;
      slopes[row * kPitch + column] = weight * (dot(own2 + row * pitch, walked2 + column * pitch, d) - numbers.delta);
    }
    __syncwarp();  // the threads of a row are in one warp
    for (int j = 0; j < kRows; ++j) {
      const float weight = weights[row * kPitch + j], slope = slopes[row * kPitch + j];
#pragma unroll
      for (int i = 0; i < kWidth / kLanes; ++i) {
        const int c = i * kLanes + lane;
        if (c >= d) continue;
        gradient[i] = fmaf(slope, walked1[j * pitch + c], gradient[i]);
        if constexpr (kValues) of_values[i] = fmaf(weight, walked2[j * pitch + c], of_values[i]);
      }
    }
  }

  if (row >= at.rows) return;
  visit_dtype(f.dtype, [&]<class S>(S) {
    const auto store = [&](void* data, const AttentionRows& strides, const float (&from)[kWidth / kLanes], float scale) {
      S* to = row_at(static_cast<S*>(data), strides, at.batch, at.head, at.first + row);
#pragma unroll
      for (int i = 0; i < kWidth / kLanes; ++i) {
        const float value[2] = {from[i] * scale, 0.0f};
        if (i * kLanes + lane < d) to[i * kLanes + lane] = element(narrow<S>(value), 0);
      }
    };
    store(kOwnsKeys ? p.dk : p.dq, kOwnsKeys ? p.dk_at : p.dq_at, gradient, f.scale);
    if constexpr (kValues) store(p.dv, p.dv_at, of_values, 1.0f);
  });
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2) bias_fma_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr int kRows = fma_rows(kWidth), kLanes = kThreads / kRows, kEach = kRows / kLanes;
  const AttentionParams& f = p.forward;
  const int d = static_cast<int>(f.d), pitch = fma_pitch(d);
  GF_DYNAMIC_SHARED(float, queries);
  float* const grads = queries + kRows * pitch;
  float* const keys = grads + kRows * pitch;
  float* const values = keys + kRows * pitch;
  float* const slopes = values + kRows * pitch;
  const int row = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const BiasBlock block = bias_block(p, kRows, kRows);
  const auto next = [&](int step) { return next_bias_step(f, block, step, kRows, kRows); };

  float sum[kEach] = {};
#pragma unroll 1
  for (int step = next(0); step < block.steps; step = next(step + 1)) {
    const BiasStep tile = bias_step(f, block, step, kRows, kRows);
    const QueryBlock& at = tile.at;
    __syncthreads();  // the last tile is used
    load_fma_rows<kRows>(queries, f.dtype, f.q, f.q_at, at.batch, at.head, at.first, at.rows, d);
    load_fma_rows<kRows>(grads, f.dtype, p.grad_o, p.grad_o_at, at.batch, at.head, at.first, at.rows, d);
    load_fma_rows<kRows>(keys, f.dtype, f.k, f.k_at, at.batch, at.kv_head, tile.key, f.m - tile.key, d);
    load_fma_rows<kRows>(values, f.dtype, f.v, f.v_at, at.batch, at.kv_head, tile.key, f.m - tile.key, d);
    __syncthreads();  // the tile is there
    const QueryNumbers numbers = query_numbers(p, at.batch, at.head, at.first + row);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = i * kLanes + lane;
      const float product = dot(queries + row * pitch, keys + column * pitch, d);
      const float score = finish_score(f, at.batch, at.head, at.first + row, tile.key + column, product);
      const float weight = exp2f(fmaf(score - numbers.row_max, f.unit.exponent, -numbers.log_sum));
      sum[i] = fmaf(weight, dot(grads + row * pitch, values + column * pitch, d) - numbers.delta, sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) slopes[row * (kRows + 1) + i * kLanes + lane] = sum[i];
  __syncthreads();
  store_bias_tile<kRows, kRows, kThreads>(p, block, slopes);
}

template <int kWidth>
void launch_fma(const AttentionBackwardParams& p, void* stream) {
  constexpr int kRows = fma_rows(kWidth);
  const AttentionParams& f = p.forward;
  const int bytes = (4 * kRows * fma_pitch(f.d) + 2 * kRows * (kRows + 1)) * 4;
  if (bytes > 48 * 1024) {
    GF_ALLOW_SHARED((backward_fma_kernel<kWidth, Pass::kQueries>), bytes);
    GF_ALLOW_SHARED((backward_fma_kernel<kWidth, Pass::kKeysAndValues>), bytes);
    GF_ALLOW_SHARED((bias_fma_kernel<kWidth>), bytes);
  }
  GF_LAUNCH((backward_fma_kernel<kWidth, Pass::kQueries>), gradient_grid<Pass::kQueries>(f, kRows), kThreads, bytes, stream, p);
  GF_LAUNCH((backward_fma_kernel<kWidth, Pass::kKeysAndValues>), gradient_grid<Pass::kKeysAndValues>(f, kRows), kThreads, bytes, stream, p);
  if (p.dbias) GF_LAUNCH((bias_fma_kernel<kWidth>), bias_grid(p, kRows, kRows), kThreads, bytes, stream, p);
}

}  // namespace

void launch_attention_backward_cuda(const AttentionBackwardParams& p, void* stream) {
  const AttentionParams& f = p.forward;
  check(f.d <= 256, "q: got a head dimension of ", f.d, ", supported: up to 256");
  const int64_t blocks = (f.batch * f.heads * f.n + kDeltaRows - 1) / kDeltaRows;
  check(blocks < (int64_t{1} << 31), "q: got ", blocks, " blocks of ", kDeltaRows, " rows, supported: fewer than 2^31");
  visit_dtype(f.dtype, [&]<class S>(S) {
    if constexpr (!std::is_same_v<S, double>) {
      GF_LAUNCH((delta_kernel<S>), static_cast<unsigned>(blocks), kThreads, 0, stream, p, access_of(p).rows);
    }
  });
#if defined(GENFAST_HOPPER) || defined(GF_EMULATE)  // the build's architectures hold 90a
  if (launch_attention_backward_hopper(p, stream)) return;
#endif
  if (f.dtype != DType::F32 && gf_device::compute_capability() >= 80) {
    return f.dtype == DType::BF16 ? launch_attention_backward_bf16(p, stream) : launch_attention_backward_f16(p, stream);
  }
  f.d <= 64 ? launch_fma<64>(p, stream) : f.d <= 128 ? launch_fma<128>(p, stream) : launch_fma<256>(p, stream);
}

}  // namespace genfast
