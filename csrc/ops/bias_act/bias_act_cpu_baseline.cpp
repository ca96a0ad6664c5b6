#include "bias_act_cpu_impl.h"

namespace genfast {
const BiasActKernels kBiasActBaseline{long_rows, short_rows};
}
