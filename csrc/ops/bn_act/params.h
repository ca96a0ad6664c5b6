// What one pass of bn_act needs. docs/gan-ops.md is the specification. Torch-free.
#pragma once
#include <cstdint>

#include "../../core/activation.h"
#include "../../core/dtype.h"

namespace genfast {

// With v = x - center, u = scale * v + shift and g = dy * act'(u), all coefficients of the element's channel:
enum class BnPass : int32_t {
  Moments = 0,   // sums: v, v^2
  Apply = 1,     // out = act(u)
  Sums = 2,      // sums: g, g v
  Backward = 3,  // out = p g + q v + r
};
enum BnCoefficient : int { kCenter = 0, kScale = 1, kShift = 2, kP = 3, kQ = 4, kR = 5 };
constexpr int kBnCoefficients = 6;

struct BnActParams {
  void* out;         // (outer, channels, inner), or nullptr in the passes that sum
  const void* x;     // (outer, channels, inner), dense
  const void* dy;    // likewise, or nullptr in the passes that do not need it
  const void* coef;  // (kBnCoefficients, channels) float, or double for F64
  double* sums;      // (2, channels), or nullptr
  double* partial;   // CUDA: partial_doubles() of workspace, or nullptr
  int64_t outer, channels, inner;
  Curve<double> curve;  // order 0; gain 1, no clamp
  BnPass pass;
  DType dtype;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// CPU. A long row (outer, channel) is cut into chunks of this many elements. Short rows are not looked at one by one: the tensor is then
// a run of periods, channels * inner elements each, over which the coefficients repeat.
constexpr int64_t kBnChunk = 16384;
constexpr int64_t kBnShortRow = 16;
constexpr int64_t kBnBlock = 4096;  // about so many elements of short rows are one unit

// CUDA. A block takes a chunk of a long row. Otherwise a thread takes a few columns of the (outer, channels * inner) matrix and goes down
// so many rows that about kBnThreads threads run.
constexpr int64_t kBnCudaChunk = 8192;
constexpr int64_t kBnCudaLongRow = 1024;
constexpr int64_t kBnThreads = int64_t{1} << 18;

struct BnActPlan {
  bool long_rows;
  int64_t threads_x, threads_y, grid_x, grid_y;
  int64_t groups, width;  // the partial sums are (2, groups, channels, width)
};
constexpr BnActPlan plan_of(const BnActParams& p) {
  const int64_t n = p.dtype == DType::BF16 || p.dtype == DType::F16 ? 8 : 4;
  if (p.inner >= kBnCudaLongRow) {
    const int64_t chunks = ceil_div(p.inner, kBnCudaChunk), rows = p.outer * p.channels;
    return {true, 256, 1, chunks, rows < 32768 ? rows : 32768, p.outer, chunks};
  }
  const int64_t columns = ceil_div(p.channels * p.inner, n);
  const int64_t x = columns < 256 ? columns : 256, y = 256 / x, wide = ceil_div(columns, x);
  const int64_t down = ceil_div(columns * p.outer, kBnThreads);
  int64_t high = ceil_div(p.outer, y * down);
  high = high < 32768 ? high : 32768;
  return {false, x, y, wide, high, high * y, p.inner};
}
constexpr int64_t partial_doubles(const BnActParams& p) {
  const BnActPlan plan = plan_of(p);
  return 2 * plan.groups * p.channels * plan.width;
}

}  // namespace genfast
