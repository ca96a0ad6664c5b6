// The solver step of docs/solver-step.md on CUDA. The row is read on the device, so one captured launch serves every row of a plan.
// Affine rows are one launch. Rescale and threshold add a launch each before it, three in all:
//   rescale_sums   sums of the fixed tree, one block a chunk
//   sample_scalars one block a sample: the rescale factor; the quantile, by radix select over the bits of |d|
//   apply          everything else
#include "../../core/philox.h"
#include "../../core/reduce.cuh"
#include "../../core/vec.cuh"
#include "params.h"

namespace genfast {
namespace {

constexpr int kSelectThreads = 1024;
constexpr int kDigitBits = 11;

// A row as the kernels read it. Which terms are present lies in one word, so that a thread asks without holding coefficients in registers.
template <class T>
struct Row {
  T coef[kTerms * kMaxOutputs];  // by term, then by output
  T scalar[kCoef];
  int64_t index[kRowInts];
  int64_t number;
  uint32_t present;  // bit kMaxOutputs * term + output: that coefficient is not zero

  __device__ __forceinline__ bool uses(int term) const { return present >> kMaxOutputs * term & ((1u << kMaxOutputs) - 1); }
};

// Called by all threads of a block of at least one warp; the first warp reads.
template <class T>
__device__ __forceinline__ void read_row(const SolverStepParams& p, Row<T>& row) {
  static_assert(kTerms * kMaxOutputs <= 32);
  const int lane = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  if (lane < 32) {
    const int term = lane / kMaxOutputs, output = lane % kMaxOutputs;
    const int64_t number = *p.counter;
    const T* coef = static_cast<const T*>(p.coef) + number * kRowFloats;
    const int64_t* index = p.index + number * kRowInts;
    const bool is_history = term >= kTermH && term < kTermNoise;
    const bool exists = term < kTerms && output < index[kNumOut] && (!is_history || term - kTermH < index[kNumHist]);
    T c = term < kTerms ? coef[kCoef + output * kTerms + term] : T(0);  // loaded at once, not after the counts
    if (!exists) c = T(0);
    const uint32_t present = __ballot_sync(~0u, c != 0);
    if (term < kTerms) row.coef[lane] = c;
    if (lane < kCoef) row.scalar[lane] = coef[lane];
    if (lane < kRowInts) row.index[lane] = index[lane];
    if (lane == 0) {
      row.number = number;
      row.present = present;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ double* sample_workspace(const SolverStepParams& p, int64_t b) {
  return p.workspace + b * workspace_doubles(1, p.per_sample);
}

// Calls f with a value of the model output's storage type. A float64 output comes with a float64 state only.
template <class T, class F>
__device__ __forceinline__ void visit_model(DType dtype, F&& f) {
  visit_dtype(dtype, [&]<class S>(S s) {
    if constexpr (std::is_same_v<T, double> || !std::is_same_v<S, double>) f(s);
  });
}

template <class T>
__device__ __forceinline__ T guide(T guidance, T cond, T uncond) {
  return add(uncond, mul(guidance, sub(cond, uncond)));
}

// m before rescale, of one element and of a span.
template <class T>
__device__ __forceinline__ T guided(const SolverStepParams& p, T guidance, int64_t i) {
  T m{};
  visit_model<T>(p.model, [&]<class S>(S) {
    m = widen(static_cast<const S*>(p.cond)[i]);
    if (p.uncond) m = guide<T>(guidance, m, widen(static_cast<const S*>(p.uncond)[i]));
  });
  return m;
}

template <class T, int N, bool kVector>
__device__ __forceinline__ void guided(const SolverStepParams& p, T guidance, int64_t offset, const Span<N, kVector>& span, T (&m)[N]) {
  visit_model<T>(p.model, [&]<class S>(S) {
    const auto cond = load(static_cast<const S*>(p.cond) + offset, span);
    if (p.uncond) {
      const auto uncond = load(static_cast<const S*>(p.uncond) + offset, span);
#pragma unroll
      for (int i = 0; i < N; ++i) m[i] = guide<T>(guidance, widen(cond, i), widen(uncond, i));
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) m[i] = widen(cond, i);
    }
  });
}

// d up to and with clip.
template <class T>
__device__ __forceinline__ T denoised(const T (&scalar)[kCoef], T x, T m) {
  const T ax = scalar[kAx], am = scalar[kAm], clip = scalar[kClip];
  T d = T(0);
  if (ax != 0) d = mul(ax, x);
  if (am != 0) d = ax != 0 ? add(d, mul(am, m)) : mul(am, m);
  return clip != 0 ? clamp_keep_nan(d, -clip, clip) : d;
}

template <class T>
__device__ __forceinline__ bool rescales(const SolverStepParams& p, const Row<T>& row) {
  return p.rescale && p.uncond && row.scalar[kRescale] != 0;
}
template <class T>
__device__ __forceinline__ bool thresholds(const SolverStepParams& p, const Row<T>& row) {
  return p.threshold && row.scalar[kQuantile] != 0;
}

// ---- apply -----------------------------------------------------------------------------------------

template <class T, int N>
__device__ __forceinline__ void accumulate(T (&sum)[kMaxOutputs][N], const Row<T>& row, int term, const T (&value)[N]) {
#pragma unroll
  for (int k = 0; k < kMaxOutputs; ++k) {
    if (row.present >> (kMaxOutputs * term + k) & 1) {
      const T c = row.coef[kMaxOutputs * term + k];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[k][i] = add(sum[k][i], mul(c, value[i]));
    }
  }
}

template <class T, int N, bool kVector>
__device__ __forceinline__ void store_model_input(const SolverStepParams& p, T c_in, int64_t b, const Span<N, kVector>& span,
                                                  const T (&state)[N]) {
  T scaled[N];
#pragma unroll
  for (int i = 0; i < N; ++i) scaled[i] = mul(c_in, state[i]);
  visit_dtype(p.input, [&]<class S>(S) {
    const auto raw = narrow<S>(scaled);
#pragma unroll 1
    for (int copy = 0; copy < p.copies; ++copy) {
      store(static_cast<S*>(p.model_input) + (copy * p.batch + b) * p.per_sample, span, raw);
    }
  });
}

// Elements of one thread: whole quads of the noise; as vectors, one 16-byte access to the state (two for float64).
template <class S, bool kVector>
constexpr int kElements = kVector && sizeof(S) == 2 ? 8 : 4;
// Registers are capped so that enough threads are resident to keep memory busy.
template <class S>
constexpr int kBlocksPerSM = sizeof(S) == 4 ? 3 : 1;

template <class S, bool kVector>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerSM<S>) apply_kernel(const __grid_constant__ SolverStepParams p) {
  using T = Wide<S>;
  constexpr int N = kElements<S, kVector>;
  GF_SHARED(Row<T>, row);
  read_row(p, row);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group * N >= p.per_sample) return;
  const auto span = span_of<N, kVector>(group, p.per_sample, p.channels);
  const bool use_d = row.uses(kTermD);
  const bool use_m = row.uses(kTermM) || (use_d && row.scalar[kAm] != 0);
  const bool use_x = row.uses(kTermX) || (use_d && row.scalar[kAx] != 0);

  for (int64_t b = first_sample(); b < p.batch; b = next_sample(b)) {
    const int64_t offset = b * p.per_sample;
    const auto load_history = [&](int j) { return load(static_cast<const S*>(p.slot[row.index[kHistSlot + j]]) + offset, span); };
    Vec<S, N> raw_x{}, raw_h[kMaxHistory]{};
    if (use_x) raw_x = load(static_cast<const S*>(p.slot[0]) + offset, span);
    if constexpr (kVector) {  // the loads of all terms are under way before the first is used
#pragma unroll
      for (int j = 0; j < kMaxHistory; ++j) {
        if (row.uses(kTermH + j)) raw_h[j] = load_history(j);
      }
    }
    T m[N]{};
    if (use_m) {
      guided(p, row.scalar[kGuidance], offset, span, m);
      if (rescales(p, row)) {
        const T r = static_cast<T>(sample_workspace(p, b)[0]);
#pragma unroll
        for (int i = 0; i < N; ++i) m[i] = mul(m[i], r);
      }
    }

    // A sum that starts from -0 equals one that starts from its first term, bit for bit: -0 + v = v for every v. No term at all gives +0.
    T sum[kMaxOutputs][N];
#pragma unroll
    for (int k = 0; k < kMaxOutputs; ++k) {
      constexpr uint32_t kEveryTerm = 0x09249249u;  // bits 0, 3, 6, ..., 27
      static_assert(kMaxOutputs == 3 && kTerms == 10);
      const bool any = row.present >> k & kEveryTerm;
#pragma unroll
      for (int i = 0; i < N; ++i) sum[k][i] = any ? T(-0.0) : T(0.0);
    }
    T x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = widen(raw_x, i);
    accumulate(sum, row, kTermX, x);
    if (use_d) {
      T d[N];
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] = denoised(row.scalar, x[i], m[i]);
      if (thresholds(p, row)) {
        const T s = static_cast<T>(sample_workspace(p, b)[1]);
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = div(clamp_keep_nan(d[i], -s, s), s);
      }
      accumulate(sum, row, kTermD, d);
    }
    accumulate(sum, row, kTermM, m);
#pragma unroll
    for (int j = 0; j < kMaxHistory; ++j) {
      if (row.uses(kTermH + j)) {
        if constexpr (!kVector) raw_h[j] = load_history(j);
        T h[N];
#pragma unroll
        for (int i = 0; i < N; ++i) h[i] = widen(raw_h[j], i);
        accumulate(sum, row, kTermH + j, h);
      }
    }
    if (row.uses(kTermNoise)) {
      T noise[N];
#pragma unroll
      for (int quad = 0; quad < N / 4; ++quad) {
        // Whether a row draws is known on the device alone, too late to refuse it: without seeds its noise is NaN, never an unseeded draw.
        const Normals n = p.seeds ? normals(p.seeds[b], 0, static_cast<uint32_t>(row.index[kDraw]), span.element / 4 + quad)
                                  : Normals{{NAN, NAN, NAN, NAN}};
#pragma unroll
        for (int i = 0; i < 4; ++i) noise[4 * quad + i] = n.z[i];
      }
      accumulate(sum, row, kTermNoise, noise);
    }

#pragma unroll
    for (int k = 0; k < kMaxOutputs; ++k) {
      if (k >= row.index[kNumOut]) break;
      const auto rounded = narrow<S>(sum[k]);
      store(static_cast<S*>(p.slot[row.index[kOutSlot + k]]) + offset, span, rounded);
      if (k == 0) {
        T state[N];
        bool finite = true;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          state[i] = widen(rounded, i);
          finite &= state[i] - state[i] == 0 || i >= span.count;
        }
        if (p.model_input && row.scalar[kNextCIn] != 0) store_model_input(p, row.scalar[kNextCIn], b, span, state);
        if (p.watch && !finite) atomicMin(reinterpret_cast<long long*>(p.watch + b), static_cast<long long>(row.number));
      }
    }
  }
}

