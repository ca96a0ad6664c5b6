// The emulator tested on kernels that use what it emulates: each against float64, and with planted bugs that must be caught.
// Usage: self_test KERNEL [BUG]. Exit status 0: right; 1: wrong numbers; 2: the emulator refused, its reason on stderr.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "core/ptx.cuh"
#include "core/reduce.cuh"

namespace {
using namespace genfast;

// What can be wrong with a kernel. Compile-time constants would be a build for each.
enum Bug : int {
  kNone,
  kOutOfBounds,
  kSharedOverrun,
  kNoFirstBarrier,
  kNoSecondBarrier,
  kDivergentBarrier,
  kShuffleMask,
  kShuffleMissingLane,
  kShuffleSource,
  kDifferentBarriers,
  kUnwrittenShared,
  kNoWarpBarrier,
  kSharedNotAllowed,
  kSharedBeyondDevice,
  kMisaligned,
};
constexpr const char* kBugs[] = {"none",
                                 "out_of_bounds",
                                 "shared_overrun",
                                 "no_first_barrier",
                                 "no_second_barrier",
                                 "divergent_barrier",
                                 "shuffle_mask",
                                 "shuffle_missing_lane",
                                 "shuffle_source",
                                 "different_barriers",
                                 "unwritten_shared",
                                 "no_warp_barrier",
                                 "shared_not_allowed",
                                 "shared_beyond_device",
                                 "misaligned"};

constexpr int kTile = 16;

__global__ void __launch_bounds__(kTile* kTile) tiled_gemm(const float* a, const float* b, float* c, int m, int n, int k, Bug bug) {
  GF_SHARED(float[kTile][kTile], tile_a);
  GF_SHARED(float[kTile][kTile], tile_b);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int row = static_cast<int>(blockIdx.y) * kTile + y, column = static_cast<int>(blockIdx.x) * kTile + x;
  const int last = bug == kSharedOverrun ? kTile + 1 : kTile;
  float sum = 0.0f;
  for (int k0 = 0; k0 < k; k0 += kTile) {
    const bool inside = row < m && (k0 + x < k || bug == kOutOfBounds);
    tile_a[y][x] = inside ? a[row * k + k0 + x] : 0.0f;
    tile_b[y][x] = k0 + y < k && column < n ? b[(k0 + y) * n + column] : 0.0f;
    if (bug != kNoFirstBarrier && (bug != kDivergentBarrier || row < m)) __syncthreads();
    for (int i = 0; i < last; ++i) sum += tile_a[y][i % kTile] * (&tile_b[0][0])[i * kTile + x];
    if (bug != kNoSecondBarrier) __syncthreads();
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

// y = x / rms(x), one block a row.
__global__ void __launch_bounds__(256) rms_norm(const float* x, float* y, int n, Bug bug) {
  GF_SHARED(float[8], warp_sum);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const float* row = x + static_cast<int64_t>(blockIdx.x) * n;
  float sum = 0.0f;
  for (int i = thread; i < n; i += 256) sum += row[i] * row[i];
  const uint32_t mask = bug == kShuffleMask || bug == kShuffleSource ? 0x0000ffffu : ~0u;
  if (bug == kShuffleSource) {
    if (lane < 16) sum += __shfl_sync(mask, sum, lane + 16);
  } else if (bug != kShuffleMissingLane || lane != 7) {
    for (int s = 16; s; s /= 2) sum += __shfl_xor_sync(mask, sum, s);
  }
  if (bug == kUnwrittenShared) {
    if (lane == 0 && thread != 96) warp_sum[thread / 32] = sum;
    __syncthreads();
  } else if (bug == kDifferentBarriers && lane == 0) {
    warp_sum[thread / 32] = sum;
    __syncthreads();
  } else {
    if (lane == 0) warp_sum[thread / 32] = sum;
    __syncthreads();
  }
  float total = 0.0f;
  for (int w = 0; w < 8; ++w) total += warp_sum[w];
  const float scale = rsqrtf(total / static_cast<float>(n));
  for (int i = thread; i < n; i += 256) y[static_cast<int64_t>(blockIdx.x) * n + i] = row[i] * scale;
}

// c (m, n) = a (m, k) * b (n, k)^T in bfloat16, one warp for a 16 x 8 tile; m a multiple of 16, n of 8, k of 16.
__global__ void __launch_bounds__(32) mma_gemm(const BFloat16* a, const BFloat16* b, float* c, int n, int k, Bug bug) {
  GF_DYNAMIC_SHARED(BFloat16, tile);  // 16 x 16 of a, then 8 x 16 of b
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const int row = static_cast<int>(blockIdx.y) * 16, column = static_cast<int>(blockIdx.x) * 8;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int k0 = 0; k0 < k; k0 += 16) {
    cp_async16(tile + lane * 8, a + (row + lane / 2) * k + k0 + lane % 2 * 8);
    if (lane < 16) cp_async16(tile + 256 + lane * 8, b + (column + lane / 2) * k + k0 + lane % 2 * 8);
    cp_async_wait_all();
    if (bug != kNoWarpBarrier) __syncwarp();
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(tile);
    const uint32_t fa[4] = {pairs[g * 8 + t], pairs[(g + 8) * 8 + t], pairs[g * 8 + t + 4], pairs[(g + 8) * 8 + t + 4]};
    const uint32_t fb[2] = {pairs[128 + g * 8 + t], pairs[128 + g * 8 + t + 4]};
    mma_m16n8k16<BFloat16>(sum, fa, fb);
    __syncwarp();
  }
  float* out = c + (row + g) * n + column + 2 * t;
  out[0] = sum[0];
  out[1] = sum[1];
  out[8 * n] = sum[2];
  out[8 * n + 1] = sum[3];
}

// count[i] = how many values equal i, smallest = min, total = the folded sum of 256 values.
__global__ void __launch_bounds__(256) histogram(const int* values, int n, unsigned* count, int* smallest, double* total) {
  GF_SHARED(unsigned[32], local);
  GF_SHARED(Lanes<1>, lanes);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) local[thread] = 0;
  __syncthreads();
  double sum[1] = {0.0};
  for (int i = thread; i < n; i += 256) {
    atomicAdd(&local[values[i]], 1u);
    atomicMin(smallest, values[i]);
    sum[0] += values[i];
  }
  __syncthreads();
  fold(sum, lanes);
  if (thread < 32) count[thread] = local[thread];
  if (thread == 0) *total = sum[0];
}

// y = x, by way of much shared memory, 16 bytes at a time.
__global__ void through_shared(const float* x, float* y) {
  GF_DYNAMIC_SHARED(uint4, tile);
  tile[threadIdx.x] = reinterpret_cast<const uint4*>(x)[threadIdx.x];
  __syncthreads();
  reinterpret_cast<uint4*>(y)[threadIdx.x] = tile[threadIdx.x];
}

template <class T>
std::vector<T> filled(size_t n, T (*make)(float)) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<T> v(n);
  for (T& x : v) x = make(normal(random));
  return v;
}
float same(float x) {
  return x;
}

