// modulate_bias_act on CUDA (docs/gan-ops.md): one launch; for a gradient another that adds the partial sums up, in a fixed order, and one
// for the noise's.
#include "../../core/math.cuh"
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

template <class S>
constexpr int kElements = sizeof(S) == 2 ? 8 : 4;

template <int N, bool kVector>
__device__ __forceinline__ Span<N, kVector> span_at(int64_t begin, int64_t end) {
  Span<N, kVector> span;
  span.element = begin;
  span.count = end - begin < N ? static_cast<int>(end > begin ? end - begin : 0) : N;
#pragma unroll
  for (int i = 0; i < (kVector ? 1 : N); ++i) span.at[i] = begin + i;
  return span;
}

template <class T>
struct Curves {
  Curve<T> value, slope;
  __device__ __forceinline__ explicit Curves(const Curve<double>& c)
      : value{c.act, 0, c.clamped, static_cast<T>(c.alpha), static_cast<T>(c.gain), static_cast<T>(c.clamp)}, slope(value) {
    slope.order = 1;
  }
};

template <class T>
__device__ __forceinline__ T coefficient(const void* at, int64_t i, T otherwise) {
  return at ? static_cast<const T*>(at)[i] : otherwise;
}

// N elements from `offset`; coefficients of element i are at [i], or at [0] for all. Backward: adds what is summed to g and sum.
template <class S, bool kVector, bool kBackward, int N, int M, int K, class T = Wide<S>>
__device__ __forceinline__ void apply(const ModulateParams& p, const Curves<T>& curves, int64_t offset, const Span<N, kVector>& span,
                                      const T (&scale)[M], const T (&shift)[N], const T (&post)[M], T (&g)[N], T (&sum)[3][K]) {
  const auto x = load(static_cast<const S*>(p.x) + offset, span);
  Vec<S, N> dy{};
  if constexpr (kBackward) dy = load(static_cast<const S*>(p.dy) + offset, span);
  T out[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int j = M == 1 ? 0 : i, k = K == 1 ? 0 : i;
    const T v = widen(x, i), u = scale[j] * v + shift[i];
    if constexpr (!kBackward) {
      out[i] = curve_at<DeviceMath>(curves.value, u) * post[j];
    } else {
      const T slope = times_slope(widen(dy, i) * post[j], curve_at<DeviceMath>(curves.slope, u));
      out[i] = slope * scale[j];
      if (i < span.count) {
        g[i] += slope;
        sum[0][k] += slope;
        sum[1][k] += slope * v;
        if (p.post_scale) sum[2][k] += widen(dy, i) * curve_at<DeviceMath>(curves.value, u);
      }
    }
  }
  store(static_cast<S*>(p.out) + offset, span, narrow<S>(out));
}

// Where the partial sums lie.
template <class T>
__device__ __forceinline__ T* partial_sums(const ModulateParams& p, int64_t part, int k, int64_t sample) {
  return static_cast<T*>(p.partial) + ((part * kModulateSums + k) * p.batch + sample) * p.channels;
}
template <class T>
__host__ __device__ __forceinline__ T* partial_noise(const ModulateParams& p, int64_t parts) {
  return static_cast<T*>(p.partial) + parts * kModulateSums * p.batch * p.channels;
}

