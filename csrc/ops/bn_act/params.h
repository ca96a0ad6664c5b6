// What one pass of bn_act needs, and its coefficients. docs/gan-ops.md is the specification. Torch-free.
#pragma once
#include <cstdint>

#include "../../core/activation.h"
#include "../../core/dtype.h"
#include "../../core/exact_math.h"

namespace genfast {

// With v = x - center, u = scale * v + shift + residual and g = dy * gain * act'(u), all coefficients of the element's channel:
enum class BnPass : int32_t {
  Moments = 0,   // sums = mean and biased variance; the kernels sum v and v^2 around the channel's first element
  Apply = 1,     // out = gain * act(u)
  Sums = 2,      // sums = those of g and g v; out = g, where there is an out
  Backward = 3,  // out = p g + q v + r
};
enum BnCoefficient : int { kCenter = 0, kScale = 1, kShift = 2, kP = 3, kQ = 4, kR = 5 };
constexpr int kBnCoefficients = 6;
// How many of them a pass reads: the first, whatever their number. Moments reads the element around which it sums in the place of the
// center.
constexpr int used_coefficients(BnPass pass) {
  return pass == BnPass::Moments ? 1 : pass == BnPass::Backward ? kBnCoefficients : kShift + 1;
}

// Memory is (samples, outer, channels, inner); every channel of every sample has coefficients and sums of its own.
struct BnActParams {
  void* out;             // (samples, outer, channels, inner), or nullptr
  const void* x;         // likewise, dense
  const void* dy;        // likewise, or nullptr in the passes that do not need it
  const void* residual;  // likewise, or nullptr
  const void* coef;      // (kBnCoefficients, samples, channels) float, or double for F64; nullptr for Moments
  double* sums;          // (2, samples, channels), or nullptr
  double* partial;       // CUDA: partial_doubles() of workspace, or nullptr
  int64_t samples, outer, channels, inner;
  Curve<double> curve;  // order 0 for Apply, else 1; no clamp
  BnPass pass;
  DType dtype;
};

// Element i of an array of any type.
GF_HD double value_at(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::F64:
      return static_cast<const double*>(data)[i];
    case DType::F32:
      return static_cast<const float*>(data)[i];
    case DType::BF16:
      return widen_bf16(static_cast<const BFloat16*>(data)[i]);
    default:
      return widen_f16(static_cast<const Float16*>(data)[i]);
  }
}

// The element around which the moments of channel `channel` of sample `sample` are summed.
GF_HD double origin_of(const BnActParams& p, int64_t sample, int64_t channel) {
  return value_at(p.x, p.dtype, sample * p.outer * p.channels * p.inner + channel * p.inner);
}

// What the sums of v and v^2 over n elements around `origin` say: mean and variance.
GF_HD void moments_of(double (&sum)[2], double origin, double n) {
  const double mean = sum[0] / n, variance = sum[1] / n - mean * mean;
  sum[0] = origin + mean;
  sum[1] = variance > 0.0 ? variance : variance <= 0.0 ? 0.0 : variance;  // a NaN stays
}

// ---- coefficients ------------------------------------------------------------------------------------------------------------

// From moments (and for a derivative sums) of channels to the coefficients of a pass. A group is `channels / groups` neighbouring channels
// of a sample, all normalised by one mean and variance; batch normalisation has one channel a group.
struct BnCoefficientsParams {
  void* coef;             // (kBnCoefficients, samples, channels) float or double
  double* gradients;      // (2, samples, channels): of bias and weight, by sample; or nullptr
  const double* moments;  // (2, samples, channels): mean, variance
  const double* sums;     // (2, samples, channels) of pass Sums, or nullptr
  const double* totals;   // (2, samples, channels): sums of all that `elements` counts; nullptr where mean and variance are given
  double elements;        // that share a mean
  const void* weight;     // (channels,), or nullptr
  const void* bias;       // (channels,), or nullptr
  int64_t samples, channels, groups;
  double eps;
  DType dtype, weight_dtype, bias_dtype;  // of coef: F32 or F64
};

// What the channels of a group share.
struct BnGroup {
  double mean, inverse;  // inverse: 1 / sqrt(var + eps)
  double means[2];       // of weight * g and weight * g * v; 0 where mean and variance are given
};
GF_HD BnGroup bn_group_of(const BnCoefficientsParams& p, int64_t sample, int64_t group) {
  const int64_t size = p.samples * p.channels, members = p.channels / p.groups;
  const int64_t channel = group * members, first = sample * p.channels + channel;
  BnGroup g{0.0, 0.0, {0.0, 0.0}};
  double variance = 0.0;
  for (int64_t j = 0; j < members; ++j) g.mean += p.moments[first + j];
  g.mean /= static_cast<double>(members);
  for (int64_t j = 0; j < members; ++j) {
    const double apart = p.moments[first + j] - g.mean;
    variance += p.moments[size + first + j] + apart * apart;
  }
  g.inverse = 1.0 / sqrt_rn(variance / static_cast<double>(members) + p.eps);
  for (int64_t j = 0; p.totals && j < members; ++j) {
    const double w = p.weight ? value_at(p.weight, p.weight_dtype, channel + j) : 1.0;
    g.means[0] += w * (p.totals[first + j] / p.elements);
    g.means[1] += w * (p.totals[size + first + j] / p.elements);
  }
  return g;
}

