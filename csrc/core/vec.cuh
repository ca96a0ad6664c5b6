// Storage types, vectors of them, and conversion to and from the type of the arithmetic (float, or double for double).
#pragma once
#include "dtype.h"
#include "exact_math.h"
#include "ptx.cuh"

namespace genfast {

template <class S>
using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

// N elements that move as 16-byte accesses (or one smaller access, where N elements are less). The 16-bit types stay in pairs, element 2i
// in the low half of unit i: taken apart, they would occupy a register each.
template <class S, int N>
struct alignas(sizeof(S) * N < 16 ? sizeof(S) * N : 16) Vec {
  using Unit = std::conditional_t<sizeof(S) == 2, uint32_t, S>;
  Unit unit[sizeof(S) * N / sizeof(Unit)];
};

__device__ __forceinline__ float widen(float a) {
  return a;
}
__device__ __forceinline__ double widen(double a) {
  return a;
}
__device__ __forceinline__ float widen(BFloat16 a) {
  return widen_bf16(a);
}
__device__ __forceinline__ float widen(Float16 a) {
  return unpack_f16(a);
}

template <class S, int N>
__device__ __forceinline__ S element(const Vec<S, N>& a, int i) {
  if constexpr (sizeof(S) == 2) {
    return {static_cast<uint16_t>(a.unit[i / 2] >> 16 * (i % 2))};
  } else {
    return a.unit[i];
  }
}

template <class S, int N>
__device__ __forceinline__ Wide<S> widen(const Vec<S, N>& a, int i) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return as_float(i % 2 ? a.unit[i / 2] & 0xffff0000u : a.unit[i / 2] << 16);
  } else {
    return widen(element(a, i));
  }
}

// Rounds N values of T to S, to nearest even; a double reaches the 16-bit types through float, as in torch.
template <class S, class T, int N>
__device__ __forceinline__ Vec<S, N> narrow(const T (&a)[N]) {
  Vec<S, N> out;
  if constexpr (sizeof(S) == 2) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float low = static_cast<float>(a[2 * i]), high = static_cast<float>(a[2 * i + 1]);
      out.unit[i] = std::is_same_v<S, BFloat16> ? pack_bf16x2(low, high) : pack_f16x2(low, high);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out.unit[i] = static_cast<S>(a[i]);
  }
  return out;
}

// The elements of one sample that one thread handles: N consecutive ones in C-order (logical) numbering, which is what noise counts in.
// kVector: they are also consecutive, aligned and complete in storage. Otherwise element i < count lies at storage at[i].
template <int N, bool kVector>
struct Span {
  int64_t element;  // the first, a multiple of N
  int count;
  int64_t at[kVector ? 1 : N];
};

// Span number `group` of a sample. With channels > 1 (channels_last) neighbouring threads take neighbouring channels where that is
// possible, so that a warp's accesses stay close in storage.
template <int N, bool kVector>
__device__ __forceinline__ Span<N, kVector> span_of(int64_t group, int64_t per_sample, int64_t channels) {
  Span<N, kVector> span;
  span.element = group * N;
  if constexpr (kVector) {
    span.count = N;
    span.at[0] = span.element;
  } else {
    const int64_t points = per_sample / channels;
    if (channels > 1 && points % N == 0) span.element = group % channels * points + group / channels * N;
    const int64_t left = per_sample - span.element;
    span.count = left < N ? static_cast<int>(left) : N;
    int64_t channel = span.element / points, point = span.element % points;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      span.at[i] = point * channels + channel;
      if (++point == points) {
        point = 0;
        ++channel;
      }
    }
  }
  return span;
}

// Elements begin ... of a dense row that ends before `end`.
template <int N, bool kVector>
__device__ __forceinline__ Span<N, kVector> span_at(int64_t begin, int64_t end) {
  Span<N, kVector> span;
  span.element = begin;
  span.count = end - begin < N ? static_cast<int>(end - begin) : N;
#pragma unroll
  for (int i = 0; i < (kVector ? 1 : N); ++i) span.at[i] = begin + i;
  return span;
}

template <class S, int N, bool kVector>
__device__ __forceinline__ Vec<S, N> load(const S* sample, const Span<N, kVector>& span) {
  if constexpr (kVector) {
    return *reinterpret_cast<const Vec<S, N>*>(sample + span.at[0]);
  } else {
    Vec<S, N> out{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= span.count) break;
      if constexpr (sizeof(S) == 2) {
        out.unit[i / 2] |= static_cast<uint32_t>(sample[span.at[i]].bits) << 16 * (i % 2);
      } else {
        out.unit[i] = sample[span.at[i]];
      }
    }
    return out;
  }
}

template <class S, int N, bool kVector>
__device__ __forceinline__ void store(S* sample, const Span<N, kVector>& span, const Vec<S, N>& value) {
  if constexpr (kVector) {
    *reinterpret_cast<Vec<S, N>*>(sample + span.at[0]) = value;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < span.count) sample[span.at[i]] = element(value, i);
    }
  }
}

// Calls f with a value of the storage type that `dtype` names. On the device the branch is uniform.
template <class F>
__host__ __device__ __forceinline__ decltype(auto) visit_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::F64:
      return f(double{});
    case DType::BF16:
      return f(BFloat16{});
    case DType::F16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

// A launch over (batch, groups of one sample): a block covers groups along x and, where a sample has few, several samples along y.
// Blocks have between 129 and 256 threads. Samples beyond the grid are met by striding, next_sample(b).
struct Tiling {
  dim3 grid, block;
};
constexpr int kTileThreads = 256;
constexpr int64_t kMaxGridY = 1024;

inline Tiling tile(int64_t batch, int64_t groups) {
  const int64_t x = groups < kTileThreads ? groups : kTileThreads, y = kTileThreads / x;
  const int64_t grid_y = (batch + y - 1) / y;
  return {dim3(static_cast<unsigned>((groups + x - 1) / x), static_cast<unsigned>(grid_y < kMaxGridY ? grid_y : kMaxGridY)),
          dim3(static_cast<unsigned>(x), static_cast<unsigned>(y))};
}
__device__ __forceinline__ int64_t first_sample() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
}
__device__ __forceinline__ int64_t next_sample(int64_t b) {
  return b + static_cast<int64_t>(gridDim.y) * blockDim.y;
}

inline int64_t size_of(DType dtype) {
  return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2;
}

// Whether N elements of `dtype` at every multiple of N from `data` move as vectors.
inline bool vector_aligned(const void* data, DType dtype, int n) {
  const int64_t bytes = n * size_of(dtype);
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) == 0;
}

}  // namespace genfast
