#include "attention_decode_cpu_impl.h"

namespace genfast {
const AttentionDecodeKernels kAttentionDecodeBaseline{scratch_floats, run, merge};
}
