#include <algorithm>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../../core/cpu_isa.h"
#include "../../core/parallel.h"
#include "attention_cpu.h"
#include "attention_cpu_threads.h"

namespace genfast {
namespace {

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bfloat16 and the system lets this process: Linux saves the tiles only of those that ask.
bool processor_has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // amx-bf16, amx-tile
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;                     // avx512-bf16
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const AttentionKernels& pick(const AttentionParams& p) {
#if defined(__x86_64__)
  if (p.dtype == DType::BF16 && has_tiles()) return kAttentionAmx;
#endif
  return GENFAST_PICK_ISA(kAttentionBaseline, kAttentionAvx2, kAttentionAvx512);
}

}  // namespace

bool has_tiles() {
#if defined(__x86_64__)
  static const bool tiles = processor_has_tiles();
  return tiles && cpu_isa() == kAvx512;
#else
  return false;
#endif
}

void launch_attention_cpu(const AttentionParams& p) {
  const AttentionKernels& kernels = pick(p);
  const int64_t units = p.batch * p.heads * query_blocks(p, kernels.queries);
  const int64_t products = 2 * std::min<int64_t>(kernels.queries, p.n) * p.m * p.d;
  parallel_for(0, units, grain(products), [&](int64_t first, int64_t last) {
    const Aligned scratch = aligned_bytes(kernels.scratch_bytes(p));
    kernels.run(p, first, last, scratch.get());
  });
}

}  // namespace genfast
