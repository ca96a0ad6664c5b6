#include "qknorm_rope_cpu_impl.h"

namespace genfast {
const QkNormRopeKernels kQkNormRopeAvx512{forward, backward};
}
