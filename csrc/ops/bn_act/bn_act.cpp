// bn_act_(Tensor(a!)? out, Tensor(b!)? g, Tensor(c!)? sums, Tensor(d!) moments, Tensor(e!)? gradients, Tensor x, Tensor? dy,
//   Tensor? residual, Tensor? totals, Tensor? weight, Tensor? bias, int samples, int inner, int which, int groups, float eps,
//   float elements, int act, float alpha, float gain) -> ()
#include <memory>
#include <optional>

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

const void* per_channel(const OptionalTensor& t, const Tensor& like, int64_t channels, const char* name, DType* dtype) {
  if (!t.has_value()) return nullptr;
  check(t->dim() == 1 && t->size(0) == channels && t->is_contiguous(), name, ": supported: a contiguous tensor of shape (", channels, ",)");
  check_device(*t, like);
  *dtype = dtype_of(*t, name);
  return t->data_ptr();
}

#if defined(GENFAST_BACKEND_CPU)
class Workspace {
 public:
  Workspace(const Tensor&, int64_t doubles) : data_(new double[static_cast<size_t>(doubles)]) {}
  double* data() { return data_.get(); }

 private:
  std::unique_ptr<double[]> data_;
};
#else
class Workspace {
 public:
  Workspace(const Tensor& x, int64_t doubles) : data_(torch::stable::new_empty(x, {&doubles, 1}, ScalarType::Double)) {}
  double* data() { return static_cast<double*>(data_.data_ptr()); }

 private:
  Tensor data_;
};
#endif

// What is asked for: one pass, or one that sums and the one that needs the sums.
enum class Which : int64_t { Moments = 0, Apply = 1, Sums = 2, Backward = 3, MomentsApply = 4, SumsBackward = 5 };

void run_pass(BnActParams p, BnPass pass, [[maybe_unused]] const Tensor& x) {
  p.pass = pass;
  p.curve.order = pass == BnPass::Apply ? 0 : 1;
#if !defined(GENFAST_BACKEND_CPU)
  std::optional<Workspace> partial;
  if (p.sums) p.partial = partial.emplace(x, partial_doubles(p)).data();
#endif
  GENFAST_LAUNCH(bn_act, p, x);
}

void bn_act_(const OptionalTensor& out, const OptionalTensor& g, const OptionalTensor& sums, const Tensor& moments,
             const OptionalTensor& gradients, const Tensor& x, const OptionalTensor& dy, const OptionalTensor& residual,
             const OptionalTensor& totals, const OptionalTensor& weight, const OptionalTensor& bias, int64_t samples, int64_t inner,
             int64_t which, int64_t groups, double eps, double elements, int64_t act, double alpha, double gain) {
  check(which >= 0 && which <= 5, "which: got ", which, ", supported: 0 to 5");
  check(act >= 0 && act < kActivations, "act: got ", act, ", supported: 0 to ", kActivations - 1);
  const Which asked = static_cast<Which>(which);
  const bool own_moments = asked == Which::Moments || asked == Which::MomentsApply;
  const bool applying = asked == Which::Apply || asked == Which::MomentsApply;
  const bool summing = asked == Which::Sums || asked == Which::SumsBackward;
  const bool backward = asked == Which::Backward || asked == Which::SumsBackward;
  check(out.has_value() == (applying || backward) && dy.has_value() == (summing || backward) && (!g.has_value() || summing) &&
            (sums.has_value() == summing || asked == Which::Backward) && gradients.has_value() == (backward && sums.has_value()) &&
            (!totals.has_value() || (asked == Which::Backward && elements > 0.0)) && (asked != Which::Moments || !residual.has_value()),
        "out, g, sums, moments, gradients, dy, residual, totals: got others than ", which, " takes, supported: those of csrc/ops/bn_act");

  BnActParams p{};
  p.dtype = dtype_of(x, "x");
  int64_t reach = 1;
  for (int64_t i = 0; i < x.dim(); ++i) reach += (x.size(i) - 1) * x.stride(i);
  check(x.numel() > 0 && reach == x.numel(), "x: got a tensor with gaps or without elements, supported: a dense one");
  check(moments.dim() == 3 && moments.size(1) == samples && samples >= 1, "moments: supported: shape (2, ", samples, ", channels)");
  p.samples = samples;
  p.channels = moments.size(2);
  check(inner >= 1 && p.channels >= 1 && x.numel() % (samples * p.channels * inner) == 0, "inner: got ", inner,
        ", supported: what divides ", x.numel(), " elements into ", samples, " samples and ", p.channels, " channels");
  check(groups >= 1 && p.channels % groups == 0, "groups: got ", groups, ", supported: a divisor of ", p.channels);
  const int64_t numel = 2 * samples * p.channels;
  p.x = x.data_ptr();
  p.inner = inner;
  p.outer = x.numel() / (samples * p.channels * inner);
  p.curve = {static_cast<Act>(act), 0, false, alpha, gain, 0.0};

  BnCoefficientsParams c{};
  c.dtype = p.dtype == DType::F64 ? DType::F64 : DType::F32;
  double *const found = by_channel(moments, x, numel, "moments"), *const summed = by_channel(sums, x, numel, "sums");
  c.moments = found;
  c.sums = summed;
  c.gradients = by_channel(gradients, x, numel, "gradients");
  c.totals = asked == Which::SumsBackward && elements > 0.0 ? c.sums : by_channel(totals, x, numel, "totals");
  c.weight = per_channel(weight, x, p.channels, "weight", &c.weight_dtype);
  c.bias = per_channel(bias, x, p.channels, "bias", &c.bias_dtype);
  c.samples = samples;
  c.channels = p.channels;
  c.groups = groups;
  c.eps = eps;
  c.elements = elements;
  void *const result = alike(out, x, "out"), *const kept = alike(g, x, "g");
  const void *const given = alike(dy, x, "dy"), *const added = alike(residual, x, "residual");

  const DeviceGuard guard(x);
  if (own_moments) {
    BnActParams pass = p;
    pass.sums = found;
    run_pass(pass, BnPass::Moments, x);
  }
  if (asked == Which::Moments) return;
  Workspace coef(x, kBnCoefficients * samples * p.channels);
  p.coef = c.coef = coef.data();
  p.dy = given;
  p.residual = added;
  const auto coefficients = [&](const double* totals, double* gradients) {
    BnCoefficientsParams some = c;
    some.totals = totals;
    some.gradients = gradients;
    GENFAST_LAUNCH(bn_coefficients, some, x);
  };
  if (summing) {
    coefficients(nullptr, nullptr);
    BnActParams pass = p;
    pass.sums = summed;
    pass.out = kept;
    run_pass(pass, BnPass::Sums, x);
    if (kept) {  // the gradient of u takes the place of dy
      p.dy = kept;
      p.residual = nullptr;
      p.curve = {Act::Linear, 0, false, 0.0, 1.0, 0.0};
    }
  }
  if (asked == Which::Sums) return;
  coefficients(c.totals, c.gradients);
  p.out = result;
  run_pass(p, applying ? BnPass::Apply : BnPass::Backward, x);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("bn_act_", TORCH_BOX(&genfast::bn_act_));
}
