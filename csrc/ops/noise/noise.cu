// Fills (batch, per_sample) with the noise of docs/noise.md. One thread makes the quads of one 16-byte store (two for float64).
#include "../../core/philox.h"
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

template <class S, bool kVector>
__global__ void __launch_bounds__(kTileThreads) noise_kernel(const __grid_constant__ NoiseParams p) {
  constexpr int N = sizeof(S) == 2 ? 8 : 4;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group * N >= p.per_sample) return;
  const auto span = span_of<N, kVector>(group, p.per_sample, p.channels);
  for (int64_t b = first_sample(); b < p.batch; b = next_sample(b)) {
    Wide<S> values[N];
#pragma unroll
    for (int quad = 0; quad < N / 4; ++quad) {
      const int64_t i = span.element / 4 + quad;
      Normals four;
      if (p.uniform) {
        const Words words = philox(p.seeds[b], p.stream, p.draw, i);
#pragma unroll
        for (int k = 0; k < 4; ++k) four.z[k] = as_float(as_bits(uniform(words.w[k])) & uniform_bits<S>());
      } else {
        four = normals(p.seeds[b], p.stream, p.draw, i);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) values[4 * quad + k] = four.z[k];
    }
    store(static_cast<S*>(p.out) + b * p.per_sample, span, narrow<S>(values));
  }
}

}  // namespace

void launch_noise_cuda(const NoiseParams& p, void* stream) {
  visit_dtype(p.dtype, [&]<class S>(S) {
    constexpr int N = sizeof(S) == 2 ? 8 : 4;
    const auto [grid, block] = tile(p.batch, (p.per_sample + N - 1) / N);
    const bool vector = p.channels == 1 && p.per_sample % N == 0 && vector_aligned(p.out, p.dtype, N);
    if (vector) {
      GF_LAUNCH((noise_kernel<S, true>), grid, block, 0, stream, p);
    } else {
      GF_LAUNCH((noise_kernel<S, false>), grid, block, 0, stream, p);
    }
  });
}

}  // namespace genfast
