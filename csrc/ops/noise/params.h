// What one launch of the noise fill needs. docs/noise.md is the specification. Torch-free.
#pragma once
#include <cstdint>

#include "../../core/dtype.h"

namespace genfast {

struct NoiseParams {
  void* out;             // (batch, per_sample), dense
  const int64_t* seeds;  // (batch,), each in [0, 2^63)
  int64_t batch;
  int64_t per_sample;
  int64_t channels;  // 1: C-order; else channels_last: storage p = s * channels + c, logical e = c * (per_sample / channels) + s
  uint32_t draw;
  uint32_t stream;
  DType dtype;
  bool uniform;  // false: normal
};

}  // namespace genfast
