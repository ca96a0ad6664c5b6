#include "../../core/cpu_isa.h"
#include "attention_decode_cpu_impl.h"

namespace genfast {
const AttentionDecodeKernels GENFAST_FOR_ISA(kAttentionDecode){scratch_floats, run, merge};
}
