// A CUDA block on one CPU thread: kernels compiled as C++ (-DGF_EMULATE) run here, one fiber per CUDA thread.
// docs/emulator.md says what it catches and what it cannot. csrc/core/launch.h includes this file; it needs no CUDA toolkit.
//
// A fiber runs until it blocks at a barrier or a warp exchange; a thread that never blocks costs no switch. Shared memory lives on the
// heap in blocks of its exact size (AddressSanitizer sees an overrun) and holds NaN patterns until it is written.
// GENFAST_EMULATOR_SEED=n (n > 0) shuffles the order of blocks and, at every step, of threads; between two barriers one warp runs as far as
// it can before the next; and an asynchronous copy lands at once or when its thread waits for it. 0: in order, warps in step, copies at
// once.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// ---- vector types ---------------------------------------------------------------------------------
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace gf_emulator {

enum class Wait : uint8_t { kRun, kBlock, kWarp, kCondition, kDone };
struct Place {  // where a thread waits: two threads wait together only at one place of the source
  unsigned line = 0, column = 0;
  const char* file = "";
  bool operator==(const Place& other) const { return line == other.line && column == other.column && !std::strcmp(file, other.file); }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};
struct Cell {
  alignas(16) unsigned char bytes[32];
};
using Exchange = std::array<Cell, 32>;  // what the lanes of one warp exchange published

struct Thread {
  uint3 index{};
  int linear = 0;
  Wait wait = Wait::kRun;
  Place place;
  uint32_t mask = 0;
  Cell published{};
  std::shared_ptr<Exchange> exchange;
  std::vector<std::pair<uint4*, uint4>> copies;              // of cp.async: to where, what; under way
  std::function<bool()> condition;                           // what it waits for
  std::vector<std::vector<std::function<void()>>> products;  // of wgmma, by group; the last group is open
  std::vector<const float*> sums_in_flight;                  // of each product, in their order
  int stores = 0;                                            // bulk stores under way
  struct Fiber* fiber = nullptr;                             // only while the thread has started and not ended
};
struct Fiber {
  static constexpr size_t kStack = 128 * 1024;
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool fresh = true;
};
struct Shared {  // one __shared__ variable of the running block
  const void* key;
  std::unique_ptr<unsigned char, void (*)(void*)> bytes;
  size_t size;
};

struct NamedBarrier {
  int arrived = 0;
  unsigned turn = 0;
};

struct Machine {
  ucontext_t scheduler{};
  std::vector<std::unique_ptr<Fiber>> fibers;  // all of them
  std::vector<Fiber*> idle;
  std::vector<Thread> threads;
  std::vector<int> order;  // of threads that have not ended
  std::vector<int> warps;  // first threads, in the order in which warps run ahead
  size_t next = 0;         // position in `order` from which an idle fiber takes its next thread
  Thread* current = nullptr;
  std::function<void()> body;
  std::string error;
  std::vector<Shared> shared;
  std::vector<std::function<void()>> copies;  // under way; they land one at a time
  std::mt19937* random = nullptr;             // with a seed
  std::array<NamedBarrier, 16> named_barriers;
  size_t dynamic_bytes = 0;
  dim3 grid, block;
  uint3 block_index{};
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};
inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulator: " + what);
}

inline int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

// ---- switching ------------------------------------------------------------------------------------
inline void to_scheduler() {
  Fiber* self = machine.current->fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
  swapcontext(&self->context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
}

inline void to_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), Fiber::kStack);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  for (;;) {
    Thread& thread = *machine.current;
    Fiber* self = thread.fiber;
    try {
      machine.body();
    } catch (const std::exception& error) {
      machine.error = error.what();
    }
    thread.wait = Wait::kDone;
    // The next thread, if it has not started, runs on this fiber without a switch.
    if (machine.error.empty() && machine.next < machine.order.size()) {
      Thread& next = machine.threads[machine.order[machine.next]];
      if (next.wait == Wait::kRun && !next.fiber) {
        ++machine.next;
        thread.fiber = nullptr;
        next.fiber = self;
        machine.current = &next;
        continue;
      }
    }
    to_scheduler();
  }
}

inline void block_here(Wait wait, const std::source_location& where, uint32_t mask = 0) {
  Thread& self = *machine.current;
  self.wait = wait;
  self.mask = mask;
  self.place = {where.line(), where.column(), where.file_name()};
  to_scheduler();
}

