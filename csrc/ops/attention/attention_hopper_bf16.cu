#include "attention_hopper.cuh"

namespace genfast {

void launch_attention_hopper_bf16(const AttentionParams& p, void* stream) {
  launch_hopper<BFloat16>(p, stream);
}

}  // namespace genfast
