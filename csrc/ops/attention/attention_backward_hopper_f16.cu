#include "attention_backward_hopper.cuh"

namespace genfast {

void launch_attention_backward_hopper_f16(const AttentionBackwardParams& p, void* stream) {
  launch_hopper_backward<Float16>(p, stream);
}

}  // namespace genfast
