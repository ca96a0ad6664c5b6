#include "../../core/cpu_isa.h"
#include "attention_cpu_impl.h"

namespace genfast {
const AttentionKernels GENFAST_FOR_ISA(kAttention){kFmaQueries, fma_scratch_bytes, fma_run};
}
