// bn_act on CUDA (docs/gan-ops.md): one launch a pass, whatever the layout, and after a pass that sums a second one that adds the partial
// sums up, in a fixed order; one small launch for the coefficients between the passes.
#include "../../core/math.cuh"
#include "../../core/reduce.cuh"
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

constexpr int kAbreast = 2;  // spans of which a thread has the loads in flight at once

template <BnPass kPass>
constexpr bool kSumming = kPass == BnPass::Moments || kPass == BnPass::Sums;

template <class S, int N>
struct Inputs {
  Vec<S, N> x, dy, residual;
};

template <BnPass kPass, class S, int N, bool kVector>
__device__ __forceinline__ Inputs<S, N> inputs(const BnActParams& p, int64_t offset, const Span<N, kVector>& span) {
  Inputs<S, N> in{};
  in.x = load(static_cast<const S*>(p.x) + offset, span);
  if constexpr (kPass == BnPass::Sums || kPass == BnPass::Backward) in.dy = load(static_cast<const S*>(p.dy) + offset, span);
  if (kPass != BnPass::Moments && p.residual) in.residual = load(static_cast<const S*>(p.residual) + offset, span);
  return in;
}

// The N elements of `in`, which lie at `offset`; coefficient k of element i is c[k][i], or c[k][0] for all. Adds to sum what the pass sums.
template <BnPass kPass, class S, int N, int M, bool kVector>
__device__ __forceinline__ void apply(const BnActParams& p, const Curve<Wide<S>>& curve, const Inputs<S, N>& in, int64_t offset,
                                      const Span<N, kVector>& span, const Wide<S> (&c)[kBnCoefficients][M], Wide<S> (&sum)[2][N]) {
  using T = Wide<S>;
  T out[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int j = M == 1 ? 0 : i;
    const T v = widen(in.x, i) - c[kCenter][j];
    T a = v;
    if constexpr (kPass != BnPass::Moments) {
      T u = c[kScale][j] * v + c[kShift][j];
      if (p.residual) u += widen(in.residual, i);
      out[i] = curve_at<DeviceMath>(curve, u);
    }
    if constexpr (kPass == BnPass::Sums || kPass == BnPass::Backward) out[i] = a = times_slope(widen(in.dy, i), out[i]);
    if constexpr (kPass == BnPass::Backward) out[i] = c[kP][j] * a + (c[kQ][j] * v + c[kR][j]);
    if (kSumming<kPass> && i < span.count) {
      sum[0][i] += a;
      sum[1][i] += a * v;
    }
  }
  if (kPass != BnPass::Moments && (kPass != BnPass::Sums || p.out)) store(static_cast<S*>(p.out) + offset, span, narrow<S>(out));
}

template <class T>
__device__ __forceinline__ Curve<T> curve_of(const BnActParams& p) {
  return {p.curve.act, p.curve.order, false, static_cast<T>(p.curve.alpha), static_cast<T>(p.curve.gain), T(0)};
}

// The coefficients of channel `channel` of sample `sample`; for the moments the element around which they are summed.
template <BnPass kPass, class S, int M>
__device__ __forceinline__ void coefficients(const BnActParams& p, int64_t sample, int64_t channel, int i,
                                             Wide<S> (&c)[kBnCoefficients][M]) {
  using T = Wide<S>;
  if constexpr (kPass == BnPass::Moments) {
    c[kCenter][i] = widen(static_cast<const S*>(p.x)[(sample * p.outer * p.channels + channel) * p.inner]);
  } else {
#pragma unroll
    for (int k = 0; k < (kPass == BnPass::Backward ? kBnCoefficients : kShift + 1); ++k) {
      c[k][i] = static_cast<const T*>(p.coef)[(k * p.samples + sample) * p.channels + channel];
    }
  }
}

