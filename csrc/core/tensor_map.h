// Tensor maps: how bulk tensor copies see a tensor of 16-bit elements. Host only; torch-free.
#pragma once
#include <cstdint>

#include "launch.h"

#if !defined(GF_EMULATE)
#include <cuda.h>
#endif

namespace genfast {

#if defined(GF_EMULATE)
using TensorMap = gf_emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// (columns, rows, heads, batch); strides in elements, of a multiple of 16 bytes; columns are 1 apart.
struct TensorExtent {
  const void* data;  // 16-byte aligned
  int64_t size[4], stride[4];
};

// Copies move boxes of box_rows rows of box_columns columns (16, 32 or 64), which lie in shared memory swizzled over the box's row.
inline TensorMap tensor_map(const TensorExtent& t, int box_columns, int box_rows) {
#if defined(GF_EMULATE)
  return gf_emulator::tensor_map(t.data, t.size, t.stride, box_columns, box_rows);
#else
  // The driver's function, without linking the driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    check(status == cudaSuccess && result == cudaDriverEntryPointSuccess,
          "driver: got no cuTensorMapEncodeTiled, supported: CUDA 12 and newer");
    return reinterpret_cast<Encode>(found);
  }();
  const CUtensorMapSwizzle swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                         : CU_TENSOR_MAP_SWIZZLE_32B;
  cuuint64_t size[4], stride[3];
  for (int i = 0; i < 4; ++i) size[i] = static_cast<cuuint64_t>(t.size[i]);
  for (int i = 1; i < 4; ++i) stride[i - 1] = static_cast<cuuint64_t>(t.stride[i]) * 2;
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  TensorMap map;
  // Elements are moved, never read: bits are bits. 256 bytes: what the second-level cache fetches at once.
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(t.data), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, "tensor map: the driver refused a tensor of (", t.size[3], ", ", t.size[2], ", ", t.size[1], ", ",
        t.size[0], ") with error ", static_cast<int>(status));
  return map;
#endif
}

}  // namespace genfast
