// The per-ISA builds of upfirdn2d; upfirdn2d_cpu.cpp lays out the work and picks one.
#pragma once
#include "params.h"

namespace genfast {

// Where one tap of an output finds its element in a padded row.
struct PhaseTap {
  int64_t offset;
  int64_t tap;
};

// A unit is a strip of output rows: of one plane, or of one image where channels are last. Outputs x = q * residues + r of one residue r
// have the same taps, `advance` elements further for each q. So that a vector of them reads a vector of elements, a padded row holds its
// elements by their position modulo `advance`, one part of `part` elements after another.
struct Upfirdn2dTask {
  Upfirdn2dParams p;
  int64_t strip_rows, strips, input_rows;  // output rows and strips of a plane; the most input rows that a strip meets
  int64_t residues, advance, part, left;   // left: zeros before a row's first element, a multiple of advance
  const PhaseTap* taps;                    // of residue r: taps[first[r]] .. taps[first[r + 1] - 1]
  const int64_t* first;
  int64_t line;     // elements of a line of intermediate results, padded to whole vectors
  int64_t scratch;  // elements of T that a thread needs
};

constexpr int64_t kMaxVector = 16;          // lanes of the widest vector
constexpr int64_t kBlock = 4 * kMaxVector;  // outputs of one residue that are computed at once, at most

struct Upfirdn2dKernels {
  // scratch: task.scratch elements of T, zero.
  void (*strips)(const Upfirdn2dTask&, int64_t first, int64_t last, void* scratch);
};

extern const Upfirdn2dKernels kUpfirdn2dBaseline;
extern const Upfirdn2dKernels kUpfirdn2dAvx2;
extern const Upfirdn2dKernels kUpfirdn2dAvx512;

}  // namespace genfast
