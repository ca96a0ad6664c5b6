#include "../../core/cpu_isa.h"
#include "solver_step_cpu_impl.h"

namespace genfast {
const SolverStepKernels GENFAST_FOR_ISA(kSolverStep){rows, sums, magnitudes, candidates};
}
