#include "attention_tangent.cuh"

namespace genfast {

void launch_attention_tangent_cuda(const AttentionTangentParams& p, void* stream) {
  check(p.forward.d <= 256 && p.forward.dtype != DType::F32 && gf_device::compute_capability() >= 80, "q: got a head dimension of ",
        p.forward.d, ", supported: up to 256, bfloat16 and float16, on sm_80 and newer");
  p.forward.dtype == DType::BF16 ? launch_tangent<BFloat16>(p, stream) : launch_tangent<Float16>(p, stream);
}

}  // namespace genfast
