#include "upfirdn2d_cpu_impl.h"

namespace genfast {
const Upfirdn2dKernels kUpfirdn2dAvx512{strips};
}
