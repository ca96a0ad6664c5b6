// noise_(Tensor(a!) out, Tensor seeds, int draw, int stream, bool uniform) -> ()
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(noise, NoiseParams);

namespace {

void noise_(const Tensor& out, const Tensor& seeds, int64_t draw, int64_t stream, bool uniform) {
  const Layout layout = layout_of(out, "out");
  check_device(seeds, out);
  check(draw >= 0 && draw <= UINT32_MAX, "draw: got ", draw, ", supported: 0 to 2**32 - 1");
  check(stream >= 0 && stream <= UINT32_MAX, "stream: got ", stream, ", supported: 0 to 2**32 - 1");
  NoiseParams p{};
  p.dtype = dtype_of(out, "out");
  p.seeds = int64_data(seeds, "seeds", layout.batch);
  p.out = out.data_ptr();
  p.batch = layout.batch;
  p.per_sample = layout.per_sample;
  p.channels = layout.channels;
  p.draw = static_cast<uint32_t>(draw);
  p.stream = static_cast<uint32_t>(stream);
  p.uniform = uniform;
  if (p.batch == 0 || p.per_sample == 0) return;
  const DeviceGuard guard(out);
  GENFAST_LAUNCH(noise, p, out);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("noise_", TORCH_BOX(&genfast::noise_));
}
