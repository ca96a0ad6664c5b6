#include "../../core/cpu_isa.h"
#include "upfirdn2d_cpu_impl.h"

namespace genfast {
const Upfirdn2dKernels GENFAST_FOR_ISA(kUpfirdn2d){strips};
}
