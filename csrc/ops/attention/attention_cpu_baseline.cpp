#include "attention_cpu_impl.h"

namespace genfast {
const AttentionKernels kAttentionBaseline{kFmaQueries, fma_scratch_bytes, fma_run};
}