inline void wait_until(std::function<bool()> condition, const std::source_location& where) {
  if (condition()) return;
  machine.current->condition = std::move(condition);
  block_here(Wait::kCondition, where);
}

// ---- one block ------------------------------------------------------------------------------------
inline std::string name_of(const Thread& t) {
  return "thread (" + std::to_string(t.index.x) + "," + std::to_string(t.index.y) + "," + std::to_string(t.index.z) + ")";
}

inline void run_thread(Thread& thread) {
  Machine& m = machine;
  if (!thread.fiber) {
    if (m.idle.empty()) {
      m.fibers.push_back(std::make_unique<Fiber>());
      m.idle.push_back(m.fibers.back().get());
    }
    thread.fiber = m.idle.back();
    m.idle.pop_back();
    if (thread.fiber->fresh) {
      Fiber& fiber = *thread.fiber;
      fiber.fresh = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
    }
  }
  m.current = &thread;
  to_fiber(*thread.fiber);
  if (!m.error.empty()) throw std::runtime_error(m.error);
  Thread& last = *m.current;  // a later thread than `thread` where one fiber ran several
  if (last.wait == Wait::kDone) m.idle.push_back(std::exchange(last.fiber, nullptr));
}

// Lets go the lanes of every mask of a warp that is complete: all lanes it names wait at one place with that mask.
inline bool release_warp(int base) {
  auto& threads = machine.threads;
  bool any = false;
  for (int i = base; i < std::min<int>(base + 32, threads.size()); ++i) {
    const Thread& t = threads[i];
    if (t.wait != Wait::kWarp) continue;
    auto lane = [&](int l) -> Thread* { return base + l < int(threads.size()) ? &threads[base + l] : nullptr; };
    bool complete = true;
    for (int l = 0; l < 32 && complete; ++l) {
      if (!(t.mask >> l & 1)) continue;
      const Thread* other = lane(l);
      complete = other && other->wait == Wait::kWarp && other->mask == t.mask && other->place == t.place;
    }
    if (!complete) continue;
    auto exchange = std::make_shared<Exchange>();
    for (int l = 0; l < 32; ++l) {
      if (t.mask >> l & 1) {
        (*exchange)[l] = lane(l)->published;
      } else {
        std::memset((*exchange)[l].bytes, 0xff, sizeof(Cell));
      }
    }
    const uint32_t mask = t.mask;
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      lane(l)->wait = Wait::kRun;
      lane(l)->exchange = exchange;
    }
    any = true;
  }
  return any;
}

inline bool release_block() {
  auto& threads = machine.threads;
  const Thread* waiting = nullptr;
  const Thread* ended = nullptr;
  for (const Thread& t : threads) {
    if (t.wait == Wait::kWarp || t.wait == Wait::kCondition || t.wait == Wait::kRun) return false;
    (t.wait == Wait::kBlock ? waiting : ended) = &t;
  }
  if (!waiting) return false;
  if (ended) fail("divergent barrier: " + name_of(*waiting) + " waits at " + waiting->place.text() + ", " + name_of(*ended) + " has ended");
  for (Thread& t : threads) {
    if (!(t.place == waiting->place)) {
      fail("divergent barrier: " + name_of(t) + " waits at " + t.place.text() + ", " + name_of(*waiting) + " at " + waiting->place.text());
    }
  }
  for (Thread& t : threads) t.wait = Wait::kRun;
  return true;
}

inline bool release_conditions() {
  bool any = false;
  for (Thread& t : machine.threads) {
    if (t.wait != Wait::kCondition || !t.condition()) continue;
    t.wait = Wait::kRun;
    any = true;
  }
  return any;
}

inline bool perhaps() {  // one time in four, with a seed
  return machine.random && (*machine.random)() % 4 == 0;
}

// Something that happens beside the threads: when nothing else can go on; or, with a seed, at once or at any other time, in any order.
inline void start(std::function<void()> copy) {
  if (perhaps()) return copy();
  machine.copies.push_back(std::move(copy));
}
inline bool land() {
  auto& copies = machine.copies;
  if (copies.empty()) return false;
  const auto which = copies.begin() + (machine.random ? (*machine.random)() % copies.size() : 0);
  const auto copy = std::move(*which);
  copies.erase(which);
  copy();
  return true;
}

