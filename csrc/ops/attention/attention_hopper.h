// Which launches Hopper's own kernels take. Off unless GENFAST_ATTENTION_HOPPER asks for it: none has run on a GPU yet.
#pragma once
#include <cstdlib>
#include <cstring>

#include "../../core/launch.h"
#include "params.h"

namespace genfast {

void launch_attention_hopper_bf16(const AttentionParams& p, void* stream);
void launch_attention_hopper_f16(const AttentionParams& p, void* stream);
void launch_attention_backward_hopper_bf16(const AttentionBackwardParams& p, void* stream);
void launch_attention_backward_hopper_f16(const AttentionBackwardParams& p, void* stream);

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

inline bool hopper_backward_can(const AttentionBackwardParams& p) {
  const AttentionParams& f = p.forward;
  const auto queries = [&](const void* data, const AttentionRows& at) { return mappable(data, at, f.n, f.heads, f.batch); };
  const auto keys = [&](const void* data, const AttentionRows& at) { return mappable(data, at, f.m, f.kv_heads, f.batch); };
  return gf_device::compute_capability() == 90 && f.dtype != DType::F32 && !f.bias && !f.mask && f.d % 8 == 0 && f.d <= 128 &&
         f.scale > 0.0f && queries(f.q, f.q_at) && queries(p.grad_o, p.grad_o_at) && queries(p.dq, p.dq_at) && keys(f.k, f.k_at) &&
         keys(f.v, f.v_at) && keys(p.dk, p.dk_at) && keys(p.dv, p.dv_at);
}

// A guess too: heads that fill most of a kernel's width, and blocks for every multiprocessor in both of its kernels.
inline bool hopper_backward_pays(const AttentionBackwardParams& p) {
  const AttentionParams& f = p.forward;
  const auto fills = [&](int64_t rows, int64_t heads) { return (rows + 127) / 128 * heads * f.batch >= gf_device::multiprocessors(); };
  return ((f.d > 48 && f.d <= 64) || f.d > 96) && fills(f.n, f.heads) && fills(f.m, f.kv_heads);
}

// GENFAST_ATTENTION_HOPPER=1: where it should pay; all: wherever it can run. Read at each launch, so that one process can time both.
inline bool hopper_wanted(bool pays) {
  const char* wish = std::getenv("GENFAST_ATTENTION_HOPPER");
  return wish && (!std::strcmp(wish, "all") || (!std::strcmp(wish, "1") && pays));
}

inline bool launch_attention_hopper(const AttentionParams& p, void* stream) {
  if (!hopper_wanted(hopper_pays(p)) || !hopper_can(p)) return false;
  p.dtype == DType::BF16 ? launch_attention_hopper_bf16(p, stream) : launch_attention_hopper_f16(p, stream);
  return true;
}

inline bool launch_attention_backward_hopper(const AttentionBackwardParams& p, void* stream) {
  if (!hopper_wanted(hopper_backward_pays(p)) || !hopper_backward_can(p)) return false;
  p.forward.dtype == DType::BF16 ? launch_attention_backward_hopper_bf16(p, stream) : launch_attention_backward_hopper_f16(p, stream);
  return true;
}

}  // namespace
}  // namespace genfast
