#include "../../core/cpu_isa.h"
#include "modulate_bias_act_cpu_impl.h"

namespace genfast {
const ModulateKernels GENFAST_FOR_ISA(kModulate){units};
}
