// upfirdn2d_(Tensor(a!) out, Tensor x, Tensor fx, Tensor? fy, int[] up, int[] down, int[] pad) -> ()
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(upfirdn2d, Upfirdn2dParams);

namespace {

const void* filter_of(const Tensor& f, const Tensor& x, int64_t dims, const char* name) {
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(f.scalar_type() == wide, name, ": got dtype ", torch::headeronly::toString(f.scalar_type()),
        ", supported: ", torch::headeronly::toString(wide), " for this x");
  check(f.dim() == dims && f.is_contiguous() && f.numel() > 0, name, ": got ", f.dim(), " dimensions and ", f.numel(),
        " elements, supported: ", dims, " dimensions, contiguous, not empty");
  check_device(f, x);
  return f.data_ptr();
}

// up, down and pad are (x, y).
void upfirdn2d_(const Tensor& out, const Tensor& x, const Tensor& fx, const std::optional<Tensor>& fy, const std::vector<int64_t>& up,
                const std::vector<int64_t>& down, const std::vector<int64_t>& pad) {
  check(x.dim() == 4 && out.dim() == 4, "x: got ", x.dim(), " dimensions, supported: 4");
  const Layout in_layout = layout_of(x, "x"), out_layout = layout_of(out, "out");
  check(out.scalar_type() == x.scalar_type(), "out: got a dtype other than x's, supported: the same");
  check(out.size(0) == x.size(0) && out.size(1) == x.size(1), "out: got another batch or channels than x's, supported: the same");
  check(up.size() == 2 && down.size() == 2 && pad.size() == 2, "up, down, pad: supported: two numbers each, x and y");
  check(up[0] >= 1 && up[1] >= 1 && down[0] >= 1 && down[1] >= 1, "up, down: supported: at least 1");
  check_device(out, x);
  Upfirdn2dParams p{};
  p.dtype = dtype_of(x, "x");
  p.fx = filter_of(fx, x, fy.has_value() ? 1 : 2, "fx");
  p.fy = fy.has_value() ? filter_of(*fy, x, 1, "fy") : nullptr;
  if (out.numel() == 0) return;
  check(x.numel() > 0, "x: got no element, supported: at least one where out has any");
  // A tensor of one pixel is contiguous and channels_last at once.
  p.channels_last = in_layout.channels > 1 || out_layout.channels > 1;
  const auto fits = [&](const Tensor& t, const Layout& l) { return !p.channels_last || l.channels > 1 || t.size(2) * t.size(3) == 1; };
  check(fits(x, in_layout) && fits(out, out_layout), "out: got another memory format than x's, supported: the same");
  p.out = out.data_ptr();
  p.in = x.data_ptr();
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.x = {x.size(3), out.size(3), up[0], down[0], pad[0], fy.has_value() ? fx.size(0) : fx.size(1)};
  p.y = {x.size(2), out.size(2), up[1], down[1], pad[1], fy.has_value() ? fy->size(0) : fx.size(0)};
  const DeviceGuard guard(x);
  GENFAST_LAUNCH(upfirdn2d, p, x);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("upfirdn2d_", TORCH_BOX(&genfast::upfirdn2d_));
}
