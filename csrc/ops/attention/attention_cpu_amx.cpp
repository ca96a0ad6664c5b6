#include "attention_cpu_amx.h"

#include "attention_cpu_impl.h"

namespace genfast {
namespace {

void amx_run(const AttentionParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  const Tiles tiles;
  run_typed<AmxEngine, BFloat16>(p, first_unit, last_unit, static_cast<char*>(scratch));
}

}  // namespace

const AttentionKernels kAttentionAmx{kAmxQueries, scratch_bytes_of<AmxEngine>, amx_run};

}  // namespace genfast