template <class S, bool kVector, bool kBackward>
__global__ void __launch_bounds__(256, kBackward ? 2 : 3) planes_kernel(const __grid_constant__ ModulateParams p) {
  using T = Wide<S>;
  constexpr int N = kElements<S>, kWarps = 8, kPixels = 32 * N;
  using Shared = T[kBackward ? kWarps : 1][kPixels];
  GF_SHARED(Shared, noise_of);
  const Curves<T> curves(p.curve);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPixels;
  const auto span = span_at<N, kVector>(begin + lane * N, p.inner);
  for (int64_t sample = blockIdx.z; sample < p.batch; sample += gridDim.z) {
    T noise[N]{}, g[N]{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (p.noise && i < span.count) noise[i] = static_cast<const T*>(p.noise)[(p.noise_of_all ? 0 : sample) * p.inner + span.element + i];
    }
    for (int64_t c = static_cast<int64_t>(blockIdx.y) * kWarps + warp; c < p.channels; c += static_cast<int64_t>(gridDim.y) * kWarps) {
      const int64_t row = sample * p.channels + c;
      const T scale[1] = {coefficient(p.scale, row, T(1))}, post[1] = {coefficient(p.post_scale, row, T(1))};
      const T b = coefficient(p.b, c, T(0));
      T shift[N], sum[kModulateSums][1]{};
#pragma unroll
      for (int i = 0; i < N; ++i) shift[i] = noise[i] + b;
      if (span.count > 0) apply<S, kVector, kBackward>(p, curves, row * p.inner, span, scale, shift, post, g, sum);
      if constexpr (kBackward) {
#pragma unroll
        for (int k = 0; k < kModulateSums; ++k) {
          for (int far = 16; far >= 1; far /= 2) sum[k][0] += __shfl_down_sync(~0u, sum[k][0], far);
          if (lane == 0) partial_sums<T>(p, blockIdx.x, k, sample)[c] = sum[k][0];
        }
      }
    }
    if constexpr (kBackward) {
      if (!p.grad_noise) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) noise_of[warp][lane * N + i] = g[i];
      __syncthreads();
      T* out = partial_noise<T>(p, gridDim.x) + (static_cast<int64_t>(blockIdx.y) * p.batch + sample) * p.inner;
      for (int i = static_cast<int>(threadIdx.x); i < kPixels && begin + i < p.inner; i += kWarps * 32) {
        T total = 0;
        for (int w = 0; w < kWarps; ++w) total += noise_of[w][i];
        out[begin + i] = total;
      }
      __syncthreads();
    }
  }
}

template <class S, bool kVector, bool kBackward>
__global__ void __launch_bounds__(256, kBackward ? 2 : 3) pixels_kernel(const __grid_constant__ ModulateParams p) {
  using T = Wide<S>;
  constexpr int N = kElements<S>;
  using Shared = T[kBackward ? 256 * N : 1];
  GF_SHARED(Shared, sum_of);
  const Curves<T> curves(p.curve);
  const int lanes = static_cast<int>(blockDim.x), rows = static_cast<int>(blockDim.y);
  const int lane = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * lanes * N, stride = static_cast<int64_t>(gridDim.y) * rows;
  const auto span = span_at<N, kVector>(first + lane * N, p.channels);
  T b[N]{};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < span.count) b[i] = coefficient(p.b, span.element + i, T(0));
  }
  for (int64_t sample = blockIdx.z; sample < p.batch; sample += gridDim.z) {
    T scale[N]{}, post[N]{}, sum[kModulateSums][N]{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < span.count) {
        scale[i] = coefficient(p.scale, sample * p.channels + span.element + i, T(1));
        post[i] = coefficient(p.post_scale, sample * p.channels + span.element + i, T(1));
      }
    }
    // All rows of a warp take each turn together, for the shuffles.
    for (int64_t base = static_cast<int64_t>(blockIdx.y) * rows; base < p.inner; base += stride) {
      const int64_t pixel = base + row;
      T g[N]{};
      if (pixel < p.inner && span.count > 0) {
        const T noise = coefficient(p.noise, (p.noise_of_all ? 0 : sample) * p.inner + pixel, T(0));
        T shift[N];
#pragma unroll
        for (int i = 0; i < N; ++i) shift[i] = noise + b[i];
        apply<S, kVector, kBackward>(p, curves, (sample * p.inner + pixel) * p.channels, span, scale, shift, post, g, sum);
      }
      if constexpr (kBackward) {
        if (!p.grad_noise) continue;
        T total = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) total += g[i];
        for (int far = lanes / 2; far >= 1; far /= 2) total += __shfl_down_sync(~0u, total, far, lanes);
        if (lane == 0 && pixel < p.inner)
          partial_noise<T>(p, gridDim.y)[(static_cast<int64_t>(blockIdx.x) * p.batch + sample) * p.inner + pixel] = total;
      }
    }
    if constexpr (kBackward) {
#pragma unroll
      for (int k = 0; k < kModulateSums; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum_of[(row * lanes + lane) * N + i] = sum[k][i];
        __syncthreads();
        for (int i = row * lanes + lane; i < lanes * N && first + i < p.channels; i += 256) {
          T total = 0;
          for (int r = 0; r < rows; ++r) total += sum_of[r * lanes * N + i];
          partial_sums<T>(p, blockIdx.y, k, sample)[first + i] = total;
        }
        __syncthreads();
      }
    }
  }
}

