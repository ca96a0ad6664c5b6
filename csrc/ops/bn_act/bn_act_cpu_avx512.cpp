#include "bn_act_cpu_impl.h"

namespace genfast {
const BnActKernels kBnActAvx512{rows};
}