// The largest difference; infinite if anything was not written.
double worst(const std::vector<float>& got, const std::vector<double>& want) {
  double most = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]);
    most = std::isnan(error) ? INFINITY : std::max(most, error);
  }
  return most;
}

double check_tiled_gemm(Bug bug) {
  const int m = 35, n = 50, k = 45;
  const auto a = filled(m * k, same), b = filled(k * n, same);
  std::vector<float> c(m * n, NAN);
  std::vector<double> want(m * n);
  GF_LAUNCH(tiled_gemm, dim3((n + kTile - 1) / kTile, (m + kTile - 1) / kTile), dim3(kTile, kTile), 0, nullptr, a.data(), b.data(),
            c.data(), m, n, k, bug);
  for (int i = 0; i < m * n; ++i) {
    for (int j = 0; j < k; ++j) want[i] += static_cast<double>(a[i / n * k + j]) * b[j * n + i % n];
  }
  return worst(c, want);
}

double check_rms_norm(Bug bug) {
  const int rows = 3, n = 1000;
  const auto x = filled(rows * n, same);
  std::vector<float> y(rows * n, NAN);
  std::vector<double> want(rows * n);
  GF_LAUNCH(rms_norm, rows, 256, 0, nullptr, x.data(), y.data(), n, bug);
  for (int r = 0; r < rows; ++r) {
    double squares = 0.0;
    for (int i = 0; i < n; ++i) squares += static_cast<double>(x[r * n + i]) * x[r * n + i];
    for (int i = 0; i < n; ++i) want[r * n + i] = x[r * n + i] / std::sqrt(squares / n);
  }
  return worst(y, want);
}

