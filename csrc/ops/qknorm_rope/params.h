// What the norm of queries and keys with rotary embedding needs. docs/attention.md is the specification. Torch-free.
#pragma once
#include <cstdint>

#include "../../core/dtype.h"

namespace genfast {

enum class QkNorm : int32_t { None = 0, Rms = 1, Layer = 2 };

struct QkRows {  // where row (b, h, n) of a (batch, heads, tokens, head_dim) tensor begins, in elements; a row is dense
  int64_t b = 0, h = 0, n = 0;
};
constexpr int64_t row_at(const QkRows& at, int64_t b, int64_t h, int64_t n) {
  return b * at.b + h * at.h + n * at.n;
}

// The queries or the keys. T: float, or double for F64.
struct QkSide {
  void* out;           // (batch, heads, tokens, head_dim): the result, or backward the gradient of x
  const void* x;       // likewise
  const void* grad;    // likewise: the gradient of the result; nullptr forward
  const void* weight;  // T (head_dim) or (heads, head_dim), or nullptr for ones
  const void* bias;    // likewise, or nullptr for zeros
  double* sums;        // (2, weight_heads, head_dim): the gradients of weight and, where there is one, bias; or nullptr
  QkRows out_at, x_at, grad_at;
  int64_t heads;         // 0: there is no such side
  int64_t weight_heads;  // 1 or heads; also of the bias
};

struct QkNormRopeParams {
  QkSide side[2];
  const void* cos;  // T (batch or 1, tokens, rotary / 2), or nullptr
  const void* sin;
  void* partial;             // CUDA backward: T, partial_values() of workspace; else nullptr
  int64_t table_b, table_n;  // strides of cos and sin, elements
  int64_t batch, tokens, head_dim;
  int64_t rotary;  // even, at most head_dim; 0: nothing turns
  double eps;
  QkNorm norm;
  bool across_heads;  // the heads of a token are normalised together
  bool interleaved;   // pairs (2i, 2i + 1), else (i, i + rotary / 2)
  DType dtype;
};

constexpr int64_t kQkMaxHeadDim = 1024;

// The gradients of the weights are added up in this order: over a chunk of tokens in T, then over chunks in double. The chunks depend on
// the sizes alone, so the bits depend on nothing else.
constexpr int64_t qk_chunk(int64_t tokens) {
  const int64_t needed = (tokens + 1023) / 1024;
  return needed < 16 ? 16 : needed;
}
constexpr int64_t qk_chunks(int64_t tokens) {
  return (tokens + qk_chunk(tokens) - 1) / qk_chunk(tokens);
}
// CUDA: the partial sums are (2 of the weight and the bias, chunks, heads, head_dim), of the queries, then of the keys.
constexpr int64_t partial_values(const QkNormRopeParams& p) {
  return 2 * qk_chunks(p.batch * p.tokens) * (p.side[0].heads + p.side[1].heads) * p.head_dim;
}

}  // namespace genfast
