// The per-ISA builds of qknorm_rope; qknorm_rope_cpu.cpp cuts the tokens into units, picks one and adds up the partial sums.
#pragma once
#include "params.h"

namespace genfast {

constexpr int64_t kQkLane = 16;  // rows of partial sums are padded to whole vectors
constexpr int64_t qk_padded(int64_t head_dim) {
  return (head_dim + kQkLane - 1) / kQkLane * kQkLane;
}

struct QkNormRopeTask {
  QkNormRopeParams p;
  // T (units, values): the sums of a unit: for each side that has them (2, weight_heads, qk_padded(head_dim)); nullptr without.
  void* partial;
  int64_t chunk;      // tokens of a unit
  int64_t values;     // of a unit's sums
  int64_t offset[2];  // where a side's begin
};

struct QkNormRopeKernels {
  void (*forward)(const QkNormRopeTask&, int64_t first_token, int64_t last_token);
  void (*backward)(const QkNormRopeTask&, int64_t first_unit, int64_t last_unit);
};

extern const QkNormRopeKernels kQkNormRopeBaseline;
extern const QkNormRopeKernels kQkNormRopeAvx2;
extern const QkNormRopeKernels kQkNormRopeAvx512;

}  // namespace genfast
