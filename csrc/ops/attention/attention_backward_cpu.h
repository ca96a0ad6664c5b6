// The per-ISA builds of the backward pass; attention_backward_cpu.cpp picks one.
#pragma once
#include <cstddef>

#include "attention_cpu.h"

namespace genfast {

// How the work is divided. A unit is some heads of keys of some samples, and a range of the queries that read them: all heads that
// share an element of the bias's gradient are one unit's, so each sum has one order, whatever the number of threads.
struct AttentionBackwardPlan {
  int64_t batches, kv_heads;  // of a unit
  int64_t splits, rows;       // ranges of queries, and their length
  int64_t units;
  // Of several splits: (splits, batch, kv_heads, m / keys, 2, height, keys), by blocks of keys: dk / scale and dv, transposed.
  float* key_sums;
  float* dbias;         // params.dbias, or (splits, the same) where its rows are summed over
  int64_t dbias_split;  // from one split's to the next
};

struct AttentionBackwardKernels {
  int block_rows;                                                                         // queries are divided at multiples of it
  int keys;                                                                               // of a block
  int64_t (*key_sums)(const AttentionParams&);                                            // of one head of keys
  size_t (*scratch_bytes)(const AttentionBackwardParams&, const AttentionBackwardPlan&);  // that one thread works in, 64-byte aligned
  void (*run)(const AttentionBackwardParams&, const AttentionBackwardPlan&, int64_t unit, void* scratch);
  // The sums of one block of keys, in the order of the splits, to dk and dv. Numbered through batch, kv_heads and blocks.
  void (*store_keys)(const AttentionBackwardParams&, const AttentionBackwardPlan&, int64_t block);
};

extern const AttentionBackwardKernels kAttentionBackwardBaseline;
extern const AttentionBackwardKernels kAttentionBackwardAvx2;
extern const AttentionBackwardKernels kAttentionBackwardAvx512;
extern const AttentionBackwardKernels kAttentionBackwardAmx;

}  // namespace genfast
