#include "solver_step_cpu_impl.h"

namespace genfast {
const SolverStepKernels kSolverStepBaseline{rows, sums, magnitudes, candidates};
}
