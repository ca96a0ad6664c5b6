// wgmma: products of a warpgroup (128 threads) on 64 rows of A, A from shared memory or registers, B from shared memory, sums in registers
// (PTX ISA, wgmma.mma_async). They run beside the thread: until wgmma_wait() nobody may touch the sums, an A in registers, or their
// shared memory.
#pragma once
#include "exact_math.h"
#include "ptx_hopper.cuh"

namespace genfast {

// A matrix in shared memory, made of panels: rows of kBytes (32, 64 or 128: 16, 32 or 64 columns), swizzled over the row, in whole groups
// of eight rows. `rows_apart`: bytes from one group of eight rows to the next. `panels_apart`: bytes from one panel to the next, where the
// product runs across panels.
template <int kBytes>
__host__ __device__ __forceinline__ constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t rows_apart, uint32_t panels_apart) {
  constexpr uint64_t kSwizzle = kBytes == 128 ? 1 : kBytes == 64 ? 2 : 3;
  return (address & 0x3ffff) >> 4 | uint64_t{panels_apart >> 4} << 16 | uint64_t{rows_apart >> 4} << 32 | kSwizzle << 62;
}

// Orders what this warp did to registers and shared memory before the products that follow.
__device__ __forceinline__ void wgmma_fence() {
#if !defined(GF_EMULATE)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products, for wgmma_wait().
__device__ __forceinline__ void wgmma_commit() {
#if defined(GF_EMULATE)
  gf_emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Returns when all but the last kGroups groups are done.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
#if defined(GF_EMULATE)
  gf_emulator::wgmma_wait(kGroups, std::source_location::current());
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

// The compiler knows neither that products run on behind the asm statement that issues them nor what wgmma_fence() is for. In front of a
// fence this makes it finish the registers, behind a wait it keeps uses of the sums from moving in front of it.
template <class T, int kCount>
__device__ __forceinline__ void pinned([[maybe_unused]] T (&registers)[kCount]) {
#if !defined(GF_EMULATE)
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
#endif
}

// Work that leads to x >= 0 is done before the next wait: the assembler moves a wait in front of arithmetic that does not need it, but not
// in front of a store, which here never happens.
__device__ __forceinline__ void finished([[maybe_unused]] float x, [[maybe_unused]] void* shared) {
#if !defined(GF_EMULATE)
  asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(x), "r"(shared_address(shared))
               : "memory");
#endif
}

// The same of many: their bits together are a number whose sign they share.
template <int kCount>
__device__ __forceinline__ void finished([[maybe_unused]] const float (&x)[kCount], [[maybe_unused]] void* shared) {
#if !defined(GF_EMULATE)
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits |= __float_as_uint(x[i]);
  finished(__uint_as_float(bits), shared);
#endif
}

// Where thread t of the warpgroup holds what: sums[4 j + 2 h + e] is row 16 (t / 32) + t % 32 / 4 + 8 h, column 8 j + 2 (t % 4) + e. A in
// registers: a[2 c + h] holds that row's columns 8 c + 2 (t % 4) and the next.

#if defined(GF_EMULATE)
template <class S>
float widen_bits(uint16_t bits) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return widen_bf16({bits});
  } else {
    return widen_f16({bits});
  }
}
#else
// clang-format off
// An asm statement names its operands by number, sums first: lists of the numbers and of the operands, each one longer than the last.
#define GF_NAMES_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define GF_NAMES_40 GF_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define GF_NAMES_48 GF_NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define GF_NAMES_56 GF_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define GF_NAMES_64 GF_NAMES_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define GF_NAMES_72 GF_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define GF_NAMES_80 GF_NAMES_72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define GF_NAMES_88 GF_NAMES_80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define GF_NAMES_96 GF_NAMES_88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define GF_NAMES_128 GF_NAMES_96 \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119" \
  ",%120,%121,%122,%123,%124,%125,%126,%127"
#define GF_FLOATS_OF_8(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
  "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define GF_FLOATS_OF_16(i) GF_FLOATS_OF_8(i), GF_FLOATS_OF_8(i + 8)
