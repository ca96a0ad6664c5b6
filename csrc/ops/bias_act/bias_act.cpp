// bias_act_(Tensor(a!) out, Tensor(b!)? sums, Tensor? factor, Tensor x, Tensor? b, int channels, int inner, int act, float alpha,
//           float gain, float? clamp, int order) -> ()
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(bias_act, BiasActParams);

namespace {

// Dense, and its elements in the same order as those of `like`.
void check_alike(const Tensor& t, const Tensor& like, const char* name) {
  check(t.scalar_type() == like.scalar_type(), name, ": got a dtype other than x's, supported: the same");
  check_device(t, like);
  check(t.dim() == like.dim(), name, ": got ", t.dim(), " dimensions, supported: ", like.dim(), ", as x");
  for (int64_t i = 0; i < t.dim(); ++i) {
    check(t.size(i) == like.size(i) && (t.size(i) == 1 || t.stride(i) == like.stride(i)), name,
          ": got a shape or strides other than x's, supported: the same");
  }
}

void check_dense(const Tensor& t) {
  int64_t reach = 1;
  for (int64_t i = 0; i < t.dim(); ++i) reach += (t.size(i) - 1) * t.stride(i);
  check(t.numel() == 0 || reach == t.numel(), "x: got a tensor with gaps, supported: a dense one");
}

const void* vector_of(const Tensor& t, const Tensor& x, int64_t length, const char* name) {
  check(t.scalar_type() == x.scalar_type(), name, ": got a dtype other than x's, supported: the same");
  check_device(t, x);
  check(t.is_contiguous() && t.numel() == length, name, ": got ", t.numel(), " elements, supported: ", length, ", contiguous");
  return t.data_ptr();
}

void bias_act_(const Tensor& out, const std::optional<Tensor>& sums, const std::optional<Tensor>& factor, const Tensor& x,
               const std::optional<Tensor>& b, int64_t channels, int64_t inner, int64_t act, double alpha, double gain,
               std::optional<double> clamp, int64_t order) {
  BiasActParams p{};
  p.dtype = dtype_of(x, "x");
  check_dense(x);
  check_alike(out, x, "out");
  check(act >= 0 && act < kActivations, "act: got ", act, ", supported: 0 to ", kActivations - 1);
  check(order >= 0 && order <= kHighestOrder, "order: got ", order, ", supported: 0 to ", kHighestOrder);
  if (x.numel() == 0) return;
  check(channels >= 1 && inner >= 1 && x.numel() % (channels * inner) == 0, "channels: got ", channels, " by ", inner,
        ", supported: what divides ", x.numel(), " elements");
  p.out = out.data_ptr();
  p.x = x.data_ptr();
  if (factor.has_value()) {
    check_alike(*factor, x, "factor");
    p.factor = factor->data_ptr();
  }
  p.b = b.has_value() ? vector_of(*b, x, channels, "b") : nullptr;
  p.sums = sums.has_value() ? const_cast<void*>(vector_of(*sums, x, channels, "sums")) : nullptr;
  p.outer = x.numel() / (channels * inner);
  p.channels = channels;
  p.inner = inner;
  p.curve = {static_cast<Act>(act), static_cast<int>(order), clamp.has_value(), alpha, gain, clamp.value_or(0.0)};
  const DeviceGuard guard(x);
#if !defined(GENFAST_BACKEND_CPU)
  std::optional<Tensor> workspace;
  if (p.sums) {
    const int64_t doubles[1] = {partial_doubles(p)};
    workspace = torch::stable::new_empty(x, {doubles, 1}, ScalarType::Double);
    p.partial = static_cast<double*>(workspace->data_ptr());
  }
#endif
  GENFAST_LAUNCH(bias_act, p, x);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("bias_act_", TORCH_BOX(&genfast::bias_act_));
}
