#include "attention_forward.cuh"

namespace genfast {

void launch_attention_bf16(const AttentionParams& p, void* stream) {
  launch_forward<BFloat16>(p, stream);
}

}  // namespace genfast
