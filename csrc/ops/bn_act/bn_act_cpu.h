// The per-ISA builds of bn_act; bn_act_cpu.cpp cuts the work into units, picks one and adds up the partial sums.
#pragma once
#include "params.h"

namespace genfast {

struct BnActTask {
  BnActParams p;
  const void* coef;  // T: long rows (kBnCoefficients, samples, channels); short rows (samples, kBnCoefficients, repeat)
  void* partial;     // T: (2, units, 1 or repeat): sums of a chunk of a long row, or of a block by place; nullptr without sums
  int64_t units;
  int64_t chunks;  // of a long row
  int64_t blocks;  // of a sample's short rows
  int64_t repeat;  // short rows: coefficients and sums repeat after so many elements, whole periods and whole vectors
  int64_t block;   // elements of a block of short rows: a multiple of repeat
};

struct BnActKernels {
  // Units: chunks of long rows, row by row, or blocks of short ones, sample by sample.
  void (*rows)(const BnActTask&, bool is_short, int64_t first, int64_t last);
};

extern const BnActKernels kBnActBaseline;
extern const BnActKernels kBnActAvx2;
extern const BnActKernels kBnActAvx512;

}  // namespace genfast
