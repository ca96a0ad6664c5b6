#include "modulate_bias_act_cpu_impl.h"

namespace genfast {
const ModulateKernels kModulateAvx2{units};
}