inline void run_block() {
  Machine& m = machine;
  m.order.resize(m.threads.size());
  std::iota(m.order.begin(), m.order.end(), 0);
  m.warps.clear();
  for (size_t i = 0; i < m.threads.size(); i += 32) m.warps.push_back(int(i));
  const auto shuffle = [&](std::vector<int>& numbers) {
    if (m.random) std::shuffle(numbers.begin(), numbers.end(), *m.random);
  };
  shuffle(m.warps);
  while (!m.order.empty()) {
    shuffle(m.order);
    for (m.next = 0; m.next < m.order.size();) {
      Thread& thread = m.threads[m.order[m.next++]];
      if (thread.wait == Wait::kRun) run_thread(thread);
    }
    std::erase_if(m.order, [&](int i) { return m.threads[i].wait == Wait::kDone; });
    if (m.order.empty()) break;
    if (perhaps()) land();
    bool any = false;
    for (int base : m.warps) {
      if (m.random && any) break;
      any |= release_warp(base);
    }
    any |= release_conditions();
    if (any) continue;
    if (release_block() || land()) {
      shuffle(m.warps);
    } else {
      for (int i : m.order) {
        const Thread& t = m.threads[i];
        if (t.wait == Wait::kCondition) fail(name_of(t) + " waits for ever at " + t.place.text());
        if (t.wait != Wait::kWarp) continue;
        char mask[16];
        std::snprintf(mask, sizeof mask, "%08x", t.mask);
        fail(name_of(t) + " waits for ever at " + t.place.text() + ": not every lane of its mask 0x" + mask + " arrived with that mask");
      }
    }
  }
  if (!m.copies.empty()) fail("the block has ended and a copy of its shared memory is still under way");
}

// How much dynamic shared memory a kernel may have: 48 KiB, and more once it is allowed as much as the device gives a block: 99 KiB, what
// the smallest of sm_80 and newer gives (sm_86), or 227 KiB of sm_90.
struct SharedLimit {
  size_t bytes = 48 * 1024;

  void allow(size_t wanted) {
    const size_t most = size_t(setting("GENFAST_EMULATOR_CAPABILITY", 80) >= 90 ? 227 : 99) * 1024;
    if (wanted > most) fail(std::to_string(wanted) + " bytes of shared memory, the device gives a block " + std::to_string(most));
    bytes = wanted;
  }
  void check(size_t wanted) const {
    if (wanted > bytes) fail(std::to_string(wanted) + " bytes of shared memory, the kernel is allowed " + std::to_string(bytes));
  }
};
template <class... Parameters>
const void* address_of(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}
inline SharedLimit& shared_limit(const void* kernel) {
  static std::map<const void*, SharedLimit> limits;
  return limits[kernel];
}

