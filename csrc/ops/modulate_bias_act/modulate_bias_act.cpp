// modulate_bias_act_(Tensor(a!) out, Tensor(b!)? sums, Tensor(c!)? grad_noise, Tensor x, Tensor? dy, Tensor? scale, Tensor? noise,
//                    Tensor? b, Tensor? post_scale, int act, float alpha, float gain, float? clamp) -> ()
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(modulate_bias_act, ModulateParams);

namespace {

void* vector_of(const std::optional<Tensor>& t, const Tensor& x, int64_t length, const char* name) {
  if (!t.has_value()) return nullptr;
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_device(*t, x);
  check(t->scalar_type() == wide && t->is_contiguous() && t->numel() == length, name, ": got ", t->numel(), " elements in ",
        torch::headeronly::toString(t->scalar_type()), ", supported: ", length, " in ", torch::headeronly::toString(wide), ", contiguous");
  return t->data_ptr();
}

void check_alike(const Tensor& t, const Tensor& x, const Layout& layout, const char* name) {
  check_device(t, x);
  check(t.scalar_type() == x.scalar_type() && t.dim() == 4 && t.size(1) == x.size(1) && t.size(3) == x.size(3) &&
            layout_of(t, name) == layout,
        name, ": got a dtype, shape or memory format other than x's, supported: the same");
}

void modulate_bias_act_(const Tensor& out, const std::optional<Tensor>& sums, const std::optional<Tensor>& grad_noise, const Tensor& x,
                        const std::optional<Tensor>& dy, const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                        const std::optional<Tensor>& b, const std::optional<Tensor>& post_scale, int64_t act, double alpha, double gain,
                        std::optional<double> clamp) {
  ModulateParams p{};
  p.dtype = dtype_of(x, "x");
  check(x.dim() == 4 && x.numel() > 0, "x: got ", x.dim(), " dimensions and ", x.numel(), " elements, supported: 4, not empty");
  check(act >= 0 && act < kActivations, "act: got ", act, ", supported: 0 to ", kActivations - 1);
  check(dy.has_value() == sums.has_value(), "sums: supported: given together with dy");
  check(dy.has_value() || !grad_noise.has_value(), "grad_noise: supported: with dy only");
  const Layout layout = layout_of(x, "x");
  check_alike(out, x, layout, "out");
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.inner = layout.per_sample / p.channels;
  p.channels_last = layout.channels > 1;
  const int64_t each = p.batch * p.channels;
  p.out = out.data_ptr();
  p.x = x.data_ptr();
  p.scale = vector_of(scale, x, each, "scale");
  p.b = vector_of(b, x, p.channels, "b");
  p.post_scale = vector_of(post_scale, x, each, "post_scale");
  p.noise_of_all = noise.has_value() && noise->numel() == p.inner;
  p.noise = vector_of(noise, x, p.noise_of_all ? p.inner : p.batch * p.inner, "noise");
  p.grad_noise = vector_of(grad_noise, x, p.batch * p.inner, "grad_noise");
  p.curve = {static_cast<Act>(act), 0, clamp.has_value(), alpha, gain, clamp.value_or(0.0)};
  const DeviceGuard guard(x);
  if (dy.has_value()) {
    check_alike(*dy, x, layout, "dy");
    p.dy = dy->data_ptr();
    check(sums->scalar_type() == ScalarType::Double && sums->is_contiguous() && sums->numel() == kModulateSums * each,
          "sums: supported: a contiguous float64 tensor of shape (", kModulateSums, ", batch, channels)");
    check_device(*sums, x);
    p.sums = static_cast<double*>(sums->data_ptr());
  }
#if !defined(GENFAST_BACKEND_CPU)
  std::optional<Tensor> workspace;
  if (p.dy) {
    const int64_t elements[1] = {partial_elements(p)};
    workspace = torch::stable::new_empty(x, {elements, 1}, p.dtype == DType::F64 ? ScalarType::Double : ScalarType::Float);
    p.partial = workspace->data_ptr();
  }
#endif
  GENFAST_LAUNCH(modulate_bias_act, p, x);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("modulate_bias_act_", TORCH_BOX(&genfast::modulate_bias_act_));
}
