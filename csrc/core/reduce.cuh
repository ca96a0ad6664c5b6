// Reductions over a block of 256 threads, in a fixed order.
#pragma once
#include "exact_math.h"
#include "launch.h"

namespace genfast {

constexpr int kFoldLanes = 256;

template <int N>
struct Lanes {
  double v[N][kFoldLanes];
};

// Folds lane[l] += lane[l + s] for s = 128, 64, ..., 1, for N sums at once; thread 0 ends with the totals. Called by all threads.
// Through shared memory to the last step: each step reads lanes that no later step writes, so one barrier a step is enough.
template <int N>
__device__ __forceinline__ void fold(double (&sum)[N], Lanes<N>& shared) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int s = kFoldLanes / 2; s >= 1; s /= 2) {
    if (lane >= s && lane < 2 * s) {
#pragma unroll
      for (int k = 0; k < N; ++k) shared.v[k][lane] = sum[k];
    }
    __syncthreads();
    if (lane < s) {
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] = add(sum[k], shared.v[k][lane + s]);
    }
  }
}

}  // namespace genfast
