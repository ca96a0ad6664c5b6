#include "attention_backward_cpu_impl.h"

namespace genfast {
const AttentionBackwardKernels kAttentionBackwardAvx512{
    FmaEngine::kBlockRows, FmaEngine::kKeys, key_sums_of<FmaEngine>, backward_scratch_bytes<FmaEngine>, fma_backward_run, fma_store_keys};
}
