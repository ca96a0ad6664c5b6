// The row as the CPU kernels take it, and the table of what is compiled once per instruction set. solver_step_cpu.cpp reads the
// row, cuts the work into units and picks a table; solver_step_cpu_impl.h is the arithmetic.
#pragma once
#include "params.h"

namespace genfast {

// One row, read on the host. Coefficients are doubles that hold exactly what the table held; kernels narrow them to T.
struct Step {
  const SolverStepParams* p;
  // Without noise, watch or per-sample reductions the batch is one long sample.
  int64_t batch, per_sample;
  double ax, am, guidance, clip, next_c_in;
  double coef[kMaxOutputs][kTerms];
  int64_t draw, row;
  int outputs, history;  // history counts only terms that some output uses
  const void* history_slot[kMaxHistory];
  void* output_slot[kMaxOutputs];
  bool rescale, threshold, noise;  // of this row
  bool needs_x, needs_d, needs_m;
  bool stream[kMaxOutputs];  // write past the caches
  const double* factors;     // (batch, 2) rescale factor and threshold of each sample; read if rescale or threshold
};

constexpr int kSumLanes = 256;  // lanes of the fixed summation tree of the rescale sums

struct SolverStepKernels {
  // Units are numbered through the batch: unit u is chunk u % chunks of sample u / chunks, of kChunk elements in storage order.
  void (*rows)(const Step&, int64_t first_unit, int64_t last_unit);
  // sums[4u ...] = sum cond, sum cond^2, sum guided, sum guided^2 of unit u.
  void (*sums)(const Step&, double* sums, int64_t first_unit, int64_t last_unit);
  // |d| of elements 0, stride, 2 stride, ... (count of them) of a sample, as T, to out.
  void (*magnitudes)(const Step&, int64_t sample, int64_t stride, int64_t count, void* out);
  // Those |d| of elements begin .. end - 1 of a sample that are at least `bound`, as T, to out, which has room for all of them
  // and 16 more. Returns how many; -1 if any d is NaN.
  int64_t (*candidates)(const Step&, int64_t sample, int64_t begin, int64_t end, double bound, void* out);
};

extern const SolverStepKernels kSolverStepBaseline;
extern const SolverStepKernels kSolverStepAvx2;
extern const SolverStepKernels kSolverStepAvx512;

}  // namespace genfast
