#include "attention_backward.cuh"

namespace genfast {

void launch_attention_backward_bf16(const AttentionBackwardParams& p, void* stream) {
  launch_backward<BFloat16>(p, stream);
}

}  // namespace genfast
