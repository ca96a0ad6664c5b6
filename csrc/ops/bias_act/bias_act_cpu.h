// The per-ISA builds of bias_act; bias_act_cpu.cpp cuts the work into units, picks one and adds up the partial sums.
#pragma once
#include "params.h"

namespace genfast {

// Short rows: bias and sums repeat after `repeat` elements, a whole number of periods and of vectors of any instruction set.
struct BiasActTask {
  BiasActParams p;
  const void* bias;  // short rows: (repeat,) in the type of the arithmetic T, or nullptr; long rows: p.b
  void* partial;     // T: long rows (outer, channels, chunks); short rows (blocks, repeat); nullptr without sums
  int64_t chunks;    // of a long row
  int64_t repeat;
  int64_t block;  // elements of a block of short rows: a multiple of repeat
};

struct BiasActKernels {
  void (*long_rows)(const BiasActTask&, int64_t first, int64_t last);   // units: chunks of rows, row by row
  void (*short_rows)(const BiasActTask&, int64_t first, int64_t last);  // units: blocks
};

extern const BiasActKernels kBiasActBaseline;
extern const BiasActKernels kBiasActAvx2;
extern const BiasActKernels kBiasActAvx512;

}  // namespace genfast