template <class Body>
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, Body&& body) {
  Machine& m = machine;
  if (m.current) fail("a kernel launched a kernel");
  const size_t count = size_t(block.x) * block.y * block.z;
  if (!count || count > 1024 || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    fail("invalid launch configuration");
  const auto seed = unsigned(setting("GENFAST_EMULATOR_SEED", 0));
  std::mt19937 random(seed);
  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
  m.random = seed ? &random : nullptr;
  m.grid = grid;
  m.block = block;
  m.body = std::forward<Body>(body);
  m.dynamic_bytes = dynamic_bytes;
  m.random = seed ? &random : nullptr;
  m.threads.resize(count);
  try {
    for (uint64_t b : blocks) {
      m.block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
      for (Shared& s : m.shared) std::memset(s.bytes.get(), 0xff, s.size);
      m.named_barriers.fill({});
      for (unsigned i = 0; i < count; ++i) {
        Thread& t = m.threads[i];
        t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        t.linear = int(i);
        t.wait = Wait::kRun;
        t.products.assign(1, {});
        t.sums_in_flight.clear();
        t.stores = 0;
        t.copies.clear();
      }
      run_block();
    }
  } catch (...) {  // suspended fibers are dropped, with whatever stood on their stacks
    m.idle.clear();
    m.fibers.clear();
    m.threads.clear();
    m.shared.clear();
    m.copies.clear();
    m.error.clear();
    m.current = nullptr;
    throw;
  }
  m.shared.clear();
  m.current = nullptr;
}

inline void copy_async(void* to, const uint4& value) {
  auto* const shared = static_cast<uint4*>(to);
  machine.random && (*machine.random)() % 2 ? void(machine.current->copies.emplace_back(shared, value)) : void(*shared = value);
}
inline void wait_for_copies() {
  for (auto& [to, value] : machine.current->copies) *to = value;
  machine.current->copies.clear();
}

// The shared variable that `key` names, made at its first use in a block's life. Alignment 128: the strictest the kernels ask for.
inline void* shared_memory(const void* key, size_t size) {
  for (Shared& s : machine.shared) {
    if (s.key == key) return s.bytes.get();
  }
  void* bytes = nullptr;
  if (posix_memalign(&bytes, 128, std::max<size_t>(size, 1))) throw std::bad_alloc();
  std::memset(bytes, 0xff, size);
  machine.shared.push_back({key, {static_cast<unsigned char*>(bytes), std::free}, size});
  return bytes;
}

// ---- warps ----------------------------------------------------------------------------------------
inline int lane() {
  return machine.current->linear & 31;
}

// Every lane of `mask` publishes `value` and, when all have arrived, reads what the others published through get(lane).
template <class T, class Read>
auto exchange(uint32_t mask, const T& value, const std::source_location& where, Read read) {
  static_assert(sizeof(T) <= sizeof(Cell) && std::is_trivially_copyable_v<T>);
  if (!(mask >> lane() & 1))
    fail(name_of(*machine.current) + " is not in the mask it passes to a warp operation, line " + std::to_string(where.line()));
  std::memcpy(machine.current->published.bytes, &value, sizeof(T));
  block_here(Wait::kWarp, where, mask);
  const auto cells = machine.current->exchange;
  return read([&](int source) {
    if (!(mask >> source & 1))
      fail("a warp operation reads lane " + std::to_string(source) + ", outside its mask, line " + std::to_string(where.line()));
    T result;
    std::memcpy(&result, (*cells)[source].bytes, sizeof(T));
    return result;
  });
}
}  // namespace gf_emulator

// ---- what a kernel sees ---------------------------------------------------------------------------
#define threadIdx (gf_emulator::machine.current->index)
#define blockIdx (gf_emulator::machine.block_index)
#define blockDim (gf_emulator::machine.block)
#define gridDim (gf_emulator::machine.grid)

using GfPlace = std::source_location;
inline void __syncthreads(GfPlace where = GfPlace::current()) {
  gf_emulator::block_here(gf_emulator::Wait::kBlock, where);
}
inline void __syncwarp(unsigned mask = ~0u, GfPlace where = GfPlace::current()) {
  gf_emulator::exchange(mask, 0, where, [](auto) { return 0; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, GfPlace where = GfPlace::current()) {
  const int base = gf_emulator::lane() & ~(width - 1);
  return gf_emulator::exchange(mask, value, where, [&](auto get) { return get(base + (source & (width - 1))); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, GfPlace where = GfPlace::current()) {
  const int self = gf_emulator::lane(), other = self ^ bits;
  const bool inside = (other & ~(width - 1)) <= (self & ~(width - 1));
  return gf_emulator::exchange(mask, value, where, [&](auto get) { return get(inside ? other : self); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, GfPlace where = GfPlace::current()) {
  const int self = gf_emulator::lane(), other = self + int(delta);
  const bool inside = (self & (width - 1)) + int(delta) < width;
  return gf_emulator::exchange(mask, value, where, [&](auto get) { return get(inside ? other : self); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, GfPlace where = GfPlace::current()) {
  const int self = gf_emulator::lane(), other = self - int(delta);
  const bool inside = (self & (width - 1)) >= int(delta);
  return gf_emulator::exchange(mask, value, where, [&](auto get) { return get(inside ? other : self); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, GfPlace where = GfPlace::current()) {
  return gf_emulator::exchange(mask, predicate, where, [&](auto get) {
    unsigned bits = 0;
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) bits |= unsigned(get(l) != 0) << l;
    }
    return bits;
  });
}
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, T(*address + value));
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::min(*address, value));
}
inline float rsqrtf(float a) {
  return 1.0f / std::sqrt(a);
}

#include "emulator_hopper.h"
