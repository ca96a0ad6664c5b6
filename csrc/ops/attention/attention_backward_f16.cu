#include "attention_backward.cuh"

namespace genfast {

void launch_attention_backward_f16(const AttentionBackwardParams& p, void* stream) {
  launch_backward<Float16>(p, stream);
}

}  // namespace genfast