// ---- rescale and threshold ---------------------------------------------------------------------------

// Sums of one chunk: cond, cond^2, guided, guided^2.
template <class T>
__global__ void __launch_bounds__(kFoldLanes, 4) rescale_sums_kernel(const __grid_constant__ SolverStepParams p) {
  GF_SHARED(Row<T>, row);
  GF_SHARED(Lanes<4>, lanes);
  read_row(p, row);
  if (!rescales(p, row)) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    double sum[4] = {0.0, 0.0, 0.0, 0.0};
#pragma unroll 4
    for (int j = 0; j < kChunk / kFoldLanes; ++j) {
      const int64_t e = blockIdx.x * kChunk + j * kFoldLanes + threadIdx.x;
      if (e >= p.per_sample) break;
      double c = 0.0;
      visit_model<T>(p.model, [&]<class S>(S) { c = widen(static_cast<const S*>(p.cond)[b * p.per_sample + e]); });
      const double g = guided(p, row.scalar[kGuidance], b * p.per_sample + e);
      sum[0] = add(sum[0], c);
      sum[1] = add(sum[1], mul(c, c));
      sum[2] = add(sum[2], g);
      sum[3] = add(sum[3], mul(g, g));
    }
    fold(sum, lanes);
    if (threadIdx.x == 0) {
      double* chunk = sample_workspace(p, b) + 2 + 4 * static_cast<int64_t>(blockIdx.x);
      for (int k = 0; k < 4; ++k) chunk[k] = sum[k];
    }
  }
}

