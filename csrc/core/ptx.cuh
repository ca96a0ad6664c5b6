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
#elif defined(GF_EMULATE)
  gf_emulator::copy_async(shared, valid ? *static_cast<const uint4*>(global) : uint4{});
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{};
#endif
}

__device__ __forceinline__ void cp_async_wait_all() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif defined(GF_EMULATE)
  gf_emulator::wait_for_copies();
#endif
}

// x, of which the compiler knows nothing: what depends on it is computed here, not ahead of a loop where it would occupy registers.
__device__ __forceinline__ int opaque(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// 2^a, to 2 units in the last place; results below the normal numbers are 0.
__device__ __forceinline__ float exp2_fast(float a) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
#else
  return a < -126.0f ? 0.0f : exp2f(a);
#endif
}

#if defined(GF_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Four 8 x 8 matrices of 16-bit elements from shared memory, over one warp (PTX ISA, ldmatrix): lane 8i + r gives the address of row r of
// matrix i (16 bytes, aligned), and lane 4g + t receives elements (g, 2t) and (g, 2t + 1) of matrix i in to[i]; with kTransposed,
// elements (2t, g) and (2t + 1, g).
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
#elif defined(GF_EMULATE)
  gf_emulator::exchange(~0u, row, std::source_location::current(), [&](auto get) {
    const int g = gf_emulator::lane() >> 2, t = gf_emulator::lane() & 3;
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int r, int c) { return uint32_t{static_cast<const uint16_t*>(get(8 * i + r))[c]}; };
      to[i] = kTransposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
    return 0;
  });
#endif
}

// c (16 x 8, float32) += a (16 x 16, row-major, S) * b (16 x 8, column-major, S), over one warp (PTX ISA, mma.m16n8k16): lane 4g + t holds
// a[0]: (g, 2t..), a[1]: (g + 8, 2t..), a[2]: (g, 2t + 8..), a[3]: (g + 8, 2t + 8..); b[0]: (2t.., g), b[1]: (2t + 8.., g); c[0], c[1]:
// (g, 2t..), c[2], c[3]: (g + 8, 2t..). S: BFloat16 or Float16.
template <class S>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<S, BFloat16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif defined(GF_EMULATE)
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const Fragment mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  gf_emulator::exchange(~0u, mine, std::source_location::current(), [&](auto get) {
    const auto half = [](uint32_t word, int h) {
      const S element{static_cast<uint16_t>(word >> 16 * h)};
      if constexpr (std::is_same_v<S, BFloat16>) {
        return widen_bf16(element);
      } else {
        return widen_f16(element);
      }
    };
    const int g = gf_emulator::lane() >> 2, t = gf_emulator::lane() & 3;
    Fragment row[4], column[2][4];  // what holds rows g and g + 8 of a; columns 2t and 2t + 1 of b
    for (int i = 0; i < 4; ++i) {
      row[i] = get(4 * g + i);
      for (int e = 0; e < 2; ++e) column[e][i] = get(4 * (2 * t + e) + i);
    }
    for (int i = 0; i < 4; ++i) {
      const int upper = i >> 1;  // row g + 8
      for (int k = 0; k < 16; ++k) {
        c[i] += half(row[k % 8 / 2].a[upper + 2 * (k / 8)], k & 1) * half(column[i & 1][k % 8 / 2].b[k / 8], k & 1);
      }
    }
    return 0;
  });
#endif
}
#endif

}  // namespace genfast
