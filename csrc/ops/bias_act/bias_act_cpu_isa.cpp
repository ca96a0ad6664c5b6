#include "../../core/cpu_isa.h"
#include "bias_act_cpu_impl.h"

namespace genfast {
const BiasActKernels GENFAST_FOR_ISA(kBiasAct){long_rows, short_rows};
}
