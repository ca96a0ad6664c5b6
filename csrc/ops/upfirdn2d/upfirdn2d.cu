// upfirdn2d on CUDA (docs/gan-ops.md), in four kernels:
//   tile_kernel      planes, filter of known size: an input tile in shared memory, widened once; a thread computes a patch of outputs from
//   a
//                    window in registers and stores 16 bytes a row
//   lines_kernel     the same with a long separable filter: along x from the tile into lines in shared memory, then along y
//   channels_kernel  channels last, filter of known size: 16 bytes of channels at a time, a patch of pixels for each
//   any_kernel       everything else
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

constexpr int kThreads = 256, kMostShared = 48 * 1024;

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

template <class S>
__device__ __forceinline__ S narrowed(Wide<S> v) {
  if constexpr (sizeof(S) == 2) {
    const float pair[2] = {static_cast<float>(v), 0.0f};
    return element(narrow<S>(pair), 0);
  } else {
    return v;
  }
}

// ---- windows -----------------------------------------------------------------------------------------------------------------

// One axis with everything known at compile time but `pad`. Outputs come in patches whose first one is a multiple of up, so that all
// patches have the same phase, the first tap of their first output. Output k's taps tap(k), tap(k) + up, ... meet elements
// first(k), first(k) + 1, ... of the patch's window.
template <int up, int down, int taps, int phase, int patch>
struct Window {
  static constexpr int tap(int k) { return ((phase - k * down) % up + up) % up; }
  static constexpr int first(int k) { return (k * down + tap(k) - phase) / up; }
  static constexpr int size = first(patch - 1) + (taps - tap(patch - 1) + up - 1) / up;
  static_assert(patch % up == 0 && taps >= up);
};
template <int up, int down, int taps, int patch>
constexpr int kWindow =
    Window<up, down, taps, 0, patch>::size > Window<up, down, taps, up - 1, patch>::size ? Window<up, down, taps, 0, patch>::size
                                                                                         : Window<up, down, taps, up - 1, patch>::size;

// The element that the first tap of output `o`, a multiple of up, meets.
__host__ __device__ __forceinline__ int64_t first_element(const FirAxis& a, int64_t o) {
  return o / a.up * a.down + (a.pad >= 0 ? -(a.pad / a.up) : (-a.pad + a.up - 1) / a.up);
}
__host__ __device__ __forceinline__ int phase_of(const FirAxis& a) {
  return static_cast<int>((a.pad % a.up + a.up) % a.up);
}

// f<px, py>() for the phases of both axes.
template <int up, class F>
__device__ __forceinline__ void at_phases(const Upfirdn2dParams& p, F f) {
  static_assert(up <= 2);
  if constexpr (up == 1) {
    f.template operator()<0, 0>();
  } else {
    switch (2 * phase_of(p.y) + phase_of(p.x)) {
      case 0:
        return f.template operator()<0, 0>();
      case 1:
        return f.template operator()<1, 0>();
      case 2:
        return f.template operator()<0, 1>();
      default:
        return f.template operator()<1, 1>();
    }
  }
}

// ---- tiles -------------------------------------------------------------------------------------------------------------------

// A block covers `patches_x` x `patches_y` patches of `planes` planes. In shared memory a row is skewed: four words are left out after each
// patch's step, where a step is eight words or more, so that the threads of a quarter of a warp read sixteen bytes each from all banks.
struct Tiling2d {
  int patches_x, patches_y, planes;
  int width, height;             // of the tile, in elements
  int pitch, line_pitch;         // words between rows of the tile, and of the lines
  int shift, units;              // loads of a row, the first of them `shift` elements left of the tile, so that pairs begin at even ones
  uint32_t by_units, by_height;  // 2^32 / divisor, rounded up
  int64_t tiles_x, tiles_y;      // of a plane
};

template <int step>
__host__ __device__ constexpr int skewed(int i) {
  return step >= 8 ? i + i / step * 4 : i;
}

