#include "../../core/cpu_isa.h"
#include "qknorm_rope_cpu_impl.h"

namespace genfast {
const QkNormRopeKernels GENFAST_FOR_ISA(kQkNormRope){forward, backward};
}
