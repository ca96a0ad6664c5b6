// What one launch of the solver step needs. Torch-free: shared by the CPU kernels, the CUDA kernel and the emulator.
// docs/solver-step.md is the specification of the arithmetic; genfast/ops/solver_step.py packs the rows.
#pragma once
#include <cstdint>

#include "../../core/dtype.h"

namespace genfast {

constexpr int kMaxSlots = 16;   // slots in the ring (or tensors of the functional form)
constexpr int kMaxHistory = 6;  // history terms of one row
constexpr int kMaxOutputs = 3;  // outputs of one row
constexpr int kTerms = 10;      // x, d, m, h0..h5, noise
constexpr int kRowFloats = 40;  // 8 scalars + kMaxOutputs * kTerms coefficients + 2 spare
constexpr int kRowInts = 12;    // draw, n_out, n_hist, 6 history slots, 3 output slots

// Offsets into a row of coefficients. A coefficient of exactly zero means: the term is absent and is not read.
enum RowFloat : int {
  kAx = 0,  // d = ax * x + am * m
  kAm = 1,
  kGuidance = 2,  // m = uncond + g * (cond - uncond)
  kClip = 3,      // 0: off; else d is clamped to [-clip, clip]
  kNextCIn = 4,   // 0: off; else model_input = c_in * out0
  kRescale = 5,   // guidance rescale phi (Lin et al. 2024, equations 14-16); 0: off
  kQuantile = 6,  // dynamic threshold (Saharia et al. 2022, section 2.3): quantile of |d| per sample; 0: off
  kMaxThreshold = 7,
  kCoef = 8,  // C[output][term] at kCoef + output * kTerms + term
};
enum Term : int { kTermX = 0, kTermD = 1, kTermM = 2, kTermH = 3, kTermNoise = 9 };
enum RowInt : int { kDraw = 0, kNumOut = 1, kNumHist = 2, kHistSlot = 3, kOutSlot = 9 };

// Reductions (guidance rescale) run over chunks of this many elements of a sample, whatever the thread count.
constexpr int64_t kChunk = 4096;

struct SolverStepParams {
  void* slot[kMaxSlots];   // slot k: (batch, per_sample), dense, one layout for all; slot 0 is the state x
  const void* cond;        // (batch, per_sample) model output, same layout
  const void* uncond;      // same, or nullptr: no guidance
  void* model_input;       // (copies * batch, per_sample) in dtype `input`, or nullptr
  const void* coef;        // (rows, kRowFloats) float, or double when state is F64
  const int64_t* index;    // (rows, kRowInts)
  const int64_t* counter;  // (1,) the row to execute; device memory on CUDA
  const int64_t* seeds;    // (batch,) or nullptr when no row draws noise
  int64_t* watch;          // (batch,) or nullptr: smallest row whose output 0 was not finite
  double* workspace;       // workspace_doubles() doubles, or nullptr when neither rescale nor threshold
  int64_t batch;
  int64_t per_sample;  // elements of one sample
  int64_t channels;    // 1: C-order; else channels_last: storage p = s * channels + c, logical e = c * (per_sample / channels) + s
  int32_t num_slots;
  int32_t copies;  // copies of the model input: 2 when both halves of guidance run as one batch
  DType state, model, input;
  bool rescale, threshold;  // whether any row of the table asks for them: decides the number of launches
};

constexpr int64_t chunks_per_sample(int64_t per_sample) {
  return (per_sample + kChunk - 1) / kChunk;
}
// Per sample: {rescale factor, threshold}, then per chunk: {sum cond, sum cond^2, sum guided, sum guided^2}.
constexpr int64_t workspace_doubles(int64_t batch, int64_t per_sample) {
  return batch * (2 + 4 * chunks_per_sample(per_sample));
}

}  // namespace genfast
