// What one launch of attention_decode needs. Torch-free: shared by the CPU kernels, the CUDA kernels and the emulator.
// docs/attention.md, "Decoding".
#pragma once
#include <cstdint>

#include "../../core/dtype.h"
#include "../../core/row_stats.h"

namespace genfast {

constexpr int kDecodeQueries = 16;  // of one sample, at most

// Strides in elements; a dimension that is broadcast has stride 0. The last dimension has stride 1 (or 0 where it is broadcast).
struct DecodeRows {
  int64_t batch, head, row;
};

// What is joined of each part of a row.
struct PartStats {
  float row_max, row_sum;
};

struct AttentionDecodeParams {
  const void* q;          // (batch, heads, n, d)
  const void* k;          // (batch, kv_heads, capacity, d); query head h reads head h / (heads / kv_heads)
  const void* v;          // (batch, kv_heads, capacity, d)
  const void* lengths;    // (batch) int64 or int32: keys in use; clamped to 0 ... capacity
  const void* bias;       // (batch, heads, n, capacity) float32 or `dtype`, or nullptr
  void* o;                // (batch, heads, n, d)
  float* lse;             // (batch, heads, n), dense: natural logarithm of the sum of the exponentials of the scores
  float* parts;           // (batch, kv_heads, splits, heads / kv_heads, n, d), dense: each part's output; unused where splits is 1
  PartStats* part_stats;  // (batch, kv_heads, splits, heads / kv_heads, n), dense: of each part's keys
  DecodeRows q_at, k_at, v_at, bias_at, o_at;
  int64_t batch, heads, kv_heads, n, capacity, d, splits;
  ScoreUnit unit;  // which holds the scale
  bool causal;     // query i sees keys 0 ... i + length - n
  bool wide_lengths;
  DType dtype;  // of q, k, v, o: F32, BF16 or F16
  DType bias_dtype;

  // The rows that share a key head: group() heads of n queries, queries innermost.
  constexpr int64_t group() const { return heads / kv_heads; }
  constexpr int64_t rows() const { return group() * n; }
  constexpr int64_t length(int64_t b) const {
    const int64_t keys = wide_lengths ? static_cast<const int64_t*>(lengths)[b] : static_cast<const int32_t*>(lengths)[b];
    return keys < 0 ? 0 : keys < capacity ? keys : capacity;
  }
  // Keys of every part but the last ones, which may have fewer or none.
  constexpr int64_t part_keys(int64_t length) const { return (length + splits * 16 - 1) / (splits * 16) * 16; }
  constexpr int64_t visible(int64_t length, int64_t query) const { return causal ? length - n + 1 + query : length; }
};

}  // namespace genfast
