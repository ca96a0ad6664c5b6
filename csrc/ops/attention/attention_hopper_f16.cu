#include "attention_hopper.cuh"

namespace genfast {

void launch_attention_hopper_f16(const AttentionParams& p, void* stream) {
  launch_hopper<Float16>(p, stream);
}

}  // namespace genfast
