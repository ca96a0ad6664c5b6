#include "attention_backward_cpu.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "../../core/cpu_isa.h"
#include "../../core/parallel.h"
#include "attention_cpu_threads.h"

namespace genfast {
namespace {

constexpr int64_t kUnits = 16;             // as many threads find work, where the heads are fewer
constexpr int64_t kSplitRows = 128;        // queries of a unit, at least
constexpr int64_t kSplitFloats = 1 << 26;  // of key_sums; two splits are always allowed

const AttentionBackwardKernels& pick(const AttentionParams& p) {
#if defined(__x86_64__)
  if (p.dtype == DType::BF16 && has_tiles()) return kAttentionBackwardAmx;
#endif
  return GENFAST_PICK_ISA(kAttentionBackwardBaseline, kAttentionBackwardAvx2, kAttentionBackwardAvx512);
}

// Nothing but shapes enters, so that the order of sums, and with it every bit, is the same for any number of threads.
AttentionBackwardPlan plan_of(const AttentionBackwardParams& params, const AttentionBackwardKernels& kernels, int64_t key_sums) {
  const AttentionParams& p = params.forward;
  AttentionBackwardPlan plan{};
  plan.batches = params.dbias && params.dbias_at.batch == 0 ? p.batch : 1;
  plan.kv_heads = params.dbias && params.dbias_at.head == 0 ? p.kv_heads : 1;
  const int64_t groups = p.batch / plan.batches * (p.kv_heads / plan.kv_heads);
  const int64_t wanted = std::min((kUnits + groups - 1) / groups, (p.n + kSplitRows - 1) / kSplitRows);
  plan.splits = std::min(wanted, std::max<int64_t>(2, kSplitFloats / key_sums));
  plan.rows = ((p.n + plan.splits - 1) / plan.splits + kernels.block_rows - 1) / kernels.block_rows * kernels.block_rows;
  plan.splits = (p.n + plan.rows - 1) / plan.rows;
  plan.units = groups * plan.splits;
  return plan;
}

}  // namespace

void launch_attention_backward_cpu(const AttentionBackwardParams& params) {
  const AttentionParams& p = params.forward;
  const AttentionBackwardKernels& kernels = pick(p);
  const int64_t key_sums = p.batch * p.kv_heads * kernels.key_sums(p);
  AttentionBackwardPlan plan = plan_of(params, kernels, key_sums);
  const Aligned sums = aligned_bytes(plan.splits == 1 ? 0 : plan.splits * key_sums * 4);
  plan.key_sums = reinterpret_cast<float*>(sums.get());

  int64_t biases = 0;
  Aligned bias_sums;
  if (params.dbias) {
    biases = (params.dbias_at.batch ? p.batch : 1) * (params.dbias_at.head ? p.heads : 1) * (params.dbias_at.row ? p.n : 1) *
             (params.dbias_column ? p.m : 1);
    plan.dbias = params.dbias;
    if (!params.dbias_at.row && plan.splits > 1) {
      plan.dbias_split = biases;
      bias_sums = aligned_bytes(plan.splits * biases * 4);
      plan.dbias = reinterpret_cast<float*>(bias_sums.get());
    }
    const int64_t written = plan.dbias_split ? plan.splits * biases : biases;
    parallel_for(0, written, 1 << 16, [&](int64_t first, int64_t last) { std::fill(plan.dbias + first, plan.dbias + last, 0.0f); });
  }

  const int64_t products = 5 * (p.batch * p.heads * p.n * p.m * p.d / plan.units);
  std::atomic<int64_t> next{0};  // units differ in length under causality: each thread takes the next
  parallel_for(0, plan.units, grain(products), [&](int64_t, int64_t) {
    const Aligned scratch = aligned_bytes(kernels.scratch_bytes(params, plan));
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < plan.units;) kernels.run(params, plan, unit, scratch.get());
  });
  if (plan.splits > 1) {
    const int64_t blocks = p.batch * p.kv_heads * ((p.m + kernels.keys - 1) / kernels.keys);
    parallel_for(0, blocks, grain(4 * kernels.keys * p.d), [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) kernels.store_keys(params, plan, block);
    });
  }
  if (plan.dbias_split) {
    parallel_for(0, biases, 1 << 14, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float sum = 0;
        for (int64_t s = 0; s < plan.splits; ++s) sum += plan.dbias[s * biases + i];
        params.dbias[i] = sum;
      }
    });
  }
}

}  // namespace genfast
