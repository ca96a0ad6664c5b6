// The floating point types the kernels take. Torch-free; core/tensor.h maps torch's ScalarType to these.
#pragma once
#include <cstdint>

namespace genfast {
enum class DType : int32_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };
}