__device__ __forceinline__ double standard_deviation(double sum, double squares, double n) {
  const double variance = div(sub(squares, div(mul(sum, sum), n)), sub(n, 1.0));
  return sqrt_rn(variance < 0.0 ? 0.0 : variance);
}

__device__ __forceinline__ uint32_t magnitude_bits(float a) {
  return as_bits(a) & 0x7fffffffu;
}
__device__ __forceinline__ uint64_t magnitude_bits(double a) {
  uint64_t bits;
  memcpy(&bits, &a, sizeof bits);
  return bits & 0x7fffffffffffffffu;
}
__device__ __forceinline__ float from_bits(uint32_t bits) {
  return as_float(bits);
}
__device__ __forceinline__ double from_bits(uint64_t bits) {
  double a;
  memcpy(&a, &bits, sizeof a);
  return a;
}

constexpr int kDigits = 1 << kDigitBits;
constexpr int kDigitsPerLane = kDigits / 32;

struct Selection {
  unsigned count[kDigits + 32];  // one spare element after each lane's digits, so that the lanes of find_digit read from different banks
  unsigned lane_count[32];
  unsigned digit;  // found in this pass
  unsigned below;  // elements with the same higher digits and a smaller digit
  unsigned equal;  // elements with this digit
  bool has_nan;
  unsigned long long above;  // smallest bits above the selected element's

