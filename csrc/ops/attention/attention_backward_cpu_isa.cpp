#include "../../core/cpu_isa.h"
#include "attention_backward_cpu_impl.h"

namespace genfast {
const AttentionBackwardKernels GENFAST_FOR_ISA(kAttentionBackward){
    FmaEngine::kBlockRows, FmaEngine::kKeys, key_sums_of<FmaEngine>, backward_scratch_bytes<FmaEngine>, fma_backward_run, fma_store_keys};
}
