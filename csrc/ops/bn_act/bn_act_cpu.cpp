// Cuts the tensor into units, shares them among threads, and adds up the partial sums in an order that no thread count changes.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../../core/cpu_isa.h"
#include "../../core/huge_pages.h"
#include "bn_act_cpu.h"

namespace genfast {
namespace {

constexpr int64_t kGrainElements = 32768;  // below this many elements a thread costs more than it brings

template <class T>
void run(const BnActParams& p, int64_t element_size) {
  const BnActKernels& kernels = GENFAST_PICK_ISA(kBnActBaseline, kBnActAvx2, kBnActAvx512);
  const int64_t period = p.channels * p.inner, total = p.outer * period;
  const bool is_short = p.inner < kBnShortRow;
  BnActTask t{p, p.coef, nullptr, 0, ceil_div(p.inner, kBnChunk), std::lcm(period, int64_t{16}), 0};
  t.block = t.repeat * std::max<int64_t>(1, kBnBlock / t.repeat);
  t.units = is_short ? ceil_div(total, t.block) : p.outer * p.channels * t.chunks;

  std::vector<T> coef;
  if (is_short) {
    coef.resize(static_cast<size_t>(kBnCoefficients * t.repeat));
    for (int64_t k = 0; k < kBnCoefficients; ++k) {
      for (int64_t i = 0; i < t.repeat; ++i) {
        coef[k * t.repeat + i] = static_cast<const T*>(p.coef)[k * p.channels + i % period / p.inner];
      }
    }
    t.coef = coef.data();
  }
  // As (2, groups, channels, width).
  const int64_t groups = is_short ? t.units * (t.repeat / period) : p.outer, width = is_short ? p.inner : t.chunks;
  std::unique_ptr<T[]> partial;
  if (p.sums) {
    partial.reset(new T[static_cast<size_t>(2 * groups * p.channels * width)]);
    t.partial = partial.get();
  } else {
    want_huge_pages(p.out, total * element_size);
  }

  const int64_t grain = std::max<int64_t>(1, kGrainElements * t.units / total);
  torch::stable::parallel_for(0, t.units, grain, [&](int64_t first, int64_t last) { kernels.rows(t, is_short, first, last); });
  if (!p.sums) return;

  std::fill_n(p.sums, 2 * p.channels, 0.0);
  const T* next = partial.get();
  for (int64_t k = 0; k < 2; ++k) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t w = 0; w < width; ++w) p.sums[k * p.channels + c] += *next++;
      }
    }
  }
}

}  // namespace

void launch_bn_act_cpu(const BnActParams& p) {
  switch (p.dtype) {
    case DType::F64:
      return run<double>(p, 8);
    case DType::F32:
      return run<float>(p, 4);
    default:
      return run<float>(p, 2);
  }
}

}  // namespace genfast
