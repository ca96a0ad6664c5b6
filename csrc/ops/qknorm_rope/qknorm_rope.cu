// qknorm_rope on CUDA (docs/attention.md): a team of lanes, part of a warp, takes the heads of one token that are normalised together.
// What it reads again it finds in the first-level cache.
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

constexpr int kThreads = 128;

template <class S, bool kVector>
constexpr int kWidth = kVector ? 16 / static_cast<int>(sizeof(S)) : 2;  // elements that a lane takes at a time

struct Team {
  int lanes, lane;  // a power of two, at most 32
  unsigned mask;
};
__device__ __forceinline__ Team team_of(int lanes) {
  const int lane = static_cast<int>(threadIdx.x) % 32, first = lane - lane % lanes;
  return {lanes, lane % lanes, (lanes == 32 ? ~0u : (1u << lanes) - 1) << first};
}
template <class T>
__device__ __forceinline__ T team_sum(const Team& team, T v) {
  for (int s = team.lanes / 2; s >= 1; s /= 2) v += __shfl_xor_sync(team.mask, v, s);
  return v;
}

__device__ __forceinline__ float inverse_root(float a) {
  return rsqrtf(a);
}
__device__ __forceinline__ double inverse_root(double a) {
  return div(1.0, sqrt_rn(a));
}

// N elements of the arithmetic's type, of which `count` are there.
template <bool kVector, class T, int N>
__device__ __forceinline__ void load_wide(const T* from, int count, T (&v)[N]) {
  constexpr int n = N * sizeof(T) < 16 ? N : static_cast<int>(16 / sizeof(T));
#pragma unroll
  for (int i = 0; i < N; i += n) {
    if constexpr (kVector) {
      const auto part = *reinterpret_cast<const Vec<T, n>*>(from + i);
#pragma unroll
      for (int j = 0; j < n; ++j) v[i + j] = part.unit[j];
    } else {
#pragma unroll
      for (int j = i; j < i + n; ++j) v[j] = j < count ? from[j] : T(0);
    }
  }
}

// Some heads of one token, on one side.
template <class S>
struct Heads {
  using T = Wide<S>;
  const QkSide& side;
  int64_t b, n, first, last;
  const T *cos, *sin;

  __device__ __forceinline__ const S* x(int64_t h) const { return static_cast<const S*>(side.x) + row_at(side.x_at, b, h, n); }
  __device__ __forceinline__ const S* grad(int64_t h) const { return static_cast<const S*>(side.grad) + row_at(side.grad_at, b, h, n); }
  __device__ __forceinline__ S* out(int64_t h) const { return static_cast<S*>(side.out) + row_at(side.out_at, b, h, n); }
  __device__ __forceinline__ const T* of(const void* weights, int64_t h, int64_t d) const {
    return weights ? static_cast<const T*>(weights) + (side.weight_heads > 1 ? h * d : 0) : nullptr;
  }
};
template <class S>
__device__ __forceinline__ Heads<S> heads_of(const QkNormRopeParams& p, int64_t token, int group) {
  using T = Wide<S>;
  const int s = group >= (p.across_heads ? 1 : static_cast<int>(p.side[0].heads));
  const int64_t b = token / p.tokens, n = token % p.tokens, first = p.across_heads ? 0 : group - (s ? p.side[0].heads : 0);
  const int64_t at = b * p.table_b + n * p.table_n;
  return {p.side[s],
          b,
          n,
          first,
          p.across_heads ? p.side[s].heads : first + 1,
          static_cast<const T*>(p.cos) + at,
          static_cast<const T*>(p.sin) + at};
}

template <class T>
struct Moments {
  T mean = 0, inverse = 1;
};
template <class S, bool kVector>
__device__ __forceinline__ Moments<Wide<S>> moments_of(const QkNormRopeParams& p, const Team& team, const Heads<S>& heads) {
  using T = Wide<S>;
  constexpr int N = kWidth<S, kVector>;
  Moments<T> m;
  if (p.norm == QkNorm::None) return m;
  const T count = static_cast<T>((heads.last - heads.first) * p.head_dim);
  const auto sum_of = [&](auto term) {
    T sum = 0;
    for (int64_t h = heads.first; h < heads.last; ++h) {
      for (int64_t i = team.lane * N; i < p.head_dim; i += team.lanes * N) {
        const auto span = span_at<N, kVector>(i, p.head_dim);
        const auto v = load(heads.x(h), span);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (j < span.count) sum += term(widen(v, j));
        }
      }
    }
    return team_sum(team, sum);
  };
  if (p.norm == QkNorm::Layer) m.mean = sum_of([](T v) { return v; }) / count;
  m.inverse = inverse_root(sum_of([&](T v) { return (v - m.mean) * (v - m.mean); }) / count + static_cast<T>(p.eps));
  return m;
}

