// What Hopper's attention kernels share: places in a ring of tiles, rows on their way out, tensor maps. docs/attention-hopper.md.
#pragma once
#include "../../core/wgmma.cuh"
#include "attention_tile.cuh"

namespace genfast {
namespace {

constexpr int kProducerRegisters = 24;  // of a thread that fetches

// A place in the ring and the parity of its present turn.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ RingPlace next() const { return slot + 1 < kSlots ? RingPlace{slot + 1, parity} : RingPlace{0, parity ^ 1}; }
};

template <class S>
__device__ __forceinline__ uint32_t pack16(float low, float high) {
  return std::is_same_v<S, BFloat16> ? pack_bf16x2(low, high) : pack_f16x2(low, high);
}

// Two rows of this thread's sums (wgmma.cuh), `row` and `row` + 8, times a factor each, rounded to S, into panels of kPanel columns,
// panel_bytes apart; t: the thread's place among the four that share the rows.
template <class S, int kWidth, int kPanel>
__device__ __forceinline__ void put_rows(unsigned char* panels, int panel_bytes, int row, int t, const float (&sums)[kWidth / 2],
                                         const float (&factor)[2]) {
  constexpr int kRow = 2 * kPanel;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
      const uint32_t at_byte = (8 * j / kPanel) * panel_bytes + (row + 8 * half) * kRow + (8 * j % kPanel + 2 * t) * 2;
      *reinterpret_cast<uint32_t*>(panels + swizzled<kRow>(at_byte)) =
          pack16<S>(sums[4 * j + 2 * half] * factor[half], sums[4 * j + 2 * half + 1] * factor[half]);
    }
  }
}

inline TensorMap hopper_map(const void* data, const AttentionRows& at, int64_t d, int64_t rows, int64_t heads, int64_t batch, int panel,
                            int box_rows) {
  const auto stride = [&](int64_t size, int64_t elements) { return size == 1 ? d : elements; };  // that of a single one is never used
  return tensor_map({data, {d, rows, heads, batch}, {1, stride(rows, at.row), stride(heads, at.head), stride(batch, at.batch)}}, panel,
                    box_rows);
}

}  // namespace
}  // namespace genfast