template <BnPass kPass, class S, int N, bool kVector>
__global__ void __launch_bounds__(256) long_rows_kernel(const __grid_constant__ BnActParams p) {
  using T = Wide<S>;
  GF_SHARED(Lanes<2>, lanes);
  const Curve<T> curve = curve_of<T>(p);
  const int64_t begin = blockIdx.x * kBnCudaChunk, end = begin + kBnCudaChunk < p.inner ? begin + kBnCudaChunk : p.inner;
  // Rows are long, so 32 bits count them; a division of 64 bits is a subroutine.
  const unsigned channels = static_cast<unsigned>(p.channels), per_sample = static_cast<unsigned>(p.outer) * channels;
  const int64_t rows = p.samples * p.outer * p.channels;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const unsigned sample = static_cast<unsigned>(row) / per_sample, channel = static_cast<unsigned>(row) % channels;
    T c[kBnCoefficients][1]{}, sum[2][N]{};
    coefficients<kPass, S>(p, sample, channel, 0, c);
    for (int64_t i = begin + threadIdx.x * N; i < end; i += kAbreast * kFoldLanes * N) {
      Inputs<S, N> in[kAbreast];
      Span<N, kVector> span[kAbreast];
#pragma unroll
      for (int k = 0; k < kAbreast; ++k) {
        const int64_t at = i + k * kFoldLanes * N;
        span[k] = span_at<N, kVector>(at, end);
        if (at < end) in[k] = inputs<kPass, S>(p, row * p.inner, span[k]);
      }
#pragma unroll
      for (int k = 0; k < kAbreast; ++k) {
        if (i + k * kFoldLanes * N < end) apply<kPass>(p, curve, in[k], row * p.inner, span[k], c, sum);
      }
    }
    if constexpr (kSumming<kPass>) {
      double total[2] = {0.0, 0.0};
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[0] += sum[0][i];
        total[1] += sum[1][i];
      }
      fold(total, lanes);
      if (threadIdx.x == 0) {
        for (int k = 0; k < 2; ++k) p.partial[(k * rows + row) * gridDim.x + blockIdx.x] = total[k];
      }
      __syncthreads();
    }
  }
}

template <BnPass kPass, class S, int N, bool kVector>
__global__ void __launch_bounds__(256, 2) columns_kernel(const __grid_constant__ BnActParams p) {
  using T = Wide<S>;
  const Curve<T> curve = curve_of<T>(p);
  const int64_t period = p.channels * p.inner, column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= period) return;
  const auto span = span_at<N, kVector>(column, period);
  const int64_t groups = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const unsigned inner = static_cast<unsigned>(p.inner), first_channel = static_cast<unsigned>(column) / inner;
  for (int64_t sample = blockIdx.z; sample < p.samples; sample += gridDim.z) {
    T c[kBnCoefficients][N]{}, sum[2][N]{};
    unsigned channel = first_channel, left = inner - (static_cast<unsigned>(column) - first_channel * inner);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < span.count) coefficients<kPass, S>(p, sample, channel, i, c);
      if (--left == 0) {
        left = inner;
        ++channel;
      }
    }
    for (int64_t row = first_sample(); row < p.outer; row += kAbreast * groups) {
      Inputs<S, N> in[kAbreast];
#pragma unroll
      for (int k = 0; k < kAbreast; ++k) {
        if (row + k * groups < p.outer) in[k] = inputs<kPass, S>(p, (sample * p.outer + row + k * groups) * period, span);
      }
#pragma unroll
      for (int k = 0; k < kAbreast; ++k) {
        if (row + k * groups < p.outer) apply<kPass>(p, curve, in[k], (sample * p.outer + row + k * groups) * period, span, c, sum);
      }
    }
    if constexpr (kSumming<kPass>) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i < span.count) {
          for (int k = 0; k < 2; ++k) p.partial[((k * p.samples + sample) * groups + first_sample()) * period + column + i] = sum[k][i];
        }
      }
    }
  }
}

