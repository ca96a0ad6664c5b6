// What one launch of bias_act needs. docs/gan-ops.md is the specification. Torch-free.
#pragma once
#include <cstdint>

#include "../../core/activation.h"
#include "../../core/dtype.h"

namespace genfast {

// out = factor * C(x + b), C the curve of core/activation.h. In memory every tensor is (outer, channels, inner), dense.
struct BiasActParams {
  void* out;           // (outer, channels, inner)
  void* sums;          // (channels,) out summed over outer and inner, or nullptr
  double* partial;     // CUDA: partial_doubles() of workspace for the sums, or nullptr
  const void* factor;  // (outer, channels, inner), or nullptr: 1
  const void* x;       // (outer, channels, inner)
  const void* b;       // (channels,), or nullptr
  int64_t outer, channels, inner;
  Curve<double> curve;
  DType dtype;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// CPU. A long row (outer, channel) is cut into chunks of this many elements. Short rows are not looked at one by one: the tensor is then
// a run of periods, channels * inner elements each, over which bias and sums repeat.
constexpr int64_t kBiasActChunk = 16384;
constexpr int64_t kShortRow = 16;

// CUDA. A block takes a chunk of a long row. Otherwise a thread takes a few columns of the (outer, channels * inner) matrix and goes
// down so many rows that about kThreads threads run; it keeps its columns' sums, one row of the partial sums for each such thread.
constexpr int64_t kCudaChunk = 8192;
constexpr int64_t kCudaLongRow = 1024;
constexpr int64_t kThreads = int64_t{1} << 18;

struct BiasActPlan {
  bool long_rows;
  int64_t threads_x, threads_y, grid_x, grid_y;
  int64_t groups, width;  // the partial sums are (groups, channels, width)
};
constexpr int64_t vector_elements(DType dtype) {
  return dtype == DType::BF16 || dtype == DType::F16 ? 8 : 4;
}
constexpr BiasActPlan plan_of(const BiasActParams& p) {
  const int64_t n = vector_elements(p.dtype);
  if (p.inner >= kCudaLongRow) {
    const int64_t chunks = ceil_div(p.inner, kCudaChunk), rows = p.outer * p.channels;
    return {true, 256, 1, chunks, rows < 32768 ? rows : 32768, p.outer, chunks};
  }
  const int64_t columns = ceil_div(p.channels * p.inner, n);
  const int64_t x = columns < 256 ? columns : 256, y = 256 / x, wide = ceil_div(columns, x);
  const int64_t down = ceil_div(columns * p.outer, kThreads);
  int64_t high = ceil_div(p.outer, y * down);
  high = high < 32768 ? high : 32768;
  return {false, x, y, wide, high, high * y, p.inner};
}
constexpr int64_t partial_doubles(const BiasActParams& p) {
  const BiasActPlan plan = plan_of(p);
  return plan.groups * p.channels * plan.width;
}

}  // namespace genfast
