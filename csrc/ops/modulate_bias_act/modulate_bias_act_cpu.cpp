// Shares the units of work among threads and adds up the partial sums in an order that no thread count changes.
#include <algorithm>
#include <memory>

#include "../../core/cpu_isa.h"
#include "../../core/huge_pages.h"
#include "../../core/parallel.h"
#include "modulate_bias_act_cpu.h"

namespace genfast {
namespace {

constexpr int64_t kGrainElements = 32768;  // below this many elements a thread costs more than it brings

template <class T>
void run(const ModulateParams& p, int64_t element_size) {
  const ModulateKernels& kernels = GENFAST_PICK_ISA(kModulateBaseline, kModulateAvx2, kModulateAvx512);
  const int64_t chunk = chunk_of(p), chunks = ceil_div(p.inner, chunk), units = p.batch * chunks, sums = kModulateSums * p.channels;
  std::unique_ptr<T[]> partial;
  if (p.dy) partial.reset(new T[static_cast<size_t>(units * sums)]());
  const ModulateTask t{p, partial.get(), chunk, chunks};
  const int64_t total = p.batch * p.channels * p.inner;
  want_huge_pages(p.out, total * element_size);
  const int64_t grain = std::max<int64_t>(1, kGrainElements * units / total);
  parallel_for(0, units, grain, [&](int64_t first, int64_t last) { kernels.units(t, first, last); });
  if (!p.dy) return;
  std::fill_n(p.sums, p.batch * sums, 0.0);
  const T* next = partial.get();
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t k = 0; k < kModulateSums; ++k) {
      double* row = p.sums + (k * p.batch + unit / chunks) * p.channels;
      for (int64_t c = 0; c < p.channels; ++c) row[c] += *next++;
    }
  }
}

}  // namespace

void launch_modulate_bias_act_cpu(const ModulateParams& p) {
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