// out[i] = the sum of partial[k][i] over k. Blocks of 32 by 8 threads.
template <class T, class Out>
__global__ void __launch_bounds__(256) sums_kernel(Out* out, const T* partial, int64_t count, int64_t parts) {
  using Shared = double[8][32];
  GF_SHARED(Shared, totals);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 32; first < count; first += static_cast<int64_t>(gridDim.x) * 32) {
    const int64_t i = first + threadIdx.x;
    double total = 0;
    for (int64_t k = threadIdx.y; k < parts && i < count; k += 8) total += partial[k * count + i];
    totals[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && i < count) {
      for (int k = 1; k < 8; ++k) total += totals[k][threadIdx.x];
      out[i] = static_cast<Out>(total);
    }
    __syncthreads();
  }
}

template <class T, class Out>
void add_up(Out* out, const T* partial, int64_t count, int64_t parts, void* stream) {
  const int64_t blocks = at_most(ceil_div(count, 32), 65536);
  GF_LAUNCH((sums_kernel<T, Out>), dim3(static_cast<unsigned>(blocks)), dim3(32, 8), 0, stream, out, partial, count, parts);
}

template <class S, bool kVector, bool kBackward>
void launch(const ModulateParams& p, const ModulatePlan& plan, void* stream) {
  const dim3 grid(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y), static_cast<unsigned>(plan.grid_z));
  if (p.channels_last) {
    const unsigned lanes = static_cast<unsigned>(plan.lanes);
    GF_LAUNCH((pixels_kernel<S, kVector, kBackward>), grid, dim3(lanes, 256 / lanes), 0, stream, p);
  } else {
    GF_LAUNCH((planes_kernel<S, kVector, kBackward>), grid, dim3(256), 0, stream, p);
  }
}

}  // namespace

void launch_modulate_bias_act_cuda(const ModulateParams& p, void* stream) {
  const ModulatePlan plan = plan_of(p);
  visit_dtype(p.dtype, [&]<class S>(S) {
    using T = Wide<S>;
    constexpr int N = kElements<S>;
    const bool aligned = vector_aligned(p.x, p.dtype, N) && vector_aligned(p.out, p.dtype, N) && vector_aligned(p.dy, p.dtype, N);
    const bool vector = aligned && (p.channels_last ? p.channels : p.inner) % N == 0;
    if (p.dy) {
      vector ? launch<S, true, true>(p, plan, stream) : launch<S, false, true>(p, plan, stream);
      add_up(p.sums, static_cast<const T*>(p.partial), kModulateSums * p.batch * p.channels, plan.parts, stream);
      if (p.grad_noise)
        add_up(static_cast<T*>(p.grad_noise), static_cast<const T*>(partial_noise<T>(p, plan.parts)), p.batch * p.inner, plan.noise_parts,
               stream);
    } else {
      vector ? launch<S, true, false>(p, plan, stream) : launch<S, false, false>(p, plan, stream);
    }
  });
}

}  // namespace genfast