#define GF_FLOATS_32 GF_FLOATS_OF_16(0), GF_FLOATS_OF_16(16)
#define GF_FLOATS_40 GF_FLOATS_32, GF_FLOATS_OF_8(32)
#define GF_FLOATS_48 GF_FLOATS_40, GF_FLOATS_OF_8(40)
#define GF_FLOATS_56 GF_FLOATS_48, GF_FLOATS_OF_8(48)
#define GF_FLOATS_64 GF_FLOATS_56, GF_FLOATS_OF_8(56)
#define GF_FLOATS_72 GF_FLOATS_64, GF_FLOATS_OF_8(64)
#define GF_FLOATS_80 GF_FLOATS_72, GF_FLOATS_OF_8(72)
#define GF_FLOATS_88 GF_FLOATS_80, GF_FLOATS_OF_8(80)
#define GF_FLOATS_96 GF_FLOATS_88, GF_FLOATS_OF_8(88)
#define GF_FLOATS_128 GF_FLOATS_96, GF_FLOATS_OF_16(96), GF_FLOATS_OF_16(112)

// transposed: the layout of B is that of wgmma with A in registers, below.
#define GF_PRODUCT(n, count, type, a, b, keep, transposed, ...)                                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " keep ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" GF_NAMES_##count "}, " a ", " b ", p, 1, 1, " transposed \
               ";\n}" : GF_FLOATS_##count : __VA_ARGS__)
// (columns, columns / 2, numbers of the operands that follow the sums)
#define GF_SHAPES(F)                                            \
  F(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")         \
  F(80, 40, "%40", "%41", "%42", "%43", "%44", "%45")         \
  F(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")         \
  F(112, 56, "%56", "%57", "%58", "%59", "%60", "%61")        \
  F(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")        \
  F(144, 72, "%72", "%73", "%74", "%75", "%76", "%77")        \
  F(160, 80, "%80", "%81", "%82", "%83", "%84", "%85")        \
  F(176, 88, "%88", "%89", "%90", "%91", "%92", "%93")        \
  F(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")      \
  F(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
// clang-format on
#define GF_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(kept)
#endif

// sums (64 x kColumns) = keep * sums + A (64 x 16) B (16 x kColumns). A: rows down, columns along panels. B: column n of B is row n (its 16
// values along the panel).
template <class S, int kColumns>
__device__ __forceinline__ void wgmma(float (&sums)[kColumns / 2], uint64_t a, uint64_t b, bool keep) {
#if defined(GF_EMULATE)
  gf_emulator::wgmma(sums, kColumns, nullptr, a, b, keep, widen_bits<S>, std::source_location::current());
#else
  const int kept = keep;
#define GF_SHAPE(n, count, r0, r1, r2, r3, r4, r5)                               \
  if constexpr (kColumns == n && std::is_same_v<S, BFloat16>) {                  \
    GF_PRODUCT(n, count, "bf16", r0, r1, r2, "0, 0", "l"(a), "l"(b), "r"(kept)); \
  } else if constexpr (kColumns == n) {                                          \
    GF_PRODUCT(n, count, "f16", r0, r1, r2, "0, 0", "l"(a), "l"(b), "r"(kept));  \
  }
  GF_SHAPES(GF_SHAPE)
#undef GF_SHAPE
#endif
}

// A in registers; B: row k of B is row k, columns along panels.
template <class S, int kColumns>
__device__ __forceinline__ void wgmma(float (&sums)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool keep) {
#if defined(GF_EMULATE)
  gf_emulator::wgmma(sums, kColumns, a, 0, b, keep, widen_bits<S>, std::source_location::current());
#else
  const int kept = keep;
#define GF_SHAPE(n, count, r0, r1, r2, r3, r4, r5)                                            \
  if constexpr (kColumns == n && std::is_same_v<S, BFloat16>) {                               \
    GF_PRODUCT(n, count, "bf16", "{" r0 "," r1 "," r2 "," r3 "}", r4, r5, "1", GF_REGISTERS); \
  } else if constexpr (kColumns == n) {                                                       \
    GF_PRODUCT(n, count, "f16", "{" r0 "," r1 "," r2 "," r3 "}", r4, r5, "1", GF_REGISTERS);  \
  }
  GF_SHAPES(GF_SHAPE)
#undef GF_SHAPE
#endif
}

}  // namespace genfast
