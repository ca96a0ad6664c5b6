#include "bias_act_cpu_impl.h"

namespace genfast {
const BiasActKernels kBiasActAvx2{long_rows, short_rows};
}
