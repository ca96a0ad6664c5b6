// Cuts the tensor into units, shares them among threads, and adds up the partial sums in an order that no thread count changes.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../../core/cpu_isa.h"
#include "../../core/huge_pages.h"
#include "../../core/parallel.h"
#include "bias_act_cpu.h"

namespace genfast {
namespace {

constexpr int64_t kGrainElements = 32768;  // below this many elements a thread costs more than it brings

template <class S>
double wide(S v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return widen_bf16(v);
  } else if constexpr (std::is_same_v<S, Float16>) {
    return widen_f16(v);
  } else {
    return v;
  }
}
template <class S>
S narrow(double v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return narrow_bf16(static_cast<float>(v));
  } else if constexpr (std::is_same_v<S, Float16>) {
    return narrow_f16(static_cast<float>(v));
  } else {
    return static_cast<S>(v);
  }
}

template <class T, class S>
void run(const BiasActParams& p) {
  const BiasActKernels& kernels = GENFAST_PICK_ISA(kBiasActBaseline, kBiasActAvx2, kBiasActAvx512);
  const int64_t total = p.outer * p.channels * p.inner, period = p.channels * p.inner;
  const bool is_short = p.inner < kShortRow && p.channels > 1;
  BiasActTask t{p, p.b, nullptr, ceil_div(p.inner, kBiasActChunk), std::lcm(period, int64_t{16}), 0};
  t.block = t.repeat * std::max<int64_t>(1, kBiasActChunk / t.repeat);
  const int64_t units = is_short ? ceil_div(total, t.block) : p.outer * p.channels * t.chunks;

  std::vector<T> bias;
  if (is_short && p.b) {
    bias.resize(static_cast<size_t>(t.repeat));
    for (int64_t i = 0; i < t.repeat; ++i) bias[i] = static_cast<T>(wide(static_cast<const S*>(p.b)[i % period / p.inner]));
    t.bias = bias.data();
  }
  // As (groups, channels, width).
  const int64_t groups = is_short ? units * (t.repeat / period) : p.outer, width = is_short ? p.inner : t.chunks;
  std::unique_ptr<T[]> partial;
  if (p.sums) {
    partial.reset(new T[static_cast<size_t>(groups * p.channels * width)]);
    t.partial = partial.get();
  }

  want_huge_pages(p.out, total * static_cast<int64_t>(sizeof(S)));
  const int64_t grain = std::max<int64_t>(1, kGrainElements * units / total);
  parallel_for(0, units, grain, [&](int64_t first, int64_t last) { (is_short ? kernels.short_rows : kernels.long_rows)(t, first, last); });
  if (!p.sums) return;

  std::vector<double> sums(static_cast<size_t>(p.channels));
  const T* next = partial.get();
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t w = 0; w < width; ++w) sums[c] += *next++;
    }
  }
  for (int64_t c = 0; c < p.channels; ++c) static_cast<S*>(p.sums)[c] = narrow<S>(sums[c]);
}

}  // namespace

void launch_bias_act_cpu(const BiasActParams& p) {
  switch (p.dtype) {
    case DType::F32:
      return run<float, float>(p);
    case DType::F64:
      return run<double, double>(p);
    case DType::BF16:
      return run<float, BFloat16>(p);
    case DType::F16:
      return run<float, Float16>(p);
  }
}

}  // namespace genfast