// What one lane holds at a time: kParts runs of up to N elements. Two runs are the halves of pairs (i, i + rotary / 2).
template <class S, int kParts, bool kVector>
struct Piece {
  using T = Wide<S>;
  static constexpr int N = kWidth<S, kVector>;
  Span<N, kVector> span[kParts];

  __device__ __forceinline__ int64_t at(int part) const { return span[part].element; }
  __device__ __forceinline__ int count() const { return span[0].count; }
  __device__ __forceinline__ void read(const S* row, T (&v)[kParts][N]) const {
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const auto part = load(row, span[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) v[k][j] = widen(part, j);
    }
  }
  __device__ __forceinline__ void write(S* row, const T (&v)[kParts][N]) const {
#pragma unroll
    for (int k = 0; k < kParts; ++k) store(row, span[k], narrow<S>(v[k]));
  }
  __device__ __forceinline__ void weights(const T* row, T (&v)[kParts][N]) const {
#pragma unroll
    for (int k = 0; k < kParts; ++k) load_wide<kVector>(row + at(k), count(), v[k]);
  }
  // By the angles, or, sign = -1, back.
  __device__ __forceinline__ void turn(const QkNormRopeParams& p, const Heads<S>& heads, T sign, T (&v)[kParts][N]) const {
    if constexpr (kParts == 2) {
      T c[N], s[N];
      load_wide<kVector>(heads.cos + at(0), count(), c);
      load_wide<kVector>(heads.sin + at(0), count(), s);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const T a = v[0][j], b = v[1][j], t = sign * s[j];
        v[0][j] = a * c[j] - b * t;
        v[1][j] = a * t + b * c[j];
      }
    } else if (p.interleaved && at(0) < p.rotary) {
      T c[N / 2], s[N / 2];
      const int pairs = static_cast<int>(p.rotary - at(0) < N ? p.rotary - at(0) : N) / 2;
      load_wide<kVector>(heads.cos + at(0) / 2, pairs, c);
      load_wide<kVector>(heads.sin + at(0) / 2, pairs, s);
#pragma unroll
      for (int j = 0; j < N / 2; ++j) {
        if (j >= pairs) break;
        const T a = v[0][2 * j], b = v[0][2 * j + 1], t = sign * s[j];
        v[0][2 * j] = a * c[j] - b * t;
        v[0][2 * j + 1] = a * t + b * c[j];
      }
    }
  }
};

// The pieces of a row that are this lane's: for every row the same.
template <class S, bool kVector, class F>
__device__ __forceinline__ void for_pieces(const QkNormRopeParams& p, const Team& team, F f) {
  constexpr int N = kWidth<S, kVector>;
  const int64_t half = p.interleaved ? 0 : p.rotary / 2;
  for (int64_t i = team.lane * N; i < half; i += team.lanes * N) {
    Piece<S, 2, kVector> piece{{span_at<N, kVector>(i, half), span_at<N, kVector>(half + i, 2 * half)}};
    f(piece);
  }
  for (int64_t i = 2 * half + team.lane * N; i < p.head_dim; i += team.lanes * N) {
    Piece<S, 1, kVector> piece{{span_at<N, kVector>(i, p.head_dim)}};
    f(piece);
  }
}

template <class S, bool kVector>
__global__ void __launch_bounds__(128) forward_kernel(const __grid_constant__ QkNormRopeParams p, int groups, int lanes) {
  using T = Wide<S>;
  const Team team = team_of(lanes);
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  if (unit >= p.batch * p.tokens * groups) return;
  const Heads<S> heads = heads_of<S>(p, unit / groups, static_cast<int>(unit % groups));
  const Moments<T> m = moments_of<S, kVector>(p, team, heads);
  for (int64_t h = heads.first; h < heads.last; ++h) {
    const T *weight = heads.of(heads.side.weight, h, p.head_dim), *bias = heads.of(heads.side.bias, h, p.head_dim);
    for_pieces<S, kVector>(p, team, [&]<int kParts>(const Piece<S, kParts, kVector>& piece) {
      constexpr int N = kWidth<S, kVector>;
      T v[kParts][N], w[kParts][N];
      piece.read(heads.x(h), v);
      if (weight) piece.weights(weight, w);
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          v[k][j] = (v[k][j] - m.mean) * m.inverse;
          if (weight) v[k][j] *= w[k][j];
        }
      }
      if (bias) {
        piece.weights(bias, w);
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
#pragma unroll
          for (int j = 0; j < N; ++j) v[k][j] += w[k][j];
        }
      }
      piece.turn(p, heads, T(1), v);
      piece.write(heads.out(h), v);
    });
  }
}

