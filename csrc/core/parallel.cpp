#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace genfast {

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, void (*run)(const void*, int64_t, int64_t), const void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { run(context, first, last); });
}

int64_t num_threads() {
  return torch::stable::get_num_threads();
}

}  // namespace genfast
