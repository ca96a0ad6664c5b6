#include "../../core/cpu_isa.h"
#include "bn_act_cpu_impl.h"

namespace genfast {
const BnActKernels GENFAST_FOR_ISA(kBnAct){rows};
}
