// bn_act on CUDA (docs/gan-ops.md): one launch a pass, and after a pass that sums a second one that adds the partial sums up, in a fixed
// order.
#include "../../core/math.cuh"
#include "../../core/reduce.cuh"
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

// N elements from `offset`; coefficient k of element i is c[k][i], or c[k][0] for all. Adds to sum what the pass sums.
template <class S, int N, int M, bool kVector>
__device__ __forceinline__ void apply(const BnActParams& p, const Curve<Wide<S>>& curve, int64_t offset, const Span<N, kVector>& span,
                                      const Wide<S> (&c)[kBnCoefficients][M], Wide<S> (&sum)[2][N]) {
  using T = Wide<S>;
  const auto x = load(static_cast<const S*>(p.x) + offset, span);
  Vec<S, N> dy{};
  if (p.dy) dy = load(static_cast<const S*>(p.dy) + offset, span);
  T out[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int j = M == 1 ? 0 : i;
    const T v = widen(x, i) - c[kCenter][j];
    T a = v, b = v;
    if (p.pass != BnPass::Moments) {
      out[i] = curve_at<DeviceMath>(curve, c[kScale][j] * v + c[kShift][j]);
      if (p.dy) {
        a = times_slope(widen(dy, i), out[i]);
        b = v;
        out[i] = c[kP][j] * a + (c[kQ][j] * v + c[kR][j]);
      }
    }
    if (i < span.count) {
      sum[0][i] += a;
      sum[1][i] += a * b;
    }
  }
  if (p.out) store(static_cast<S*>(p.out) + offset, span, narrow<S>(out));
}

template <class T>
__device__ __forceinline__ Curve<T> curve_of(const BnActParams& p) {
  return {p.curve.act, p.pass == BnPass::Apply ? 0 : 1, false, static_cast<T>(p.curve.alpha), T(1), T(0)};
}

template <class S, bool kVector>
__global__ void __launch_bounds__(256) long_rows_kernel(const __grid_constant__ BnActParams p) {
  using T = Wide<S>;
  constexpr int N = sizeof(S) == 2 ? 8 : 4;
  GF_SHARED(Lanes<2>, lanes);
  const Curve<T> curve = curve_of<T>(p);
  const int64_t begin = blockIdx.x * kBnCudaChunk, end = begin + kBnCudaChunk < p.inner ? begin + kBnCudaChunk : p.inner;
  // The channel of the row, without a division of 64 bits, which is a subroutine.
  const unsigned channels = static_cast<unsigned>(p.channels), step = gridDim.y % channels;
  unsigned channel = blockIdx.y % channels;
  for (int64_t row = blockIdx.y; row < p.outer * p.channels; row += gridDim.y) {
    T c[kBnCoefficients][1], sum[2][N]{};
#pragma unroll
    for (int k = 0; k < kBnCoefficients; ++k) c[k][0] = static_cast<const T*>(p.coef)[k * p.channels + channel];
    channel = channel + step < channels ? channel + step : channel + step - channels;
    for (int64_t i = begin + threadIdx.x * N; i < end; i += kFoldLanes * N)
      apply<S>(p, curve, row * p.inner, span_at<N, kVector>(i, end), c, sum);
    if (!p.partial) continue;
    double total[2] = {0.0, 0.0};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total[0] += sum[0][i];
      total[1] += sum[1][i];
    }
    fold(total, lanes);
    if (threadIdx.x == 0) {
      for (int k = 0; k < 2; ++k) p.partial[(k * p.outer * p.channels + row) * gridDim.x + blockIdx.x] = total[k];
    }
    __syncthreads();
  }
}

template <class S, bool kVector>
__global__ void __launch_bounds__(256) columns_kernel(const __grid_constant__ BnActParams p) {
  using T = Wide<S>;
  constexpr int N = sizeof(S) == 2 ? 8 : 4;
  const Curve<T> curve = curve_of<T>(p);
  const int64_t period = p.channels * p.inner, column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= period) return;
  const auto span = span_at<N, kVector>(column, period);
  T c[kBnCoefficients][N]{}, sum[2][N]{};
  int64_t channel = column / p.inner, left = p.inner - column % p.inner;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < span.count) {
#pragma unroll
      for (int k = 0; k < kBnCoefficients; ++k) c[k][i] = static_cast<const T*>(p.coef)[k * p.channels + channel];
    }
    if (--left == 0) {
      left = p.inner;
      ++channel;
    }
  }
  for (int64_t row = first_sample(); row < p.outer; row = next_sample(row)) apply<S>(p, curve, row * period, span, c, sum);
  if (!p.partial) return;
  const int64_t groups = static_cast<int64_t>(gridDim.y) * blockDim.y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < span.count) {
      for (int k = 0; k < 2; ++k) p.partial[(k * groups + first_sample()) * period + column + i] = sum[k][i];
    }
  }
}

// One block a channel and sum.
__global__ void __launch_bounds__(256) sums_kernel(const __grid_constant__ BnActParams p, int64_t groups, int64_t width) {
  GF_SHARED(Lanes<1>, lanes);
  for (int64_t s = blockIdx.x; s < 2 * p.channels; s += gridDim.x) {
    const double* partial = p.partial + s / p.channels * groups * p.channels * width;
    double total[1] = {0.0};
    for (int64_t i = threadIdx.x; i < groups * width; i += kFoldLanes) {
      total[0] += partial[(i / width * p.channels + s % p.channels) * width + i % width];
    }
    fold(total, lanes);
    if (threadIdx.x == 0) p.sums[s] = total[0];
    __syncthreads();
  }
}

}  // namespace

void launch_bn_act_cuda(const BnActParams& p, void* stream) {
  const BnActPlan plan = plan_of(p);
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  const dim3 block(static_cast<unsigned>(plan.threads_x), static_cast<unsigned>(plan.threads_y));
  visit_dtype(p.dtype, [&]<class S>(S) {
    constexpr int N = sizeof(S) == 2 ? 8 : 4;
    const bool aligned = vector_aligned(p.x, p.dtype, N) && vector_aligned(p.out, p.dtype, N) && vector_aligned(p.dy, p.dtype, N);
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
  });
  if (p.sums) {
    const int64_t blocks = 2 * p.channels < 65536 ? 2 * p.channels : 65536;
    GF_LAUNCH((sums_kernel), dim3(static_cast<unsigned>(blocks)), dim3(kFoldLanes), 0, stream, p, plan.groups, plan.width);
  }
}

}  // namespace genfast
