#include "attention_decode_cpu_impl.h"

namespace genfast {
const AttentionDecodeKernels kAttentionDecodeAvx512{scratch_floats, run, merge};
}
