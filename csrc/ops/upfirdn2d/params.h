// What one launch of upfirdn2d needs. docs/gan-ops.md is the specification. Torch-free.
#pragma once
#include <cstdint>

#include "../../core/dtype.h"
#include "../../core/fir.h"

namespace genfast {

struct Upfirdn2dParams {
  void* out;       // (batch, channels, y.out, x.out), or channels last
  const void* in;  // (batch, channels, y.in, x.in), laid out as out
  const void* fx;  // separable: (x.taps,), else (y.taps, x.taps); float, or double for F64
  const void* fy;  // separable: (y.taps,), else nullptr
  int64_t batch, channels;
  bool channels_last;
  FirAxis x, y;
  DType dtype;
};

}  // namespace genfast
