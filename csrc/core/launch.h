// Launching a kernel and naming its shared memory: one way each, so that a kernel also compiles as C++ and runs under
// tests/emulator/emulator.h (docs/emulator.md). Torch-free.
#pragma once
#include <cstdint>
#include <type_traits>

#include "check.h"

// GF_LAUNCH((kernel<float, true>), grid, block, dynamic_shared_bytes, stream, arguments...)
// GF_ALLOW_SHARED(kernel, bytes);   before a launch with more than 48 KiB of dynamic shared memory
// GF_SHARED(float[32], sums);       a __shared__ variable; holds NaN patterns under the emulator until it is written
// GF_DYNAMIC_SHARED(float, tile);   a pointer to the dynamic shared memory
// gf_device::compute_capability(), multiprocessors()    of the current device; 80: 8.0
#if defined(GF_EMULATE)
#include "emulator.h"

#define GF_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...)                                             \
  (static_cast<void>(stream), gf_emulator::shared_limit(gf_emulator::address_of(kernel)).check(dynamic_bytes), \
   gf_emulator::launch(grid, block, dynamic_bytes, [&] { (kernel)(__VA_ARGS__); }))
#define GF_ALLOW_SHARED(kernel, bytes) gf_emulator::shared_limit(gf_emulator::address_of(kernel)).allow(bytes)
#define GF_SHARED(type, name)  \
  static char name##_is_here_; \
  auto& name = *static_cast<std::type_identity_t<type>*>(gf_emulator::shared_memory(&name##_is_here_, sizeof(type)))
#define GF_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(gf_emulator::shared_memory(nullptr, gf_emulator::machine.dynamic_bytes))

namespace gf_device {
inline int compute_capability() {
  return gf_emulator::setting("GENFAST_EMULATOR_CAPABILITY", 80);
}
inline int multiprocessors() {
  return gf_emulator::setting("GENFAST_EMULATOR_MULTIPROCESSORS", 1);
}
}  // namespace gf_device
#else
#include <cuda_runtime.h>

#define GF_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...)                                      \
  do {                                                                                                  \
    (kernel)<<<grid, block, dynamic_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);           \
    const cudaError_t status_ = cudaGetLastError();                                                     \
    ::genfast::check(status_ == cudaSuccess, #kernel ": launch failed: ", cudaGetErrorString(status_)); \
  } while (false)
#define GF_ALLOW_SHARED(kernel, bytes)                                                                                                \
  do {                                                                                                                                \
    const cudaError_t status_ = cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)); \
    ::genfast::check(status_ == cudaSuccess, #kernel ": ", bytes, " bytes of shared memory: ", cudaGetErrorString(status_));          \
  } while (false)
#define GF_SHARED(type, name) __shared__ std::type_identity_t<type> name
#define GF_DYNAMIC_SHARED(type, name)                                  \
  extern __shared__ __align__(128) unsigned char gf_dynamic_shared_[]; \
  type* const name = reinterpret_cast<type*>(gf_dynamic_shared_)

namespace gf_device {
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}
inline int compute_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}
inline int multiprocessors() {
  return attribute(cudaDevAttrMultiProcessorCount);
}
}  // namespace gf_device
#endif
