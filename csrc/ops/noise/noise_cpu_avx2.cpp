#include "noise_cpu_impl.h"

namespace genfast {
const NoiseKernels kNoiseAvx2{fill};
}
