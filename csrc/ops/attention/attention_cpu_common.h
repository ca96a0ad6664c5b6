// What the forward and the backward pass on a CPU share besides their Engines: masks, memory to work in, the order of heads.
#pragma once
#include "../../core/vec_softmax.h"
#include "attention_cpu.h"

namespace genfast {
namespace {

// x where the byte of a mask is not zero, else -inf; of `count` bytes, beyond which it is -inf too.
GF_INLINE VFloat where_seen(const uint8_t* p, int64_t count, VFloat x) {
#if defined(__AVX512F__)
  const auto few = static_cast<__mmask16>(count >= kLanes ? 0xffffu : (1u << count) - 1);
  const __m128i bytes = _mm_maskz_loadu_epi8(few, p);
  return (VFloat)_mm512_mask_mov_ps((__m512)splat(kMinusInfinity), _mm_test_epi8_mask(bytes, bytes), (__m512)x);
#else
  uint8_t whole[kLanes] = {};
  __builtin_memcpy(whole, p, count < kLanes ? static_cast<size_t>(count) : sizeof whole);
#if defined(__AVX2__)
  const VInt seen = (VInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(whole)));
#else
  VInt seen;
  for (int i = 0; i < kLanes; ++i) seen[i] = whole[i];
#endif
  return (seen != 0) ? x : splat(kMinusInfinity);
#endif
}

constexpr int64_t round_up(int64_t a, int64_t to) {
  return (a + to - 1) / to * to;
}

template <class T>
GF_INLINE T* take(char*& at, int64_t count) {
  T* p = reinterpret_cast<T*>(at);
  at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  return p;
}

template <class B>
GF_INLINE void fetch(const B* p, int64_t count) {
  const char* at = reinterpret_cast<const char*>(p);
  const int64_t bytes = (count < kKeyBlock ? count : kKeyBlock) * static_cast<int64_t>(sizeof(B));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

}  // namespace
}  // namespace genfast
