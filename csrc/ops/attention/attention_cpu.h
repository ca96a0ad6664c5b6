// The per-ISA builds of the forward pass; attention_cpu.cpp picks one.
#pragma once
#include <cstddef>

#include "params.h"

namespace genfast {

constexpr int kFmaQueries = 48;  // queries of one head that are worked on together: the unit shared among threads
constexpr int kAmxQueries = 64;
constexpr int kKeyBlock = 128;  // keys whose scores are held at a time

struct AttentionKernels {
  int queries;  // of one unit
  // Bytes that one thread works in, 64-byte aligned.
  size_t (*scratch_bytes)(const AttentionParams&);
  // Units are numbered through batch, heads and blocks of queries, blocks innermost: neighbours share packed keys and values.
  void (*run)(const AttentionParams&, int64_t first_unit, int64_t last_unit, void* scratch);
};

extern const AttentionKernels kAttentionBaseline;
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
extern const AttentionKernels kAttentionAmx;

inline int64_t query_blocks(const AttentionParams& p, int queries) {
  return (p.n + queries - 1) / queries;
}

}  // namespace genfast
