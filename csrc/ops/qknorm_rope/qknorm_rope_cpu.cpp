// Shares tokens among threads; backward, chunks of tokens, whose sums are added up in an order that no thread count changes.
#include "qknorm_rope_cpu.h"

#include <algorithm>
#include <memory>

#include "../../core/cpu_isa.h"
#include "../../core/huge_pages.h"
#include "../../core/parallel.h"

namespace genfast {
namespace {

constexpr int64_t kGrainElements = 16384;  // below this many elements a thread costs more than it brings

template <class T>
void backward(const QkNormRopeKernels& kernels, QkNormRopeTask& t, int64_t tokens, int64_t grain) {
  const QkNormRopeParams& p = t.p;
  t.chunk = qk_chunk(tokens);
  const int64_t padded = qk_padded(p.head_dim), units = qk_chunks(tokens);
  for (int s = 0; s < 2; ++s) {
    t.offset[s] = t.values;
    if (p.side[s].sums) t.values += 2 * p.side[s].weight_heads * padded;
  }
  std::unique_ptr<T[]> partial;
  if (t.values) {
    partial.reset(new T[static_cast<size_t>(units * t.values)]);
    t.partial = partial.get();
  }
  parallel_for(0, units, std::max<int64_t>(1, grain / t.chunk), [&](int64_t first, int64_t last) { kernels.backward(t, first, last); });
  for (int s = 0; s < 2; ++s) {
    const QkSide& side = p.side[s];
    if (!side.sums) continue;
    const int64_t rows = 2 * side.weight_heads;
    std::fill_n(side.sums, rows * p.head_dim, 0.0);
    for (int64_t unit = 0; unit < units; ++unit) {
      const T* from = partial.get() + unit * t.values + t.offset[s];
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < p.head_dim; ++i) side.sums[row * p.head_dim + i] += from[row * padded + i];
      }
    }
  }
}

}  // namespace

void launch_qknorm_rope_cpu(const QkNormRopeParams& p) {
  const QkNormRopeKernels& kernels = GENFAST_PICK_ISA(kQkNormRopeBaseline, kQkNormRopeAvx2, kQkNormRopeAvx512);
  const int64_t tokens = p.batch * p.tokens, per_token = (p.side[0].heads + p.side[1].heads) * p.head_dim;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / per_token), size = p.dtype == DType::F64 ? 8 : p.dtype == DType::F32 ? 4 : 2;
  for (const QkSide& side : p.side) want_huge_pages(side.out, tokens * side.heads * p.head_dim * size);
  QkNormRopeTask t{p, nullptr, 0, 0, {0, 0}};
  if (p.side[0].grad) {
    p.dtype == DType::F64 ? backward<double>(kernels, t, tokens, grain) : backward<float>(kernels, t, tokens, grain);
  } else {
    parallel_for(0, tokens, grain, [&](int64_t first, int64_t last) { kernels.forward(t, first, last); });
  }
}

}  // namespace genfast
