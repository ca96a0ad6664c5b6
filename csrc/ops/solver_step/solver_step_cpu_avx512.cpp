#include "solver_step_cpu_impl.h"

namespace genfast {
const SolverStepKernels kSolverStepAvx512{rows, sums, magnitudes, candidates};
}