  __device__ __forceinline__ unsigned& count_of(unsigned d) { return count[d + d / kDigitsPerLane]; }
};

// Which digit holds the element of the given rank. Called by all threads; the first warp works.
__device__ __forceinline__ void find_digit(Selection& s, unsigned rank) {
  if (threadIdx.x < 32) {
    const unsigned lane = threadIdx.x, first = lane * kDigitsPerLane;
    unsigned own = 0;
#pragma unroll 8
    for (unsigned i = 0; i < kDigitsPerLane; ++i) own += s.count_of(first + i);
    s.lane_count[lane] = own;
    __syncwarp();
    unsigned below = 0;
    for (unsigned l = 0; l < lane; ++l) below += s.lane_count[l];
    if (rank >= below && rank - below < own) {
      unsigned digit = first;
      while (rank - below >= s.count_of(digit)) below += s.count_of(digit++);
      s.digit = digit;
      s.below = below;
      s.equal = s.count_of(digit);
    }
  }
  __syncthreads();
}

// The quantile of |d| over one sample, interpolated linearly; the same value in every thread. each(f) calls f(d) for this thread's
// elements.
template <class T, class Each>
__device__ __forceinline__ T select_quantile(Selection& s, T q, int64_t n, Each each) {
  using Bits = decltype(magnitude_bits(T{}));
  const T rank = mul(q, static_cast<T>(n - 1));
  const int64_t low = rank < static_cast<T>(n - 1) ? static_cast<int64_t>(rank) : n - 1;
  const T w = sub(rank, static_cast<T>(low));
  const Bits infinity = magnitude_bits(static_cast<T>(INFINITY));

  if (threadIdx.x == 0) {
    s.has_nan = false;
    s.above = ~0ull;
  }
  unsigned left = static_cast<unsigned>(low);  // rank among the elements that share the digits found so far
  Bits found = 0;
  for (int high = sizeof(T) * 8 - 1; high > 0;) {
    const int width = high < kDigitBits ? high : kDigitBits, shift = high - width;
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += static_cast<int>(blockDim.x)) s.count_of(i) = 0;
    __syncthreads();
    each([&](T d) {
      const Bits bits = magnitude_bits(d);
      if (bits > infinity) s.has_nan = true;
      if (bits >> high == found >> high) atomicAdd(&s.count_of(static_cast<unsigned>(bits >> shift) & ((1u << width) - 1)), 1u);
    });
    __syncthreads();
    find_digit(s, left);
    found |= static_cast<Bits>(s.digit) << shift;
    left -= s.below;
    high = shift;
  }
  if (s.has_nan) return static_cast<T>(NAN);
  const T a = from_bits(found);
  T b = a;
  if (low + 1 < n && left + 1 >= s.equal) {
    each([&](T d) {
      const Bits bits = magnitude_bits(d);
      if (bits > found) atomicMin(&s.above, static_cast<unsigned long long>(bits));
    });
    __syncthreads();
    b = from_bits(static_cast<Bits>(s.above));
  }
  return w < static_cast<T>(0.5) ? add(a, mul(w, sub(b, a))) : sub(b, mul(sub(b, a), sub(static_cast<T>(1), w)));
}

