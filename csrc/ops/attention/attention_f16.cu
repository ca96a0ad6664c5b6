#include "attention_forward.cuh"

namespace genfast {

void launch_attention_f16(const AttentionParams& p, void* stream) {
  launch_forward<Float16>(p, stream);
}

}  // namespace genfast
