#include "noise_cpu_impl.h"

namespace genfast {
const NoiseKernels kNoiseBaseline{fill};
}