template <class S>
constexpr int kSixteen = 16 / static_cast<int>(sizeof(S));  // elements in 16 bytes
template <class S, int up>
constexpr int kAcross = kSixteen<S> > 4 * up ? kSixteen<S> : 4 * up;  // outputs of a patch's row: windows begin at multiples of four words
template <int up, int down>
constexpr int kHigh = up == 1 && down == 1 ? 4 : 2;  // rows of a patch
template <class S>
constexpr int kUnit = sizeof(S) == 2 ? 2 : 1;  // neighbours that a thread loads at once: four bytes
constexpr int kInFlight = 8;                   // loads that a thread issues before it stores the first to shared memory

struct Corner {
  int64_t x, y, plane;
};
__device__ __forceinline__ Corner corner_of(const Tiling2d& t) {
  const int64_t block = blockIdx.x, row = block / t.tiles_x;
  const int64_t group = row / t.tiles_y;
  return {block - row * t.tiles_x, row - group * t.tiles_y, group * t.planes};
}

// The block's tile: rows of plane after plane, zero outside the picture.
template <class S, int step>
__device__ __forceinline__ void load_tile(const Upfirdn2dParams& p, const Tiling2d& t, float* tile, int64_t left, int64_t top,
                                          int64_t plane, int64_t planes) {
  constexpr int U = kUnit<S>;
  const unsigned per_row = static_cast<unsigned>(t.units), units = per_row * static_cast<unsigned>(t.height * t.planes);
  const bool pairs = U == 2 && p.x.in % 2 == 0 && reinterpret_cast<uintptr_t>(p.in) % 4 == 0;
  for (unsigned begin = threadIdx.x; begin < units; begin += kInFlight * blockDim.x) {
    float v[kInFlight][U];
    int at[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const unsigned unit = begin + k * blockDim.x, row = mul_high(unit, t.by_units), z = mul_high(row, t.by_height);
      const int column = static_cast<int>(unit - row * per_row) * U - t.shift;
      const int64_t x = left + column, y = top + static_cast<int>(row - z * t.height);
      const bool here = unit < units && plane + z < planes && y >= 0 && y < p.y.in;
      const S* from = static_cast<const S*>(p.in) + ((plane + z) * p.y.in + y) * p.x.in + x;
      at[k] = unit < units ? static_cast<int>(row) * t.pitch : -1;
#pragma unroll
      for (int i = 0; i < U; ++i) v[k][i] = 0.0f;
      if (here && pairs) {
        if constexpr (U == 2) {
          if (x >= 0 && x < p.x.in) {
            const auto pair = *reinterpret_cast<const Vec<S, 2>*>(from);
            v[k][0] = widen(pair, 0);
            v[k][1] = widen(pair, 1);
          }
        }
      } else if (here) {
#pragma unroll
        for (int i = 0; i < U; ++i) {
          if (x + i >= 0 && x + i < p.x.in) v[k][i] = static_cast<float>(widen(from[i]));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const unsigned unit = begin + k * blockDim.x;
      const int column = static_cast<int>(unit - mul_high(unit, t.by_units) * per_row) * U - t.shift;
#pragma unroll
      for (int i = 0; i < U; ++i) {
        if (at[k] >= 0 && column + i >= 0 && column + i < t.width) tile[at[k] + skewed<step>(column + i)] = v[k][i];
      }
    }
  }
}

// `count` words from `from`, which is aligned to four of them, of a skewed row.
template <int count, int step>
__device__ __forceinline__ void read_window(const float* from, float (&to)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const auto four = *reinterpret_cast<const Vec<float, 4>*>(from + skewed<step>(i));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k < count) to[i + k] = four.unit[k];
    }
  }
}

template <class S, int V>
__device__ __forceinline__ void store_outputs(S* row, int64_t x, int64_t width, const float (&v)[V]) {
  if (x + V <= width && reinterpret_cast<uintptr_t>(row + x) % 16 == 0) {
    *reinterpret_cast<Vec<S, V>*>(row + x) = narrow<S>(v);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (x + i < width) row[x + i] = narrowed<S>(v[i]);
    }
  }
}