// One block a channel of a sample.
__global__ void __launch_bounds__(256) sums_kernel(const __grid_constant__ BnActParams p, int64_t groups, int64_t width) {
  GF_SHARED(Lanes<2>, lanes);
  const int64_t places = p.samples * p.channels, one = groups * p.channels * width;
  for (int64_t place = blockIdx.x; place < places; place += gridDim.x) {
    const int64_t sample = place / p.channels, channel = place - sample * p.channels;
    const double* partial = p.partial + sample * one + channel * width;
    double total[2] = {0.0, 0.0};
    for (int64_t i = threadIdx.x; i < groups * width; i += kFoldLanes) {
      const int64_t group = i / width, at = group * p.channels * width + (i - group * width);
      total[0] += partial[at];
      total[1] += partial[p.samples * one + at];
    }
    fold(total, lanes);
    if (threadIdx.x == 0) {
      if (p.pass == BnPass::Moments) moments_of(total, origin_of(p, sample, channel), static_cast<double>(p.outer * p.inner));
      p.sums[place] = total[0];
      p.sums[places + place] = total[1];
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(256) coefficients_kernel(const __grid_constant__ BnCoefficientsParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.samples * p.channels; i += step) {
    const int64_t sample = i / p.channels, channel = i - sample * p.channels;
    const BnGroup group = bn_group_of(p, sample, channel / (p.channels / p.groups));
    p.dtype == DType::F64 ? bn_coefficients_at<double>(p, sample, channel, group) : bn_coefficients_at<float>(p, sample, channel, group);
  }
}

template <BnPass kPass, class S, int N, bool kVector>
void launch_pass(const BnActParams& p, const BnActPlan& plan, void* stream) {
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y), static_cast<unsigned>(plan.grid_z));
  const dim3 block(static_cast<unsigned>(plan.threads_x), static_cast<unsigned>(plan.threads_y));
  if (plan.long_rows) {
    GF_LAUNCH((long_rows_kernel<kPass, S, N, kVector>), grid, block, 0, stream, p);
  } else {
    GF_LAUNCH((columns_kernel<kPass, S, N, kVector>), grid, block, 0, stream, p);
  }
}

template <BnPass kPass>
void launch_rows(const BnActParams& p, const BnActPlan& plan, void* stream) {
  visit_dtype(p.dtype, [&]<class S>(S) {
    plan.vector ? launch_pass<kPass, S, kBnWidth<sizeof(S), true>, true>(p, plan, stream)
                : launch_pass<kPass, S, kBnWidth<sizeof(S), false>, false>(p, plan, stream);
  });
}

}  // namespace

void launch_bn_act_cuda(const BnActParams& p, void* stream) {
  const BnActPlan plan = plan_of(p);
  check(plan.long_rows || p.channels * p.inner < int64_t{1} << 32, "x: got ", p.channels * p.inner,
        " elements of a sample's channels, each shorter than ", kBnCudaLongRow, ", supported: fewer than 2^32");
  switch (p.pass) {
    case BnPass::Moments:
      launch_rows<BnPass::Moments>(p, plan, stream);
      break;
    case BnPass::Apply:
      launch_rows<BnPass::Apply>(p, plan, stream);
      break;
    case BnPass::Sums:
      launch_rows<BnPass::Sums>(p, plan, stream);
      break;
    case BnPass::Backward:
      launch_rows<BnPass::Backward>(p, plan, stream);
      break;
  }
  if (p.sums) {
    const int64_t blocks = p.samples * p.channels < 65536 ? p.samples * p.channels : 65536;
    GF_LAUNCH((sums_kernel), dim3(static_cast<unsigned>(blocks)), dim3(kFoldLanes), 0, stream, p, plan.groups, plan.width);
  }
}

void launch_bn_coefficients_cuda(const BnCoefficientsParams& p, void* stream) {
  const int64_t blocks = ceil_div(p.samples * p.channels, 256);
  GF_LAUNCH((coefficients_kernel), dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536)), dim3(256), 0, stream, p);
}

}  // namespace genfast