template <class T>
GF_HD void bn_coefficients_at(const BnCoefficientsParams& p, int64_t sample, int64_t channel, const BnGroup& group) {
  const int64_t size = p.samples * p.channels, at = sample * p.channels + channel;
  const double inverse = group.inverse, scale = p.weight ? value_at(p.weight, p.weight_dtype, channel) * inverse : inverse;
  const double row[kBnCoefficients] = {group.mean,
                                       scale,
                                       p.bias ? value_at(p.bias, p.bias_dtype, channel) : 0.0,
                                       scale,
                                       -inverse * inverse * inverse * group.means[1],
                                       -inverse * group.means[0]};
  for (int k = 0; k < kBnCoefficients; ++k) static_cast<T*>(p.coef)[k * size + at] = static_cast<T>(row[k]);
  if (p.gradients) {
    p.gradients[at] = p.sums[at];
    p.gradients[size + at] = p.sums[size + at] * inverse;
  }
}

// ---- plans -------------------------------------------------------------------------------------------------------------------

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// CPU. A unit of long rows (sample, outer, channel) is a run of a channel's rows, up to kBnDepth of them or kBnRun elements, and of rows
// longer than kBnChunk a chunk of one. Short rows are not looked at one by one: a sample is then a run of periods, channels * inner
// elements each, over which the coefficients repeat.
constexpr int64_t kBnShortRow = 16;
constexpr int64_t kBnChunk = 16384 - kBnShortRow;  // the last one has up to kBnShortRow - 1 more, so that none is shorter than a vector
constexpr int64_t kBnRun = 2048;
constexpr int64_t kBnDepth = 8;
constexpr int64_t kBnBlock = 32768;  // about so many elements of short rows are one unit

// CUDA. A block takes a chunk of a long row. Otherwise a thread takes a few columns of a sample's (outer, channels * inner) matrix and goes
// down so many rows that about kBnThreads threads run.
constexpr int64_t kBnCudaChunk = 8192;
constexpr int64_t kBnCudaLongRow = 1024;
constexpr int64_t kBnThreads = int64_t{1} << 18;

// Elements of so many bytes that a thread takes at once: 16 bytes, or two where these are not aligned or not whole.
template <int kBytes, bool kVector>
constexpr int kBnWidth = kVector ? 16 / kBytes : 2;

struct BnActPlan {
  bool long_rows, vector;
  int64_t threads_x, threads_y, grid_x, grid_y, grid_z;
  int64_t groups, width;  // the partial sums are (2, samples, groups, channels, width)
};
GF_HD BnActPlan plan_of(const BnActParams& p) {
  const bool long_rows = p.inner >= kBnCudaLongRow;
  int64_t n = p.dtype == DType::F64 ? kBnWidth<8, true> : p.dtype == DType::F32 ? kBnWidth<4, true> : kBnWidth<2, true>;
  const auto places = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(p.dy) |
                      reinterpret_cast<uintptr_t>(p.residual);
  const bool vector = places % 16 == 0 && (long_rows ? p.inner : p.channels * p.inner) % n == 0;
  if (!vector) n = kBnWidth<1, false>;
  if (long_rows) {
    const int64_t chunks = ceil_div(p.inner, kBnCudaChunk), rows = p.samples * p.outer * p.channels;
    return {true, vector, 256, 1, chunks, rows < 32768 ? rows : 32768, 1, p.outer, chunks};
  }
  const int64_t columns = ceil_div(p.channels * p.inner, n);
  const int64_t x = columns < 256 ? columns : 256, most = 256 / x, y = p.outer < most ? p.outer : most, wide = ceil_div(columns, x);
  const int64_t down = ceil_div(columns * p.outer * p.samples, kBnThreads);
  int64_t high = ceil_div(p.outer, y * down);
  high = high < 32768 ? high : 32768;
  return {false, vector, x, y, wide, high, p.samples < 32768 ? p.samples : 32768, high * y, p.inner};
}
GF_HD int64_t partial_doubles(const BnActParams& p) {
  const BnActPlan plan = plan_of(p);
  return 2 * p.samples * plan.groups * p.channels * plan.width;
}

}  // namespace genfast
