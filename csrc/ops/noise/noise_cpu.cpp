#include <algorithm>

#include "../../core/cpu_isa.h"
#include "../../core/parallel.h"
#include "noise_cpu.h"

namespace genfast {

void launch_noise_cpu(const NoiseParams& p) {
  const NoiseKernels& kernels = GENFAST_PICK_ISA(kNoiseBaseline, kNoiseAvx2, kNoiseAvx512);
  const int64_t units = p.batch * ((p.per_sample + kNoiseUnit - 1) / kNoiseUnit);
  const int64_t grain = std::max<int64_t>(1, 16384 * units / (p.batch * p.per_sample));  // about 16384 elements a thread at least
  parallel_for(0, units, grain, [&](int64_t first, int64_t last) { kernels.fill(p, first, last); });
}

}  // namespace genfast
