// Which of the per-ISA builds of a kernel runs.
#pragma once

namespace genfast {

enum CpuIsa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The level in use: the best the machine has, or what GENFAST_CPU_ISA=baseline|avx2|avx512 or genfast_cpu_isa() asked for.
CpuIsa cpu_isa();

// The table of one op for the level in use. Other architectures build the baseline only.
#if defined(__x86_64__)
#define GENFAST_PICK_ISA(baseline, avx2, avx512) (cpu_isa() == kAvx512 ? (avx512) : cpu_isa() == kAvx2 ? (avx2) : (baseline))
#else
#define GENFAST_PICK_ISA(baseline, avx2, avx512) (baseline)
#endif

// The name of a table in the unit that is compiled for GENFAST_ISA: GENFAST_FOR_ISA(kNoise) is kNoiseAvx2 there.
#define GENFAST_JOIN_NAMES(table, isa) table##isa
#define GENFAST_JOIN(table, isa) GENFAST_JOIN_NAMES(table, isa)
#define GENFAST_FOR_ISA(table) GENFAST_JOIN(table, GENFAST_ISA)

}  // namespace genfast