template <class S, int up, int down, int taps>
__global__ void __launch_bounds__(kThreads) tile_kernel(const __grid_constant__ Upfirdn2dParams p, const __grid_constant__ Tiling2d t) {
  constexpr int V = kAcross<S, up>, R = kHigh<up, down>, step = V * down / up, step_y = R * down / up;
  GF_DYNAMIC_SHARED(float, shared);
  float* tile = shared + taps * taps;  // 16 words: the tile stays aligned
  for (int i = static_cast<int>(threadIdx.x); i < taps * taps; i += static_cast<int>(blockDim.x)) {
    const float* fx = static_cast<const float*>(p.fx);
    shared[i] = p.fy ? fx[i % taps] * static_cast<const float*>(p.fy)[i / taps] : fx[i];
  }
  const Corner corner = corner_of(t);
  const int64_t x0 = corner.x * t.patches_x * V, y0 = corner.y * t.patches_y * R, planes = p.batch * p.channels;
  load_tile<S, step>(p, t, tile, first_element(p.x, x0), first_element(p.y, y0), corner.plane, planes);
  __syncthreads();

  const int tx = static_cast<int>(threadIdx.x) % t.patches_x, rest = static_cast<int>(threadIdx.x) / t.patches_x;
  const int ty = rest % t.patches_y, z = rest / t.patches_y;
  const int64_t x = x0 + tx * V, y = y0 + ty * R, plane = corner.plane + z;
  if (x >= p.x.out || y >= p.y.out || plane >= planes) return;
  float w[taps][taps], sum[R][V]{};
#pragma unroll
  for (int i = 0; i < taps * taps; ++i) w[i / taps][i % taps] = shared[i];
  at_phases<up>(p, [&]<int px, int py>() {
    using X = Window<up, down, taps, px, V>;
    using Y = Window<up, down, taps, py, R>;
    const float* from = tile + (z * t.height + ty * step_y) * t.pitch + tx * skewed<step>(step);
#pragma unroll
    for (int iy = 0; iy < Y::size; ++iy, from += t.pitch) {
      float window[X::size];
      read_window<X::size, step>(from, window);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int tap_y = Y::tap(r) + (iy - Y::first(r)) * up;
        if (iy < Y::first(r) || tap_y >= taps) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int j = 0; X::tap(v) + j * up < taps; ++j) {
            sum[r][v] = multiply_add(w[tap_y][X::tap(v) + j * up], window[X::first(v) + j], sum[r][v]);
          }
        }
      }
    }
  });
  S* out = static_cast<S*>(p.out) + (plane * p.y.out + y) * p.x.out;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (y + r < p.y.out) store_outputs(out + r * p.x.out, x, p.x.out, sum[r]);
  }
}