template <class S>
__global__ void __launch_bounds__(kSelectThreads, 1) sample_scalars_kernel(const __grid_constant__ SolverStepParams p) {
  using T = Wide<S>;
  GF_SHARED(Row<T>, row);
  GF_SHARED(double[4], total);
  GF_SHARED(T, factor);
  GF_SHARED(Selection, selection);
  read_row(p, row);
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    double* workspace = sample_workspace(p, b);
    if (rescales(p, row)) {
      if (threadIdx.x < 4) {
        double sum = 0.0;
        for (int64_t c = 0; c < chunks_per_sample(p.per_sample); ++c) sum = add(sum, workspace[2 + 4 * c + threadIdx.x]);
        total[threadIdx.x] = sum;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        const double n = static_cast<double>(p.per_sample), phi = row.scalar[kRescale];
        const double ratio = div(standard_deviation(total[0], total[1], n), standard_deviation(total[2], total[3], n));
        factor = static_cast<T>(add(mul(phi, ratio), sub(1.0, phi)));
        workspace[0] = factor;
      }
      __syncthreads();
    }
    if (thresholds(p, row)) {
      const auto each = [&](auto f) {
#pragma unroll 2
        for (int64_t e = threadIdx.x; e < p.per_sample; e += blockDim.x) {
          const int64_t i = b * p.per_sample + e;
          T x{}, m{};
          if (row.scalar[kAx] != 0) x = widen(static_cast<const S*>(p.slot[0])[i]);
          if (row.scalar[kAm] != 0) m = guided(p, row.scalar[kGuidance], i);
          if (rescales(p, row)) m = mul(m, factor);
          f(denoised(row.scalar, x, m));
        }
      };
      const T s = select_quantile(selection, row.scalar[kQuantile], p.per_sample, each);
      if (threadIdx.x == 0) workspace[1] = clamp_keep_nan(s, T(1), row.scalar[kMaxThreshold]);
      __syncthreads();
    }
  }
}

template <class S>
bool moves_as_vectors(const SolverStepParams& p) {
  constexpr int N = kElements<S, true>;
  if (p.per_sample % N != 0 || (p.channels > 1 && p.seeds)) return false;  // the C-order numbers of channels_last noise are not consecutive
  bool aligned = vector_aligned(p.cond, p.model, N) && vector_aligned(p.uncond, p.model, N) && vector_aligned(p.model_input, p.input, N);
  for (int k = 0; k < p.num_slots; ++k) aligned = aligned && vector_aligned(p.slot[k], p.state, N);
  return aligned;
}

}  // namespace

void launch_solver_step_cuda(const SolverStepParams& p, void* stream) {
  visit_dtype(p.state, [&]<class S>(S) {
    const unsigned samples = static_cast<unsigned>(p.batch < kMaxGridY ? p.batch : kMaxGridY);
    if (p.rescale && p.uncond) {
      const dim3 grid(static_cast<unsigned>(chunks_per_sample(p.per_sample)), samples);
      GF_LAUNCH((rescale_sums_kernel<Wide<S>>), grid, kFoldLanes, 0, stream, p);
    }
    if ((p.rescale && p.uncond) || p.threshold) GF_LAUNCH((sample_scalars_kernel<S>), samples, kSelectThreads, 0, stream, p);

    if (moves_as_vectors<S>(p)) {
      const auto [grid, block] = tile(p.batch, p.per_sample / kElements<S, true>);
      GF_LAUNCH((apply_kernel<S, true>), grid, block, 0, stream, p);
    } else {
      const auto [grid, block] = tile(p.batch, (p.per_sample + kElements<S, false> - 1) / kElements<S, false>);
      GF_LAUNCH((apply_kernel<S, false>), grid, block, 0, stream, p);
    }
  });
}

}  // namespace genfast