double check_mma_gemm(Bug bug) {
  const int m = 32, n = 24, k = 64;
  const auto a = filled(m * k, narrow_bf16), b = filled(n * k, narrow_bf16);
  std::vector<float> c(m * n, NAN);
  std::vector<double> want(m * n);
  GF_LAUNCH(mma_gemm, dim3(n / 8, m / 16), 32, (256 + 128) * sizeof(BFloat16), nullptr, a.data(), b.data(), c.data(), n, k, bug);
  for (int i = 0; i < m * n; ++i) {
    for (int j = 0; j < k; ++j) want[i] += static_cast<double>(widen_bf16(a[i / n * k + j])) * widen_bf16(b[i % n * k + j]);
  }
  return worst(c, want);
}

double check_histogram() {
  const int n = 1000;
  std::vector<int> values(n);
  for (int i = 0; i < n; ++i) values[i] = 3 + i * i % 29;
  std::vector<unsigned> count(32, 777), want(32);
  int smallest = 99;
  double total = NAN, sum = 0.0;
  GF_LAUNCH(histogram, 1, 256, 0, nullptr, values.data(), n, count.data(), &smallest, &total);
  for (int v : values) {
    ++want[v];
    sum += v;
  }
  return count == want && smallest == 3 && total == sum ? 0.0 : INFINITY;
}

double check_through_shared(Bug bug) {
  const int n = 128;
  const auto x = filled(n + 4, same);
  std::vector<float> y(n, NAN);
  const size_t bytes = bug == kSharedBeyondDevice ? 100 * 1024 : 64 * 1024;
  if (bug != kSharedNotAllowed) GF_ALLOW_SHARED(through_shared, bytes);
  const float* from = x.data() + (bug == kMisaligned ? 1 : 4);
  GF_LAUNCH(through_shared, 1, n / 4, bytes, nullptr, from, y.data());
  return worst(y, std::vector<double>(from, from + n));
}

}  // namespace

int main(int count, char** arguments) {
  const char* name = count > 1 ? arguments[1] : "";
  Bug bug = kNone;
  for (int i = 0; i <= kMisaligned; ++i) {
    if (count > 2 && !std::strcmp(arguments[2], kBugs[i])) bug = static_cast<Bug>(i);
  }
  try {
    double error = INFINITY;
    if (!std::strcmp(name, "tiled_gemm")) error = check_tiled_gemm(bug);
    if (!std::strcmp(name, "rms_norm")) error = check_rms_norm(bug);
    if (!std::strcmp(name, "mma_gemm")) error = check_mma_gemm(bug);
    if (!std::strcmp(name, "histogram")) error = check_histogram();
    if (!std::strcmp(name, "through_shared")) error = check_through_shared(bug);
    std::printf("%s: largest error %g\n", name, error);
    return error < 1e-4 ? 0 : 1;
  } catch (const std::exception& refusal) {
    std::fprintf(stderr, "%s\n", refusal.what());
    return 2;
  }
}
