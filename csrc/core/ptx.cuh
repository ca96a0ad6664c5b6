// One wrapper per PTX instruction, each with a portable twin of the same meaning: the emulator runs the twin, and so does a GPU
// older than the instruction.
#pragma once
#include "exact_math.h"
#include "launch.h"

namespace genfast {

// Two floats to two bfloat16, rounded to nearest even; `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return narrow_bf16(low).bits | static_cast<uint32_t>(narrow_bf16(high).bits) << 16;
#endif
}

// Two floats to two float16, rounded to nearest even; `low` in the low half.
__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return narrow_f16(low).bits | static_cast<uint32_t>(narrow_f16(high).bits) << 16;
#endif
}

__device__ __forceinline__ float unpack_f16(Float16 a) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(a.bits));
  return wide;
#else
  return widen_f16(a);
#endif
}

// Copies 16 bytes from global to shared memory, or writes zeros and reads nothing where !valid; it has landed after cp_async_wait_all().
// Both addresses 16-byte aligned.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{};
#endif
}

__device__ __forceinline__ void cp_async_wait_all() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// x, of which the compiler knows nothing: what depends on it is computed here, not ahead of a loop where it would occupy registers.
__device__ __forceinline__ int opaque(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// 2^x to 2 units in the last place; results below 2^-126 are zero.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif defined(GF_EMULATE)
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#else
  return x;  // never runs: nvcc's host pass
#endif
}

#if defined(GF_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Four 8 x 8 matrices of 16-bit elements from shared memory, over one warp: lane 8i + r passes the address of row r of matrix i (8
// elements, 16-byte aligned). Lane 4g + t receives in out[i] elements (g, 2t), (g, 2t + 1) of matrix i; with kTranspose (2t, g), (2t + 1,
// g).
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  }
#elif defined(GF_EMULATE)
  gf_emulator::exchange(~0u, row, std::source_location::current(), [&](auto get) {
    const int g = gf_emulator::lane() >> 2, t = gf_emulator::lane() & 3;
    for (int i = 0; i < 4; ++i) {
      uint32_t half[2];
      for (int h = 0; h < 2; ++h) {
        const int r = kTranspose ? 2 * t + h : g, c = kTranspose ? g : 2 * t + h;
        half[h] = static_cast<const uint16_t*>(get(8 * i + r))[c];
      }
      out[i] = half[0] | half[1] << 16;
    }
    return 0;
  });
#endif
}

#if defined(GF_EMULATE)
namespace emulated {
template <class Widen>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const Fragment mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  gf_emulator::exchange(~0u, mine, std::source_location::current(), [&](auto get) {
    const auto half = [&](uint32_t word, int h) { return widen({static_cast<uint16_t>(word >> 16 * h)}); };
    const int g = gf_emulator::lane() >> 2, t = gf_emulator::lane() & 3;
    Fragment row[4], column[2][4];  // what holds row g and g + 8 of a; columns 2t and 2t + 1 of b
    for (int i = 0; i < 4; ++i) {
      row[i] = get(4 * g + i);
      for (int e = 0; e < 2; ++e) column[e][i] = get(4 * (2 * t + e) + i);
    }
    for (int i = 0; i < 4; ++i) {
      const int e = i & 1, upper = i >> 1;  // upper: row g + 8
      for (int k = 0; k < 16; ++k) {
        c[i] += half(row[k % 8 / 2].a[upper + 2 * (k / 8)], k & 1) * half(column[e][k % 8 / 2].b[k / 8], k & 1);
      }
    }
    return 0;
  });
}
}  // namespace emulated
#endif

// c (16 x 8, float32) += a (16 x 16, row-major) * b (16 x 8, column-major) of bfloat16 or float16, over one warp (PTX ISA, mma.m16n8k16):
// lane 4g + t holds a[0]: (g, 2t..), a[1]: (g + 8, 2t..), a[2]: (g, 2t + 8..), a[3]: (g + 8, 2t + 8..); b[0]: (2t.., g), b[1]: (2t + 8..,
// g); c[0], c[1]: (g, 2t..), c[2], c[3]: (g + 8, 2t..).
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(GF_EMULATE)
  emulated::mma_m16n8k16(c, a, b, [](BFloat16 x) { return widen_bf16(x); });
#endif
}
__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(GF_EMULATE)
  emulated::mma_m16n8k16(c, a, b, [](Float16 x) { return widen_f16(x); });
#endif
}
#endif

}  // namespace genfast
