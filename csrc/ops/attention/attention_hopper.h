// Which launches Hopper's own kernel takes. Off unless GENFAST_ATTENTION_HOPPER asks for it: it has not run on a GPU yet.
#pragma once
#include <cstdlib>
#include <cstring>

#include "../../core/launch.h"
#include "params.h"

namespace genfast {

void launch_attention_hopper_bf16(const AttentionParams& p, void* stream);
void launch_attention_hopper_f16(const AttentionParams& p, void* stream);

namespace {

// Rows that a tensor map can describe: 16-byte aligned, no dimension broadcast by a stride of 0.
inline bool mappable(const void* data, const AttentionRows& at, int64_t rows, int64_t heads, int64_t batch) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 39));
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(rows, at.row) && fits(heads, at.head) && fits(batch, at.batch);
}

inline bool hopper_can(const AttentionParams& p) {
  return gf_device::compute_capability() == 90 && p.dtype != DType::F32 && !p.q_starts && p.d % 8 == 0 && p.d <= 256 && p.scale > 0.0f &&
         p.n < (int64_t{1} << 31) && p.m < (int64_t{1} << 31) && mappable(p.q, p.q_at, p.n, p.heads, p.batch) &&
         mappable(p.k, p.k_at, p.m, p.kv_heads, p.batch) && mappable(p.v, p.v_at, p.m, p.kv_heads, p.batch) &&
         mappable(p.o, p.o_at, p.n, p.heads, p.batch);
}

// The table of shapes, a guess until it is measured: heads wider than 48, long keys, and blocks for every multiprocessor.
inline bool hopper_pays(const AttentionParams& p) {
  return p.d > 48 && p.m > 160 && (p.n + 127) / 128 * p.heads * p.batch >= gf_device::multiprocessors();
}

// GENFAST_ATTENTION_HOPPER=1: where it should pay; all: wherever it can run. Read at each launch, so that one process can time both.
inline bool launch_attention_hopper(const AttentionParams& p, void* stream) {
  const char* wish = std::getenv("GENFAST_ATTENTION_HOPPER");
  const bool all = wish && !std::strcmp(wish, "all");
  if (!(all || (wish && !std::strcmp(wish, "1") && hopper_pays(p))) || !hopper_can(p)) return false;
  p.dtype == DType::BF16 ? launch_attention_hopper_bf16(p, stream) : launch_attention_hopper_f16(p, stream);
  return true;
}

}  // namespace
}  // namespace genfast
