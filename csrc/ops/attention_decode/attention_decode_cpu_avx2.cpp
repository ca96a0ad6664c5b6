#include "attention_decode_cpu_impl.h"

namespace genfast {
const AttentionDecodeKernels kAttentionDecodeAvx2{scratch_floats, run, merge};
}
