// The per-ISA builds of modulate_bias_act; modulate_bias_act_cpu.cpp shares the units among threads and adds up the partial sums.
#pragma once
#include "params.h"

namespace genfast {

struct ModulateTask {
  ModulateParams p;
  void* partial;   // T (units, 3, channels), or nullptr: forward
  int64_t chunk;   // pixels of a unit
  int64_t chunks;  // of a sample
};

struct ModulateKernels {
  void (*units)(const ModulateTask&, int64_t first, int64_t last);  // chunks, sample by sample
};

extern const ModulateKernels kModulateBaseline;
extern const ModulateKernels kModulateAvx2;
extern const ModulateKernels kModulateAvx512;

}  // namespace genfast
