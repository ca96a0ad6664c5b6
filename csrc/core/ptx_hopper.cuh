// Instructions of sm_90a, one wrapper each: transaction barriers, bulk tensor copies, named barriers, registers that move between
// warpgroups. wgmma.cuh has the matrix products. Twins that run late on purpose: tests/emulator/emulator_hopper.h.
#pragma once
#include "launch.h"
#include "tensor_map.h"

namespace genfast {

// ---- addresses -----------------------------------------------------------------------------------------------------------------
// Where p lies in shared memory, in bytes.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#if defined(GF_EMULATE)
  return gf_emulator::shared_address(p);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// The byte at which a tile that is swizzled in units of 16 bytes over rows of kBytes (32, 64 or 128) keeps what would lie at `address`:
// bits 4 and up are turned by as many bits from 7 up (PTX ISA, swizzling modes of tensor copies and of matrix descriptors).
template <int kBytes>
__host__ __device__ __forceinline__ constexpr uint32_t swizzled(uint32_t address) {
  static_assert(kBytes == 32 || kBytes == 64 || kBytes == 128);
  return address ^ (address >> 3 & (kBytes - 16));
}

// ---- transaction barriers (mbarrier) ---------------------------------------------------------------------------------------------
// A phase ends when `arrivals` threads have arrived and the bytes that they expect have landed.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
#if defined(GF_EMULATE)
  gf_emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes fresh barriers known to tensor copies; before the __syncthreads() that shows them to the block.
__device__ __forceinline__ void mbarrier_init_fence() {
#if !defined(GF_EMULATE)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#if defined(GF_EMULATE)
  gf_emulator::mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and makes the phase last until `bytes` more have landed.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t* barrier, int bytes) {
#if defined(GF_EMULATE)
  gf_emulator::mbarrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}

// Returns when the phase of this parity has ended. Phases count from 0; of a fresh barrier the one before counts as ended (parity 1).
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#if defined(GF_EMULATE)
  gf_emulator::mbarrier_wait(barrier, parity, std::source_location::current());
#else
  uint32_t ended;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!ended);
#endif
}

// ---- bulk tensor copies (TMA) ----------------------------------------------------------------------------------------------------
__device__ __forceinline__ void tensor_prefetch([[maybe_unused]] const TensorMap& map) {
#if !defined(GF_EMULATE)
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// The map's box that begins at (column, row, head, batch), to shared memory; tells `barrier` each byte. What lies outside the tensor
// arrives as zeros and counts. One thread calls.
__device__ __forceinline__ void tensor_load(void* shared, const TensorMap& map, int column, int row, int head, int batch,
                                            uint64_t* barrier) {
#if defined(GF_EMULATE)
  gf_emulator::tensor_load(shared_address(shared), map, {column, row, head, batch}, barrier);
#else
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(barrier))
               : "memory");
#endif
}

// The other way; nothing is written outside the tensor. What other threads put there must have passed shared_writes_fence() and a barrier.
__device__ __forceinline__ void tensor_store(const TensorMap& map, const void* shared, int column, int row, int head, int batch) {
#if defined(GF_EMULATE)
  gf_emulator::tensor_store(shared_address(shared), map, {column, row, head, batch});
#else
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
#endif
}

// Returns when this thread's stores have read their shared memory.
__device__ __forceinline__ void tensor_stores_wait() {
#if defined(GF_EMULATE)
  gf_emulator::tensor_stores_wait(std::source_location::current());
#else
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

// Shows this thread's writes to shared memory to tensor copies.
__device__ __forceinline__ void shared_writes_fence() {
#if !defined(GF_EMULATE)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- named barriers --------------------------------------------------------------------------------------------------------------
// Barrier `id` (1 to 15; __syncthreads is 0) opens when `threads` threads, whole warps, wait or have arrived.
__device__ __forceinline__ void named_barrier_wait(int id, int threads) {
#if defined(GF_EMULATE)
  gf_emulator::named_barrier(id, threads, true, std::source_location::current());
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
#if defined(GF_EMULATE)
  gf_emulator::named_barrier(id, threads, false, std::source_location::current());
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- registers -------------------------------------------------------------------------------------------------------------------
// A thread of this warpgroup gives up registers beyond kCount, or waits until it may have kCount.
template <int kCount>
__device__ __forceinline__ void registers_down_to() {
#if !defined(GF_EMULATE)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}
template <int kCount>
__device__ __forceinline__ void registers_up_to() {
#if !defined(GF_EMULATE)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace genfast
