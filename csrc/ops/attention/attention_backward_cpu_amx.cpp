#include "attention_backward_cpu_impl.h"
#include "attention_cpu_amx.h"

namespace genfast {
namespace {

void amx_backward_run(const AttentionBackwardParams& p, const AttentionBackwardPlan& plan, int64_t unit, void* scratch) {
  const Tiles tiles;
  run_unit<AmxEngine, BFloat16>(p, plan, unit, static_cast<char*>(scratch));
}

}  // namespace

const AttentionBackwardKernels kAttentionBackwardAmx{AmxEngine::kBlockRows,  AmxEngine::kKeys,
                                                     key_sums_of<AmxEngine>, backward_scratch_bytes<AmxEngine>,
                                                     amx_backward_run,       store_keys_typed<AmxEngine, BFloat16>};

}  // namespace genfast
