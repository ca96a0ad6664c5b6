#include "attention_cpu_impl.h"

namespace genfast {
const AttentionKernels kAttentionAvx512{kFmaQueries, fma_scratch_bytes, fma_run};
}
