// What both launchers need: memory for a thread, how much work a thread is worth, whether there are tiles.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace genfast {

struct FreeAligned {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Aligned = std::unique_ptr<char[], FreeAligned>;

inline Aligned aligned_bytes(size_t count) {
  return Aligned(new (std::align_val_t{64}) char[count]);
}

// So many units for a thread, each of so many multiply-adds: with fewer than this a thread costs more than it brings.
inline int64_t grain(int64_t products) {
  return std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, products));
}

// Whether the processor multiplies tiles of bfloat16, the system lets this process, and AVX-512 is the level in use.
bool has_tiles();

}  // namespace genfast
