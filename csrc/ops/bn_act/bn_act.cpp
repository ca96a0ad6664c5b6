// bn_act_(Tensor(a!)? out, Tensor(b!)? sums, Tensor x, Tensor? dy, Tensor coef, int inner, int which, int act, float alpha) -> ()
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(bn_act, BnActParams);

namespace {

void* alike(const std::optional<Tensor>& t, const Tensor& x, const char* name) {
  if (!t.has_value()) return nullptr;
  check(t->scalar_type() == x.scalar_type() && t->dim() == x.dim(), name, ": got another dtype or rank than x's, supported: the same");
  check_device(*t, x);
  for (int64_t i = 0; i < x.dim(); ++i) {
    check(t->size(i) == x.size(i) && (x.size(i) == 1 || t->stride(i) == x.stride(i)), name,
          ": got a shape or strides other than x's, supported: the same");
  }
  return t->data_ptr();
}

void bn_act_(const std::optional<Tensor>& out, const std::optional<Tensor>& sums, const Tensor& x, const std::optional<Tensor>& dy,
             const Tensor& coef, int64_t inner, int64_t pass, int64_t act, double alpha) {
  BnActParams p{};
  p.dtype = dtype_of(x, "x");
  int64_t reach = 1;
  for (int64_t i = 0; i < x.dim(); ++i) reach += (x.size(i) - 1) * x.stride(i);
  check(x.numel() > 0 && reach == x.numel(), "x: got a tensor with gaps or without elements, supported: a dense one");
  check(act >= 0 && act < kActivations, "act: got ", act, ", supported: 0 to ", kActivations - 1);
  check(pass >= 0 && pass <= 3, "pass: got ", pass, ", supported: 0 to 3");
  p.pass = static_cast<BnPass>(pass);
  const bool summing = p.pass == BnPass::Moments || p.pass == BnPass::Sums;
  const bool differentiating = p.pass == BnPass::Sums || p.pass == BnPass::Backward;
  check(summing == sums.has_value() && summing != out.has_value() && differentiating == dy.has_value(),
        "out, sums, dy: got others than pass ", pass, " takes, supported: out or sums, and dy for a derivative");
  const ScalarType wide = p.dtype == DType::F64 ? ScalarType::Double : ScalarType::Float;
  check(coef.scalar_type() == wide && coef.dim() == 2 && coef.size(0) == kBnCoefficients && coef.is_contiguous(),
        "coef: supported: a contiguous tensor of shape (", kBnCoefficients, ", channels) in ", torch::headeronly::toString(wide));
  check_device(coef, x);
  p.channels = coef.size(1);
  check(inner >= 1 && p.channels >= 1 && x.numel() % (p.channels * inner) == 0, "inner: got ", inner, ", supported: what divides ",
        x.numel(), " elements into ", p.channels, " channels");
  if (summing) {
    check(sums->scalar_type() == ScalarType::Double && sums->is_contiguous() && sums->numel() == 2 * p.channels,
          "sums: supported: a contiguous float64 tensor of shape (2, ", p.channels, ")");
    check_device(*sums, x);
    p.sums = static_cast<double*>(sums->data_ptr());
  }
  p.out = alike(out, x, "out");
  p.dy = alike(dy, x, "dy");
  p.x = x.data_ptr();
  p.coef = coef.data_ptr();
  p.inner = inner;
  p.outer = x.numel() / (p.channels * inner);
  p.curve = {static_cast<Act>(act), 0, false, alpha, 1.0, 0.0};
  const DeviceGuard guard(x);
#if !defined(GENFAST_BACKEND_CPU)
  std::optional<Tensor> workspace;
  if (summing) {
    const int64_t doubles[1] = {partial_doubles(p)};
    workspace = torch::stable::new_empty(x, {doubles, 1}, ScalarType::Double);
    p.partial = static_cast<double*>(workspace->data_ptr());
  }
#endif
  GENFAST_LAUNCH(bn_act, p, x);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("bn_act_", TORCH_BOX(&genfast::bn_act_));
}
