#include "attention_decode_cpu.h"

#include <algorithm>
#include <vector>

#include "../../core/cpu_isa.h"
#include "../../core/parallel.h"

namespace genfast {
namespace {

constexpr int64_t kGrainElements = 1 << 16;  // of keys and values; below it a thread costs more than it brings

struct alignas(64) Line {
  float values[16];
};

}  // namespace

void launch_attention_decode_cpu(const AttentionDecodeParams& p) {
  const AttentionDecodeKernels& kernels = GENFAST_PICK_ISA(kAttentionDecodeBaseline, kAttentionDecodeAvx2, kAttentionDecodeAvx512);
  const int64_t heads = p.batch * p.kv_heads, elements = 2 * p.capacity / p.splits * p.d;
  const auto grain = [&](int64_t each) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, each)); };
  parallel_for(0, heads * p.splits, grain(elements), [&](int64_t first, int64_t last) {
    std::vector<Line> scratch(static_cast<size_t>(kernels.scratch_floats(p) + 15) / 16);
    kernels.run(p, first, last, scratch.data()->values);
  });
  if (p.splits == 1) return;
  parallel_for(0, heads, grain(p.splits * p.rows() * p.d), [&](int64_t first, int64_t last) { kernels.merge(p, first, last); });
}

}  // namespace genfast