// As backward_of in qknorm_rope_cpu_impl.h. A team takes a chunk of tokens and adds the gradients of the weights up in `sums`, where every
// element is one lane's; in shared memory where they fit, else right in the workspace.
template <class S, bool kVector>
__global__ void __launch_bounds__(128, kVector ? 3 : 4)
    backward_kernel(const __grid_constant__ QkNormRopeParams p, int groups, int lanes, bool share) {
  using T = Wide<S>;
  constexpr int N = kWidth<S, kVector>;
  GF_DYNAMIC_SHARED(T, shared);
  const Team team = team_of(lanes);
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  const int64_t d = p.head_dim, tokens = p.batch * p.tokens, chunk = qk_chunk(tokens), chunks = qk_chunks(tokens);
  if (unit >= chunks * groups) return;
  const int group = static_cast<int>(unit % groups);
  const int64_t begin = unit / groups * chunk, end = begin + chunk < tokens ? begin + chunk : tokens;

  const Heads<S> some = heads_of<S>(p, begin, group);
  const QkSide& side = some.side;
  const int64_t stride = chunks * side.heads * d;  // from the sums of the weight to those of the bias
  T* workspace = nullptr;
  if (side.sums) {
    const int64_t before = &side == p.side ? 0 : 2 * chunks * p.side[0].heads * d;
    workspace = static_cast<T*>(p.partial) + before + (unit / groups * side.heads + some.first) * d;
  }
  T* const own = share ? shared + static_cast<int64_t>(threadIdx.x) / lanes * 2 * d : workspace;
  const int64_t own_stride = share ? d : stride;
  const auto for_sums = [&](auto f) {  // every element that is this lane's
    for (int64_t h = some.first; h < some.last && side.sums; ++h) {
      for_pieces<S, kVector>(p, team, [&]<int kParts>(const Piece<S, kParts, kVector>& piece) {
        for (int k = 0; k < kParts; ++k) {
          for (int j = 0; j < piece.count(); ++j) f((h - some.first) * d + piece.at(k) + j);
        }
      });
    }
  };
  for_sums([&](int64_t i) { own[i] = own[own_stride + i] = T(0); });

  for (int64_t token = begin; token < end; ++token) {
    const Heads<S> heads = heads_of<S>(p, token, group);
    const Moments<T> m = moments_of<S, kVector>(p, team, heads);
    // f(dy, u, g, piece) at each of this lane's pieces of head h
    const auto for_terms = [&](int64_t h, auto f) {
      const T* weight = heads.of(side.weight, h, d);
      for_pieces<S, kVector>(p, team, [&]<int kParts>(const Piece<S, kParts, kVector>& piece) {
        T dy[kParts][N], u[kParts][N], g[kParts][N];
        piece.read(heads.grad(h), dy);
        piece.turn(p, heads, T(-1), dy);
        piece.read(heads.x(h), u);
        if (weight) piece.weights(weight, g);
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            u[k][j] = (u[k][j] - m.mean) * m.inverse;
            g[k][j] = weight ? dy[k][j] * g[k][j] : dy[k][j];
          }
        }
        f(piece, dy, u, g);
      });
    };
    T mean_g = 0, mean_gu = 0;
    if (p.norm != QkNorm::None) {
      for (int64_t h = heads.first; h < heads.last; ++h) {
        for_terms(h, [&]<int kParts>(const Piece<S, kParts, kVector>& piece, const T(&)[kParts][N], const T(&u)[kParts][N],
                                     const T(&g)[kParts][N]) {
#pragma unroll
          for (int k = 0; k < kParts; ++k) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
              if (j >= piece.count()) break;
              mean_g += g[k][j];
              mean_gu += g[k][j] * u[k][j];
            }
          }
        });
      }
      const T count = static_cast<T>((heads.last - heads.first) * d);
      mean_g = p.norm == QkNorm::Layer ? team_sum(team, mean_g) / count : T(0);
      mean_gu = team_sum(team, mean_gu) / count;
    }
    for (int64_t h = heads.first; h < heads.last; ++h) {
      for_terms(h,
                [&]<int kParts>(const Piece<S, kParts, kVector>& piece, const T(&dy)[kParts][N], const T(&u)[kParts][N], T(&g)[kParts][N]) {
#pragma unroll
                  for (int k = 0; k < kParts; ++k) {
                    T* const sums = own + (h - heads.first) * d + piece.at(k);
#pragma unroll
                    for (int j = 0; j < N; ++j) {
                      g[k][j] = (g[k][j] - mean_g - u[k][j] * mean_gu) * m.inverse;
                      if (!side.sums || j >= piece.count()) continue;
                      sums[j] += dy[k][j] * u[k][j];
                      if (side.bias) sums[own_stride + j] += dy[k][j];
                    }
                  }
                  piece.write(heads.out(h), g);
                });
    }
  }
  if (share) {
    for_sums([&](int64_t i) {
      workspace[i] = own[i];
      workspace[stride + i] = own[d + i];
    });
  }
}

