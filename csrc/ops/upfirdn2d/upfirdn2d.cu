// upfirdn2d on CUDA (docs/gan-ops.md). A thread computes kOutputs outputs one above the other, of one column of a plane or one channel of a
// column; neighbouring threads take neighbouring addresses. The filter lies in shared memory, the input in L1: each element is met by
// taps / up^2 outputs that neighbours compute at about the same time.
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

constexpr int kOutputs = 4;

template <class S>
__device__ __forceinline__ S narrowed(Wide<S> v) {
  if constexpr (sizeof(S) == 2) {
    const float pair[2] = {static_cast<float>(v), 0.0f};
    return element(narrow<S>(pair), 0);
  } else {
    return v;
  }
}

template <class S>
__global__ void __launch_bounds__(256) upfirdn2d_kernel(const __grid_constant__ Upfirdn2dParams p) {
  using T = Wide<S>;
  GF_DYNAMIC_SHARED(T, filter);  // separable: taps of x, then of y
  const int64_t taps = p.fy ? p.x.taps + p.y.taps : p.x.taps * p.y.taps;
  for (int64_t i = threadIdx.x; i < taps; i += blockDim.x) {
    filter[i] = p.fy && i >= p.x.taps ? static_cast<const T*>(p.fy)[i - p.x.taps] : static_cast<const T*>(p.fx)[i];
  }
  __syncthreads();
  const T* fy = filter + p.x.taps;

  const int64_t groups = (p.y.out + kOutputs - 1) / kOutputs, depth = p.channels_last ? p.channels : 1;
  const int64_t planes = p.channels_last ? p.batch : p.batch * p.channels, width = p.x.out * depth;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  const int64_t channel = column % depth;
  const FirSpan x = fir_span(p.x, column / depth);
  for (int64_t unit = blockIdx.y; unit < planes * groups; unit += gridDim.y) {
    const int64_t plane = unit / groups, first = unit % groups * kOutputs;
    const S* in = static_cast<const S*>(p.in) + plane * p.y.in * p.x.in * depth + channel;
    S* out = static_cast<S*>(p.out) + plane * p.y.out * width + column;
#pragma unroll 1
    for (int64_t o = first; o < p.y.out && o < first + kOutputs; ++o) {
      const FirSpan y = fir_span(p.y, o);
      T sum = T(0);
      for (int64_t iy = y.begin; iy < y.end; ++iy) {
        const int64_t ty = y.tap + (iy - y.begin) * p.y.up;
        const T* w = filter + (p.fy ? x.tap : ty * p.x.taps + x.tap);
        const S* at = in + (iy * p.x.in + x.begin) * depth;
        T row = T(0);
        for (int64_t ix = x.begin; ix < x.end; ++ix, w += p.x.up, at += depth) row += *w * widen(*at);
        sum += p.fy ? row * fy[ty] : row;
      }
      out[o * width] = narrowed<S>(sum);
    }
  }
}

}  // namespace

void launch_upfirdn2d_cuda(const Upfirdn2dParams& p, void* stream) {
  constexpr int64_t kMaxGrid = 32768;
  const int64_t depth = p.channels_last ? p.channels : 1, planes = p.channels_last ? p.batch : p.batch * p.channels;
  const int64_t units = planes * ((p.y.out + kOutputs - 1) / kOutputs), width = p.x.out * depth;
  const unsigned block = width >= 256 ? 256 : static_cast<unsigned>((width + 31) / 32 * 32);
  const dim3 grid(static_cast<unsigned>((width + block - 1) / block), static_cast<unsigned>(units < kMaxGrid ? units : kMaxGrid));
  const int64_t taps = p.fy ? p.x.taps + p.y.taps : p.x.taps * p.y.taps;
  check(taps <= 6000, "f: got ", taps, " taps, supported: at most 6000 on CUDA");
  visit_dtype(p.dtype, [&]<class S>(S) {
    GF_LAUNCH((upfirdn2d_kernel<S>), grid, dim3(block), static_cast<size_t>(taps) * sizeof(Wide<S>), stream, p);
  });
}

}  // namespace genfast