template <class S, int up, int down, int taps>
__global__ void __launch_bounds__(kThreads) lines_kernel(const __grid_constant__ Upfirdn2dParams p, const __grid_constant__ Tiling2d t) {
  constexpr int V = kAcross<S, up>, R = kHigh<up, down>, step = V * down / up, step_y = R * down / up;
  GF_DYNAMIC_SHARED(float, shared);
  float *fx = shared, *fy = fx + taps, *tile = fy + taps, *lines = tile + t.planes * t.height * t.pitch;
  for (int i = static_cast<int>(threadIdx.x); i < taps; i += static_cast<int>(blockDim.x)) {
    fx[i] = static_cast<const float*>(p.fx)[i];
    fy[i] = static_cast<const float*>(p.fy)[i];
  }
  const Corner corner = corner_of(t);
  const int64_t x0 = corner.x * t.patches_x * V, y0 = corner.y * t.patches_y * R, planes = p.batch * p.channels;
  load_tile<S, step>(p, t, tile, first_element(p.x, x0), first_element(p.y, y0), corner.plane, planes);
  __syncthreads();

  const int tx = static_cast<int>(threadIdx.x) % t.patches_x, rest = static_cast<int>(threadIdx.x) / t.patches_x;
  const int ty = rest % t.patches_y, z = rest / t.patches_y;
  at_phases<up>(p, [&]<int px, int>() {
    using X = Window<up, down, taps, px, V>;
    for (int row = rest; row < t.planes * t.height; row += t.patches_y * t.planes) {
      float window[X::size], sum[V]{};
      read_window<X::size, step>(tile + row * t.pitch + tx * skewed<step>(step), window);
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int j = 0; X::tap(v) + j * up < taps; ++j) sum[v] = multiply_add(fx[X::tap(v) + j * up], window[X::first(v) + j], sum[v]);
      }
      float* to = lines + row * t.line_pitch + tx * skewed<V>(V);
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        Vec<float, 4> four;
#pragma unroll
        for (int k = 0; k < 4; ++k) four.unit[k] = sum[v + k];
        *reinterpret_cast<Vec<float, 4>*>(to + v) = four;
      }
    }
  });
  __syncthreads();

  const int64_t x = x0 + tx * V, y = y0 + ty * R, plane = corner.plane + z;
  if (x >= p.x.out || y >= p.y.out || plane >= planes) return;
  float sum[R][V]{};
  at_phases<up>(p, [&]<int, int py>() {
    using Y = Window<up, down, taps, py, R>;
    const float* from = lines + (z * t.height + ty * step_y) * t.line_pitch + tx * skewed<V>(V);
#pragma unroll
    for (int iy = 0; iy < Y::size; ++iy, from += t.line_pitch) {
      float line[V];
      read_window<V, V>(from, line);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int tap_y = Y::tap(r) + (iy - Y::first(r)) * up;
        if (iy < Y::first(r) || tap_y >= taps) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(fy[tap_y], line[v], sum[r][v]);
      }
    }
  });
  S* out = static_cast<S*>(p.out) + (plane * p.y.out + y) * p.x.out;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (y + r < p.y.out) store_outputs(out + r * p.x.out, x, p.x.out, sum[r]);
  }
}

// ---- channels last -----------------------------------------------------------------------------------------------------------

template <int up>
constexpr int kPixels = up == 1 ? 2 : 4;  // of a patch along x; two along y

// A thread takes 16 bytes of channels and a patch of pixels. Its neighbours take the next channels, then the next patch, and meet most of
// the same pixels, in L1.
template <class S, int up, int down, int taps>
__global__ void __launch_bounds__(kThreads) channels_kernel(const __grid_constant__ Upfirdn2dParams p) {
  constexpr int N = kSixteen<S>, W = kPixels<up>, R = 2;
  GF_SHARED(float[taps * taps], filter);
  for (int i = static_cast<int>(threadIdx.x); i < taps * taps; i += static_cast<int>(blockDim.x)) {
    const float* fx = static_cast<const float*>(p.fx);
    filter[i] = p.fy ? fx[i % taps] * static_cast<const float*>(p.fy)[i / taps] : fx[i];
  }
  __syncthreads();
  const unsigned vectors = static_cast<unsigned>(p.channels / N), column = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned patch = column / vectors, vector = column - patch * vectors;
  const int64_t x0 = static_cast<int64_t>(patch) * W, patches_y = (p.y.out + R - 1) / R;
  if (x0 >= p.x.out) return;
  const int64_t left = first_element(p.x, x0);
  for (int64_t unit = blockIdx.y; unit < p.batch * patches_y; unit += gridDim.y) {
    const int64_t image = unit / patches_y, y0 = (unit - image * patches_y) * R, top = first_element(p.y, y0);
    const S* in = static_cast<const S*>(p.in) + image * p.y.in * p.x.in * p.channels + vector * N;
    float sum[R][W][N]{};
    at_phases<up>(p, [&]<int px, int py>() {
      using X = Window<up, down, taps, px, W>;
      using Y = Window<up, down, taps, py, R>;
#pragma unroll 1  // what is loaded for one row is enough in flight, and the registers are few
      for (int iy = 0; iy < Y::size; ++iy) {
        const int64_t y = top + iy;
        Vec<S, N> window[X::size];
#pragma unroll
        for (int ix = 0; ix < X::size; ++ix) {
          const int64_t x = left + ix;
          const bool inside = y >= 0 && y < p.y.in && x >= 0 && x < p.x.in;
          window[ix] = inside ? *reinterpret_cast<const Vec<S, N>*>(in + (y * p.x.in + x) * p.channels) : Vec<S, N>{};
        }
#pragma unroll
        for (int ix = 0; ix < X::size; ++ix) {
          float x[N];
#pragma unroll
          for (int c = 0; c < N; ++c) x[c] = static_cast<float>(widen(window[ix], c));
#pragma unroll
          for (int k = 0; k < R * W; ++k) {
            const int r = k / W, v = k % W;
            const int tap_y = Y::tap(r) + (iy - Y::first(r)) * up, tap_x = X::tap(v) + (ix - X::first(v)) * up;
            if (iy < Y::first(r) || tap_y >= taps || ix < X::first(v) || tap_x >= taps) continue;
            const float w = filter[tap_y * taps + tap_x];
#pragma unroll
            for (int c = 0; c < N; ++c) sum[r][v][c] = multiply_add(w, x[c], sum[r][v][c]);
          }
        }
      }
    });
    S* out = static_cast<S*>(p.out) + image * p.y.out * p.x.out * p.channels + vector * N;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int v = 0; v < W; ++v) {
        if (y0 + r < p.y.out && x0 + v < p.x.out) {
          *reinterpret_cast<Vec<S, N>*>(out + ((y0 + r) * p.x.out + x0 + v) * p.channels) = narrow<S>(sum[r][v]);
        }
      }
    }
  }
}

