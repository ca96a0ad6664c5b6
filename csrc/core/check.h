// Checks of last resort. Python refuses bad input first, with the same kind of sentence; these keep a direct call of
// torch.ops.genfast.* from touching memory it does not own.
#pragma once
#include <sstream>
#include <stdexcept>

namespace genfast {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// check(ok, "counter: got ", row, ", supported: 0 to ", rows - 1)
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]] {
    fail(parts...);
  }
}

}  // namespace genfast
