// The per-ISA builds of bn_act; bn_act_cpu.cpp cuts the work into units, picks one and adds up the partial sums.
#pragma once
#include "params.h"

namespace genfast {

struct BnActTask {
  BnActParams p;
  const void* coef;               // T: coefficient k of sample s from s * coef_sample + k * coef_row on
  int64_t coef_sample, coef_row;  // there are as many of each as channels, or with short rows `repeat`
  void* partial;                  // T: (2, units, 1 or repeat): sums of a unit, with short rows by place; nullptr without sums
  int64_t units;
  int64_t depth, chunks;  // long rows: rows of a unit, units of a row; one of the two is 1
  int64_t blocks;         // of a sample: runs of `depth` rows of a channel, or of `block` elements of short rows
  int64_t repeat;         // short rows: coefficients and sums repeat after so many elements, whole periods and whole vectors
  int64_t block;          // elements of a block of short rows: a multiple of repeat
};

struct BnActKernels {
  // Units: (samples, blocks, channels, chunks) of long rows, (samples, blocks) of short ones.
  void (*rows)(const BnActTask&, bool is_short, int64_t first, int64_t last);
};

extern const BnActKernels kBnActBaseline;
extern const BnActKernels kBnActAvx2;
extern const BnActKernels kBnActAvx512;

}  // namespace genfast