// ---- any filter --------------------------------------------------------------------------------------------------------------

constexpr int kOutputs = 4;

// A thread computes kOutputs outputs one above the other, of one column of a plane or one channel of a column; neighbouring threads take
// neighbouring addresses. The filter lies in shared memory, the input in L1.
template <class S>
__global__ void __launch_bounds__(kThreads) any_kernel(const __grid_constant__ Upfirdn2dParams p) {
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

constexpr int64_t kMaxGrid = 32768;

void launch_any(const Upfirdn2dParams& p, void* stream) {
  const int64_t depth = p.channels_last ? p.channels : 1, planes = p.channels_last ? p.batch : p.batch * p.channels;
  const int64_t units = planes * ((p.y.out + kOutputs - 1) / kOutputs), width = p.x.out * depth;
  const unsigned block = width >= kThreads ? kThreads : static_cast<unsigned>((width + 31) / 32 * 32);
  const dim3 grid(static_cast<unsigned>((width + block - 1) / block), static_cast<unsigned>(units < kMaxGrid ? units : kMaxGrid));
  const int64_t taps = p.fy ? p.x.taps + p.y.taps : p.x.taps * p.y.taps;
  check(taps <= 6000, "f: got ", taps, " taps, supported: at most 6000 on CUDA");
  visit_dtype(p.dtype,
              [&]<class S>(S) { GF_LAUNCH((any_kernel<S>), grid, dim3(block), static_cast<size_t>(taps) * sizeof(Wide<S>), stream, p); });
}

// ---- launches ----------------------------------------------------------------------------------------------------------------

// Whether `kernel` was launched: not where there would be more blocks than a grid holds.
template <class S, int up, int down, int taps, bool kLines>
bool launch_tiles(const Upfirdn2dParams& p, void* stream) {
  constexpr int V = kAcross<S, up>, R = kHigh<up, down>, step = V * down / up, step_y = R * down / up;
  constexpr int wide = (kWindow<up, down, taps, V> + 3) / 4 * 4, high = kWindow<up, down, taps, R>;
  Tiling2d t{};
  t.patches_x = t.patches_y = t.planes = 1;
  const auto bytes = [&] {
    t.width = (t.patches_x - 1) * step + wide;
    t.height = (t.patches_y - 1) * step_y + high;
    t.pitch = skewed<step>(t.width) + 4;
    t.line_pitch = kLines ? skewed<V>(t.patches_x * V) : 0;
    return 4 * ((kLines ? 2 * taps : taps * taps) + int64_t{t.planes} * t.height * (t.pitch + t.line_pitch));
  };
  // As wide as the picture, up to eight patches, then as high; then several planes of small pictures.
  const auto grows = [&](int& n, bool wanted) {
    while (wanted && 2 * t.patches_x * t.patches_y * t.planes <= kThreads) {
      n *= 2;
      if (bytes() > kMostShared) {
        n /= 2;
        return;
      }
      wanted = &n == &t.patches_x   ? t.patches_x < 8 && t.patches_x * V < p.x.out
               : &n == &t.patches_y ? t.patches_y * R < p.y.out
                                    : t.planes < p.batch * p.channels;
    }
  };
  grows(t.patches_x, V < p.x.out);
  grows(t.patches_y, R < p.y.out);
  if (t.patches_x * V >= p.x.out && t.patches_y * R >= p.y.out) grows(t.planes, p.batch * p.channels > 1);
  const auto shared = static_cast<size_t>(bytes());
  const auto reciprocal = [](int64_t n) { return static_cast<uint32_t>(((int64_t{1} << 32) + n - 1) / n); };
  t.shift = kUnit<S> == 2 ? static_cast<int>(first_element(p.x, 0) & 1) : 0;  // a step is even, so that all tiles begin alike
  t.units = (t.width + t.shift + kUnit<S> - 1) / kUnit<S>;
  t.by_units = reciprocal(t.units);
  t.by_height = reciprocal(t.height);
  t.tiles_x = (p.x.out + t.patches_x * V - 1) / (t.patches_x * V);
  t.tiles_y = (p.y.out + t.patches_y * R - 1) / (t.patches_y * R);
  const int64_t blocks = t.tiles_x * t.tiles_y * ((p.batch * p.channels + t.planes - 1) / t.planes);
  if (blocks > INT32_MAX) return false;
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(t.patches_x * t.patches_y * t.planes));
  if constexpr (kLines) {
    GF_LAUNCH((lines_kernel<S, up, down, taps>), grid, block, shared, stream, p, t);
  } else {
    GF_LAUNCH((tile_kernel<S, up, down, taps>), grid, block, shared, stream, p, t);
  }
  return true;
}

