#include "qknorm_rope_cpu_impl.h"

namespace genfast {
const QkNormRopeKernels kQkNormRopeAvx2{forward, backward};
}
