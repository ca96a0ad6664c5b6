// bn_act_(Tensor(a!)? out, Tensor(b!)? sums, Tensor x, Tensor? dy, Tensor? residual, Tensor? coef, int samples, int inner, int which,
//   int act, float alpha, float gain) -> ()
// bn_coefficients_(Tensor(a!) coef, Tensor(b!)? gradients, Tensor moments, Tensor? sums, Tensor? means, Tensor? weight, Tensor? bias,
//   int groups, float eps) -> ()
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(bn_act, BnActParams);
GENFAST_DECLARE_LAUNCH(bn_coefficients, BnCoefficientsParams);

namespace {

using OptionalTensor = std::optional<Tensor>;

void* alike(const OptionalTensor& t, const Tensor& x, const char* name) {
  if (!t.has_value()) return nullptr;
  check(t->scalar_type() == x.scalar_type() && t->dim() == x.dim(), name, ": got another dtype or rank than x's, supported: the same");
  check_device(*t, x);
  for (int64_t i = 0; i < x.dim(); ++i) {
    check(t->size(i) == x.size(i) && (x.size(i) == 1 || t->stride(i) == x.stride(i)), name,
          ": got a shape or strides other than x's, supported: the same");
  }
  return t->data_ptr();
}

// A (2, samples, channels) array of float64, or nullptr.
double* by_channel(const OptionalTensor& t, const Tensor& like, int64_t numel, const char* name) {
  if (!t.has_value()) return nullptr;
  check(t->scalar_type() == ScalarType::Double && t->is_contiguous() && t->numel() == numel, name,
        ": supported: a contiguous float64 tensor of shape (2, samples, channels)");
  check_device(*t, like);
  return static_cast<double*>(t->data_ptr());
}

void bn_act_(const OptionalTensor& out, const OptionalTensor& sums, const Tensor& x, const OptionalTensor& dy,
             const OptionalTensor& residual, const OptionalTensor& coef, int64_t samples, int64_t inner, int64_t pass, int64_t act,
             double alpha, double gain) {
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
  check(summing == sums.has_value() && (p.pass == BnPass::Sums || summing != out.has_value()) && differentiating == dy.has_value() &&
            (p.pass == BnPass::Moments) != coef.has_value() && (p.pass != BnPass::Moments || !residual.has_value()),
        "out, sums, dy, residual, coef: got others than pass ", pass, " takes, supported: those of csrc/ops/bn_act/params.h");
  // The sums say how many channels there are in the pass that has no coefficients.
  const Tensor& channels = coef.has_value() ? *coef : *sums;
  check(channels.dim() == 3 && channels.size(1) == samples && samples >= 1, "coef, sums: supported: shape (*, ", samples, ", channels)");
  p.samples = samples;
  p.channels = channels.size(2);
  if (coef.has_value()) {
    const ScalarType wide = p.dtype == DType::F64 ? ScalarType::Double : ScalarType::Float;
    check(coef->scalar_type() == wide && coef->size(0) == kBnCoefficients && coef->is_contiguous(),
          "coef: supported: a contiguous tensor of shape (", kBnCoefficients, ", samples, channels) in ",
          torch::headeronly::toString(wide));
    check_device(*coef, x);
    p.coef = coef->data_ptr();
  }
  check(inner >= 1 && p.channels >= 1 && x.numel() % (samples * p.channels * inner) == 0, "inner: got ", inner,
        ", supported: what divides ", x.numel(), " elements into ", samples, " samples and ", p.channels, " channels");
  p.sums = by_channel(sums, x, 2 * samples * p.channels, "sums");
  p.out = alike(out, x, "out");
  p.dy = alike(dy, x, "dy");
  p.residual = alike(residual, x, "residual");
  p.x = x.data_ptr();
  p.inner = inner;
  p.outer = x.numel() / (samples * p.channels * inner);
  p.curve = {static_cast<Act>(act), p.pass == BnPass::Apply ? 0 : 1, false, alpha, gain, 0.0};
  const DeviceGuard guard(x);
#if !defined(GENFAST_BACKEND_CPU)
  OptionalTensor workspace;
  if (summing) {
    const int64_t doubles[1] = {partial_doubles(p)};
    workspace = torch::stable::new_empty(x, {doubles, 1}, ScalarType::Double);
    p.partial = static_cast<double*>(workspace->data_ptr());
  }
#endif
  GENFAST_LAUNCH(bn_act, p, x);
}

const void* per_channel(const OptionalTensor& t, const Tensor& like, int64_t channels, const char* name, DType* dtype) {
  if (!t.has_value()) return nullptr;
  check(t->dim() == 1 && t->size(0) == channels && t->is_contiguous(), name, ": supported: a contiguous tensor of shape (", channels, ",)");
  check_device(*t, like);
  *dtype = dtype_of(*t, name);
  return t->data_ptr();
}

void bn_coefficients_(const Tensor& coef, const OptionalTensor& gradients, const Tensor& moments, const OptionalTensor& sums,
                      const OptionalTensor& means, const OptionalTensor& weight, const OptionalTensor& bias, int64_t groups, double eps) {
  BnCoefficientsParams p{};
  p.dtype = dtype_of(coef, "coef");
  check((p.dtype == DType::F32 || p.dtype == DType::F64) && coef.dim() == 3 && coef.size(0) == kBnCoefficients && coef.is_contiguous(),
        "coef: supported: a contiguous float32 or float64 tensor of shape (", kBnCoefficients, ", samples, channels)");
  p.samples = coef.size(1);
  p.channels = coef.size(2);
  check(groups >= 1 && p.channels % groups == 0, "groups: got ", groups, ", supported: a divisor of ", p.channels);
  check(sums.has_value() == gradients.has_value(), "gradients: supported: with sums, and only with them");
  const int64_t numel = 2 * p.samples * p.channels;
  p.coef = coef.data_ptr();
  p.moments = by_channel(moments, coef, numel, "moments");
  p.gradients = by_channel(gradients, coef, numel, "gradients");
  p.sums = by_channel(sums, coef, numel, "sums");
  p.means = by_channel(means, coef, numel, "means");
  p.weight = per_channel(weight, coef, p.channels, "weight", &p.weight_dtype);
  p.bias = per_channel(bias, coef, p.channels, "bias", &p.bias_dtype);
  p.groups = groups;
  p.eps = eps;
  const DeviceGuard guard(coef);
  GENFAST_LAUNCH(bn_coefficients, p, coef);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("bn_act_", TORCH_BOX(&genfast::bn_act_));
  m.impl("bn_coefficients_", TORCH_BOX(&genfast::bn_coefficients_));
}
