// The per-ISA builds of decoding; attention_decode_cpu.cpp picks one.
#pragma once
#include "params.h"

namespace genfast {

constexpr int kDecodeKeys = 64;  // keys whose scores are held at a time

struct AttentionDecodeKernels {
  int64_t (*scratch_floats)(const AttentionDecodeParams&);  // that one thread works in, 64-byte aligned
  // Units are numbered through batch, key heads and parts, parts innermost.
  void (*run)(const AttentionDecodeParams&, int64_t first_unit, int64_t last_unit, float* scratch);
  // Joins the parts of key heads [first, last), numbered through the batch.
  void (*merge)(const AttentionDecodeParams&, int64_t first, int64_t last);
};

extern const AttentionDecodeKernels kAttentionDecodeBaseline;
extern const AttentionDecodeKernels kAttentionDecodeAvx2;
extern const AttentionDecodeKernels kAttentionDecodeAvx512;

}  // namespace genfast
