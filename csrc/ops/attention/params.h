// What one launch of attention needs. Torch-free: shared by the CPU kernels, the CUDA kernels and the emulator. docs/attention.md.
#pragma once
#include <cstdint>

#include "../../core/dtype.h"
#include "../../core/row_stats.h"

namespace genfast {

// Strides in elements; a dimension that is broadcast has stride 0. The last dimension has stride 1 (or 0 where it is broadcast).
struct AttentionRows {
  int64_t batch, head, row;
};

struct AttentionParams {
  const void* q;        // (batch, heads, n, d)
  const void* k;        // (batch, kv_heads, m, d); query head h reads head h / (heads / kv_heads)
  const void* v;        // (batch, kv_heads, m, d)
  const void* bias;     // (batch, heads, n, m) float32 or `dtype`, or nullptr
  const uint8_t* mask;  // (batch, heads, n, m), 0: the query does not see the key; or nullptr
  void* o;              // (batch, heads, n, d)
  float* lse;           // (batch, heads, n), dense: natural logarithm of the sum of the exponentials of the scores
  RowStats* row_stats;  // (batch, heads, n), dense: what derivatives need of each row; or nullptr
  AttentionRows q_at, k_at, v_at, bias_at, mask_at, o_at;
  int64_t batch, heads, kv_heads, n, m, d;
  float scale;
  ScoreUnit unit;  // score_unit(bias, scale)
  bool causal;     // query i sees keys 0 ... i + m - n
  DType dtype;     // of q, k, v, o: F32, BF16 or F16
  DType bias_dtype;
  // Sequences of different lengths, one after another (attention_varlen_): (batch + 1) int64 or int32, the rows of q and of k where each
  // begins; else nullptr. Then q_at, ..., o_at have no batch, n and m are the largest lengths, and lse is (heads, packed).
  const void *q_starts, *k_starts;
  int64_t packed, packed_keys;  // rows of q and of k
  bool wide_starts;
};

struct AttentionBackwardParams {
  AttentionParams forward;  // with the o and the row_stats that it gave, which are read
  const void* grad_o;       // (batch, heads, n, d)
  const float* grad_lse;    // (batch, heads, n), dense, or nullptr
  void* dq;                 // (batch, heads, n, d)
  void* dk;                 // (batch, kv_heads, m, d)
  void* dv;                 // (batch, kv_heads, m, d)
  float* dbias;             // the bias's own shape, dense: each dimension whole, or 1 and summed over; or nullptr
  float* delta;             // (batch, heads, n), dense, to work in: sum(grad_o o) - grad_lse
  AttentionRows grad_o_at, dq_at, dk_at, dv_at, dbias_at;
  int64_t dbias_column;  // stride of dbias along the keys: 1, or 0 where they are summed over
};

// Of attention_tangent_: the tangents of q, k, v come in, those of o and lse go out, in the shapes of what they belong to.
struct AttentionTangentParams {
  AttentionParams forward;  // with the o and the row_stats that it gave, which are read
  const void *tq, *tk, *tv;
  void* to;
  float* tlse;
  AttentionRows tq_at, tk_at, tv_at, to_at;
};

}  // namespace genfast
