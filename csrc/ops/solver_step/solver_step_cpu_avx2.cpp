#include "solver_step_cpu_impl.h"

namespace genfast {
const SolverStepKernels kSolverStepAvx2{rows, sums, magnitudes, candidates};
}
