// One axis of a resampling FIR filter: insert zeros, pad or crop, correlate with the taps, keep every down-th.
//     out[o] = sum_t f[t] z[o * down + t - pad],   z[u] = in[u / up] where up divides u and u / up is inside, else 0
// Only every up-th tap meets an element: out[o] = sum_j f[first_tap + j * up] in[first + j].
#pragma once
#include "exact_math.h"

namespace genfast {

struct FirAxis {
  int64_t in, out;   // sizes
  int64_t up, down;  // at least 1
  int64_t pad;       // before the first element; negative crops
  int64_t taps;
};

// The taps of one output: taps tap, tap + up, ... meet elements begin, begin + 1, ..., end - 1, all inside.
struct FirSpan {
  int64_t tap, begin, end;
};

GF_HD FirSpan fir_span(const FirAxis& a, int64_t o) {
  const int64_t base = o * a.down - a.pad;
  const int64_t before = base % a.up;  // first_tap = -base modulo up
  int64_t tap = before > 0 ? a.up - before : -before;
  int64_t begin = (base + tap) / a.up;
  int64_t end = tap < a.taps ? begin + (a.taps - tap + a.up - 1) / a.up : begin;
  if (begin < 0) {
    tap -= begin * a.up;
    begin = 0;
  }
  begin = begin < a.in ? begin : a.in;
  end = end < a.in ? end : a.in;
  return {tap, begin, end > begin ? end : begin};
}

}  // namespace genfast