constexpr int kColumns = 32, kRowLanes = 32;

// Adds up one side's partial sums, (2, rows, d), in a fixed order. A block takes 32 columns of the weight's or the bias's; the rows are
// (chunks, heads), of which those of one weight lie `step` apart.
template <class T>
__global__ void __launch_bounds__(1024) sums_kernel(double* sums, const T* partial, int64_t rows, int64_t step, int64_t d) {
  GF_SHARED(double[kRowLanes][kColumns], lanes);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + x, which = blockIdx.z;
  double total = 0;
  if (column < d) {
    for (int64_t row = blockIdx.y + y * step; row < rows; row += kRowLanes * step) total += partial[(which * rows + row) * d + column];
  }
  lanes[y][x] = total;
  __syncthreads();
  for (int s = kRowLanes / 2; s >= 1; s /= 2) {
    if (y < s) lanes[y][x] = add(lanes[y][x], lanes[y + s][x]);
    __syncthreads();
  }
  if (y == 0 && column < d) sums[(which * gridDim.y + blockIdx.y) * d + column] = lanes[0][x];
}

bool rows_aligned(const void* data, const QkRows& at, DType dtype, int n) {
  return !data || (vector_aligned(data, dtype, n) && at.b % n == 0 && at.h % n == 0 && at.n % n == 0);
}

template <class S>
void launch(const QkNormRopeParams& p, void* stream) {
  using T = Wide<S>;
  constexpr int N = kWidth<S, true>;
  const int64_t half = p.interleaved ? 0 : p.rotary / 2, rest = p.head_dim - 2 * half, tokens = p.batch * p.tokens;
  const DType wide = p.dtype == DType::F64 ? DType::F64 : DType::F32;
  bool vector = p.head_dim % N == 0 && half % N == 0 && (!p.interleaved || p.rotary % N == 0);
  vector = vector && vector_aligned(p.cos, wide, N) && vector_aligned(p.sin, wide, N);
  int groups = 0;
  for (const QkSide& side : p.side) {
    vector = vector && rows_aligned(side.x, side.x_at, p.dtype, N) && rows_aligned(side.out, side.out_at, p.dtype, N) &&
             rows_aligned(side.grad, side.grad_at, p.dtype, N) && vector_aligned(side.weight, wide, N) &&
             vector_aligned(side.bias, wide, N);
    groups += side.heads == 0 ? 0 : p.across_heads ? 1 : static_cast<int>(side.heads);
  }
  int lanes = 1;
  while (lanes < 32 && lanes * (vector ? N : kWidth<S, false>) < (half > rest ? half : rest)) lanes *= 2;
  const int64_t teams = kThreads / lanes;
  const auto blocks = [&](int64_t units) { return dim3(static_cast<unsigned>((units + teams - 1) / teams)); };
  if (!p.side[0].grad) {
    if (vector) {
      GF_LAUNCH((forward_kernel<S, true>), blocks(tokens * groups), dim3(kThreads), 0, stream, p, groups, lanes);
    } else {
      GF_LAUNCH((forward_kernel<S, false>), blocks(tokens * groups), dim3(kThreads), 0, stream, p, groups, lanes);
    }
    return;
  }
  const int64_t chunks = qk_chunks(tokens);
  const int64_t bytes = p.partial && !p.across_heads ? teams * 2 * p.head_dim * static_cast<int64_t>(sizeof(T)) : 0;
  const bool share = bytes > 0 && bytes <= 48 * 1024;
  const size_t shared = share ? static_cast<size_t>(bytes) : 0;
  if (vector) {
    GF_LAUNCH((backward_kernel<S, true>), blocks(chunks * groups), dim3(kThreads), shared, stream, p, groups, lanes, share);
  } else {
    GF_LAUNCH((backward_kernel<S, false>), blocks(chunks * groups), dim3(kThreads), shared, stream, p, groups, lanes, share);
  }
  const T* partial = static_cast<const T*>(p.partial);
  for (const QkSide& side : p.side) {
    const int64_t rows = chunks * side.heads;
    if (side.sums) {
      const dim3 grid(static_cast<unsigned>((p.head_dim + kColumns - 1) / kColumns), static_cast<unsigned>(side.weight_heads), 2);
      GF_LAUNCH((sums_kernel<T>), grid, dim3(kColumns, kRowLanes), 0, stream, side.sums, partial, rows, side.weight_heads, p.head_dim);
    }
    partial += 2 * rows * p.head_dim;
  }
}

}  // namespace

void launch_qknorm_rope_cuda(const QkNormRopeParams& p, void* stream) {
  visit_dtype(p.dtype, [&]<class S>(S) { launch<S>(p, stream); });
}

}  // namespace genfast