template <class S, int up, int down, int taps>
bool launch_channels(const Upfirdn2dParams& p, void* stream) {
  constexpr int N = kSixteen<S>, W = kPixels<up>;
  const int64_t columns = (p.x.out + W - 1) / W * (p.channels / N), units = p.batch * ((p.y.out + 1) / 2);
  const auto places = reinterpret_cast<uintptr_t>(p.in) | reinterpret_cast<uintptr_t>(p.out);
  if (p.channels % N || places % 16 || columns > INT32_MAX - kThreads) return false;
  const dim3 grid(static_cast<unsigned>((columns + kThreads - 1) / kThreads), static_cast<unsigned>(units < kMaxGrid ? units : kMaxGrid));
  GF_LAUNCH((channels_kernel<S, up, down, taps>), grid, dim3(kThreads), 0, stream, p);
  return true;
}

template <class S, int up, int down>
bool launch_known(const Upfirdn2dParams& p, void* stream) {
  const auto all = [&](int64_t taps) {
    return p.x.up == up && p.y.up == up && p.x.down == down && p.y.down == down && p.x.taps == taps && p.y.taps == taps;
  };
  if (all(4)) return p.channels_last ? launch_channels<S, up, down, 4>(p, stream) : launch_tiles<S, up, down, 4, false>(p, stream);
  if constexpr (up != down) {
    if (all(12) && p.fy && !p.channels_last) return launch_tiles<S, up, down, 12, true>(p, stream);
  }
  return false;
}

}  // namespace

void launch_upfirdn2d_cuda(const Upfirdn2dParams& p, void* stream) {
  const bool launched = visit_dtype(p.dtype, [&]<class S>(S) {
    if constexpr (sizeof(S) == 8) {
      return false;
    } else {
      return launch_known<S, 2, 1>(p, stream) || launch_known<S, 1, 2>(p, stream) || launch_known<S, 1, 1>(p, stream);
    }
  });
  if (!launched) launch_any(p, stream);
}

}  // namespace genfast
