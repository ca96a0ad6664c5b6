// bias_act on CUDA (docs/gan-ops.md): one launch, and with sums a second one that adds the partial sums up, in a fixed order.
#include "../../core/math.cuh"
#include "../../core/reduce.cuh"
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

template <class T>
__device__ __forceinline__ Curve<T> narrowed(const Curve<double>& c) {
  return {c.act, c.order, c.clamped, static_cast<T>(c.alpha), static_cast<T>(c.gain), static_cast<T>(c.clamp)};
}

// N elements from `offset`; what is stored, before rounding, is added to sum.
template <class S, int N, bool kVector>
__device__ __forceinline__ void apply(const BiasActParams& p, const Curve<Wide<S>>& curve, int64_t offset, const Span<N, kVector>& span,
                                      const Wide<S> (&b)[N], Wide<S> (&sum)[N]) {
  using T = Wide<S>;
  const auto x = load(static_cast<const S*>(p.x) + offset, span);
  Vec<S, N> factor{};
  if (p.factor) factor = load(static_cast<const S*>(p.factor) + offset, span);
  T v[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = curve_at<DeviceMath>(curve, widen(x, i) + b[i]);
    if (p.factor) v[i] = times_slope(widen(factor, i), v[i]);
    if (i < span.count) sum[i] += v[i];
  }
  store(static_cast<S*>(p.out) + offset, span, narrow<S>(v));
}

template <class S, bool kVector>
__global__ void __launch_bounds__(256) long_rows_kernel(const __grid_constant__ BiasActParams p) {
  using T = Wide<S>;
  constexpr int N = sizeof(S) == 2 ? 8 : 4;
  GF_SHARED(Lanes<1>, lanes);
  const Curve<T> curve = narrowed<T>(p.curve);
  const int64_t begin = blockIdx.x * kCudaChunk, end = begin + kCudaChunk < p.inner ? begin + kCudaChunk : p.inner;
  for (int64_t row = blockIdx.y; row < p.outer * p.channels; row += gridDim.y) {
    T b[N], sum[N]{};
#pragma unroll
    for (int i = 0; i < N; ++i) b[i] = p.b ? widen(static_cast<const S*>(p.b)[row % p.channels]) : T(0);
    for (int64_t i = begin + threadIdx.x * N; i < end; i += kFoldLanes * N)
      apply<S>(p, curve, row * p.inner, span_at<N, kVector>(i, end), b, sum);
    if (!p.partial) continue;
    double total[1] = {0.0};
#pragma unroll
    for (int i = 0; i < N; ++i) total[0] += sum[i];
    fold(total, lanes);
    if (threadIdx.x == 0) p.partial[row * gridDim.x + blockIdx.x] = total[0];
    __syncthreads();
  }
}

template <class S, bool kVector>
__global__ void __launch_bounds__(256) columns_kernel(const __grid_constant__ BiasActParams p) {
  using T = Wide<S>;
  constexpr int N = sizeof(S) == 2 ? 8 : 4;
  const Curve<T> curve = narrowed<T>(p.curve);
  const int64_t period = p.channels * p.inner, column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= period) return;
  const auto span = span_at<N, kVector>(column, period);
  T b[N]{}, sum[N]{};
  if (p.b) {
    int64_t channel = column / p.inner, left = p.inner - column % p.inner;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < span.count) b[i] = widen(static_cast<const S*>(p.b)[channel]);
      if (--left == 0) {
        left = p.inner;
        ++channel;
      }
    }
  }
  for (int64_t row = first_sample(); row < p.outer; row = next_sample(row)) apply<S>(p, curve, row * period, span, b, sum);
  if (!p.partial) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < span.count) p.partial[first_sample() * period + column + i] = sum[i];
  }
}

// One block a channel.
template <class S>
__global__ void __launch_bounds__(256) sums_kernel(const __grid_constant__ BiasActParams p, int64_t groups, int64_t width) {
  GF_SHARED(Lanes<1>, lanes);
  for (int64_t c = blockIdx.x; c < p.channels; c += gridDim.x) {
    double total[1] = {0.0};
    for (int64_t i = threadIdx.x; i < groups * width; i += kFoldLanes)
      total[0] += p.partial[(i / width * p.channels + c) * width + i % width];
    fold(total, lanes);
    if (threadIdx.x == 0) {
      if constexpr (sizeof(S) == 2) {
        const float value[2] = {static_cast<float>(total[0]), 0.0f};
        static_cast<S*>(p.sums)[c] = element(narrow<S>(value), 0);
      } else {
        static_cast<S*>(p.sums)[c] = static_cast<S>(total[0]);
      }
    }
    __syncthreads();
  }
}

}  // namespace

void launch_bias_act_cuda(const BiasActParams& p, void* stream) {
  const BiasActPlan plan = plan_of(p);
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  const dim3 block(static_cast<unsigned>(plan.threads_x), static_cast<unsigned>(plan.threads_y));
  visit_dtype(p.dtype, [&]<class S>(S) {
    constexpr int N = sizeof(S) == 2 ? 8 : 4;
    const bool aligned = vector_aligned(p.x, p.dtype, N) && vector_aligned(p.out, p.dtype, N) && vector_aligned(p.factor, p.dtype, N);
    const bool vector = aligned && (plan.long_rows ? p.inner : p.channels * p.inner) % N == 0;
    if (plan.long_rows) {
      if (vector) {
        GF_LAUNCH((long_rows_kernel<S, true>), grid, block, 0, stream, p);
      } else {
        GF_LAUNCH((long_rows_kernel<S, false>), grid, block, 0, stream, p);
      }
    } else if (vector) {
      GF_LAUNCH((columns_kernel<S, true>), grid, block, 0, stream, p);
    } else {
      GF_LAUNCH((columns_kernel<S, false>), grid, block, 0, stream, p);
    }
    if (p.sums) {
      const int64_t blocks = p.channels < 65536 ? p.channels : 65536;
      GF_LAUNCH((sums_kernel<S>), dim3(static_cast<unsigned>(blocks)), dim3(kFoldLanes), 0, stream, p, plan.groups, plan.width);
    }
  });
}

}  // namespace genfast
