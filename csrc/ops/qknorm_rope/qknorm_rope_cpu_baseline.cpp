#include "qknorm_rope_cpu_impl.h"

namespace genfast {
const QkNormRopeKernels kQkNormRopeBaseline{forward, backward};
}
