#include "cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace genfast {
namespace {

CpuIsa best() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? kAvx512 : avx2 ? kAvx2 : kBaseline;
#else
  return kBaseline;
#endif
}

CpuIsa at_load() {
  const char* asked = std::getenv("GENFAST_CPU_ISA");
  const std::string_view name = asked ? asked : "";
  const CpuIsa wanted = name == "baseline" ? kBaseline : name == "avx2" ? kAvx2 : kAvx512;
  return wanted < best() ? wanted : best();
}

std::atomic<CpuIsa> level{at_load()};

}  // namespace

CpuIsa cpu_isa() {
  return level.load(std::memory_order_relaxed);
}

}  // namespace genfast

// -1 asks for the level in use; 0, 1 or 2 sets it, as far as the machine has it. Returns the level in use.
extern "C" __attribute__((visibility("default"))) int genfast_cpu_isa(int asked) {
  using namespace genfast;
  if (asked >= kBaseline && asked <= kAvx512) level = asked < best() ? static_cast<CpuIsa>(asked) : best();
  return cpu_isa();
}
