// Loops over torch's threads. The kernels use these instead of torch's own header, which takes half a second to compile in every unit.
#pragma once
#include <cstdint>

namespace genfast {

// Calls run(context, first, last) for ranges that cover begin .. end - 1, on several threads where there are at least two ranges of
// `grain` elements. An exception in `run` reaches the caller.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, void (*run)(const void* context, int64_t first, int64_t last),
                     const void* context);

// f(first, last) instead of a function pointer.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_ranges(
      begin, end, grain, [](const void* context, int64_t first, int64_t last) { (*static_cast<const F*>(context))(first, last); }, &f);
}

// How many threads such a loop may use.
int64_t num_threads();

}  // namespace genfast
