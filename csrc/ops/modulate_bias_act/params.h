// What one launch of modulate_bias_act needs. docs/gan-ops.md is the specification. Torch-free.
#pragma once
#include <cstdint>

#include "../../core/activation.h"
#include "../../core/dtype.h"

namespace genfast {

// With u = scale x + noise + b and C the curve of core/activation.h:
//   forward   out = post_scale C(u)
//   backward  g = post_scale dy C'(u);   out = scale g;   grad_noise = sum of g over the channels;
//             sums = g, g x and dy C(u), each summed over the pixels
// T is the type of the arithmetic: double where `dtype` is F64, else float.
struct ModulateParams {
  void* out;               // as x: y, or dx
  double* sums;            // (3, batch, channels), or nullptr: forward
  void* grad_noise;        // T (batch, inner), or nullptr
  void* partial;           // CUDA: partial_elements() of T, or nullptr: forward
  const void* x;           // (batch, channels, inner), or (batch, inner, channels) where channels_last
  const void* dy;          // as x, or nullptr: forward
  const void* scale;       // T (batch, channels), or nullptr: 1
  const void* noise;       // T (batch or 1, inner), or nullptr: 0
  const void* b;           // T (channels,), or nullptr: 0
  const void* post_scale;  // T (batch, channels), or nullptr: 1
  int64_t batch, channels, inner;
  bool channels_last, noise_of_all;  // noise_of_all: one noise for the whole batch
  Curve<double> curve;               // order 0
  DType dtype;
};
constexpr int kModulateSums = 3;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t at_least(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// CPU. One unit of work is a chunk of a sample's pixels with all their channels: about kModulateUnit elements, in planes at least
// kShortestChunk pixels, so that rows stay long.
constexpr int64_t kModulateUnit = int64_t{1} << 16;
constexpr int64_t kShortestChunk = 512;
constexpr int64_t kLongestChunk = 2048;
constexpr int64_t chunk_of(const ModulateParams& p) {
  return at_least(p.channels_last ? 1 : kShortestChunk, at_most(kModulateUnit / p.channels, kLongestChunk));
}

// CUDA. A block has 256 threads, with a vector of elements each.
//   Planes: a warp takes 32 vectors of one channel, the block's eight warps eight channels at a time out of its slice of the channels, so
//   that the noise and its gradient stay in registers. Grid: pixels, slices, samples.
//   channels_last: `lanes` threads take a vector of channels each, and 256 / lanes such rows of threads go down the pixels together.
//   Grid: columns of channels, pixels, samples.
// Partial sums are (parts, 3, batch, channels), those of the noise's gradient (noise_parts, batch, inner).
constexpr int64_t kModulateThreads = int64_t{1} << 18;  // about so many threads run

struct ModulatePlan {
  int64_t grid_x, grid_y, grid_z;
  int64_t lanes;  // channels_last
  int64_t parts, noise_parts;
};
constexpr int64_t vector_elements(DType dtype) {
  return dtype == DType::BF16 || dtype == DType::F16 ? 8 : 4;
}
constexpr ModulatePlan plan_of(const ModulateParams& p) {
  const int64_t n = vector_elements(p.dtype), samples = at_most(p.batch, 32768);
  if (!p.channels_last) {
    const int64_t chunks = ceil_div(p.inner, 32 * n);
    const int64_t slices = at_least(1, at_most(ceil_div(p.channels, 8), kModulateThreads / 256 / at_least(1, chunks * samples)));
    return {chunks, slices, samples, 0, chunks, slices};
  }
  int64_t lanes = 1;
  while (lanes < 32 && lanes * n < p.channels) lanes *= 2;
  const int64_t rows = 256 / lanes, columns = ceil_div(p.channels, lanes * n);
  const int64_t wanted = at_least(1, kModulateThreads / 256 / at_least(1, columns * samples));
  const int64_t high = at_most(at_most(wanted, ceil_div(p.inner, rows)), 32768);
  return {columns, high, samples, lanes, high, columns};
}
constexpr int64_t partial_elements(const ModulateParams& p) {
  const ModulatePlan plan = plan_of(p);
  return plan.parts * kModulateSums * p.batch * p.channels + (p.grad_noise ? plan.noise_parts * p.batch * p.inner : 0);
}

}  // namespace genfast
