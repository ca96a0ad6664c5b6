#include "attention_cpu_impl.h"

namespace genfast {
const AttentionKernels kAttentionAvx2{kFmaQueries, fma_scratch_bytes, fma_run};
}
