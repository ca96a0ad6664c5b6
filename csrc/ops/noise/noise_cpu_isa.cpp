#include "../../core/cpu_isa.h"
#include "noise_cpu_impl.h"

namespace genfast {
const NoiseKernels GENFAST_FOR_ISA(kNoise){fill};
}
