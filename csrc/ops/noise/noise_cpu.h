// The per-ISA builds of the noise fill; noise_cpu.cpp picks one.
#pragma once
#include "params.h"

namespace genfast {

constexpr int64_t kNoiseUnit = 4096;  // storage elements of a sample; the unit that is shared among threads

struct NoiseKernels {
  // Units are numbered through the batch: unit u is unit u % per_sample_units of sample u / per_sample_units.
  void (*fill)(const NoiseParams&, int64_t first_unit, int64_t last_unit);
};

extern const NoiseKernels kNoiseBaseline;
extern const NoiseKernels kNoiseAvx2;
extern const NoiseKernels kNoiseAvx512;

}  // namespace genfast
