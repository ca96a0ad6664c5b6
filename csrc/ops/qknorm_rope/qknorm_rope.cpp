// qknorm_rope_(Tensor(a!) q_out, Tensor(b!)? k_out, Tensor(c!)? q_sums, Tensor(d!)? k_sums, Tensor? q_grad, Tensor? k_grad,
//              Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? cos, Tensor? sin,
//              int norm, float eps, bool across_heads, bool interleaved) -> ()
// Without gradients the outputs are the results, with them the gradients of q and k. Not empty.
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(qknorm_rope, QkNormRopeParams);

namespace {

using Maybe = std::optional<Tensor>;

QkRows rows_of(const Tensor& t, const char* name, const Tensor& like) {
  check(t.scalar_type() == like.scalar_type(), name, ": got another dtype than q's, supported: the same");
  check(t.dim() == 4, name, ": got ", t.dim(), " dimensions, supported: 4");
  check(t.stride(3) == 1 || t.size(3) == 1, name, ": got a last stride of ", t.stride(3), ", supported: 1");
  check_device(t, like);
  return {t.stride(0), t.stride(1), t.stride(2)};
}

void check_shape(const Tensor& t, const char* name, const Tensor& like) {
  for (int64_t i = 0; i < 4; ++i) check(t.size(i) == like.size(i), name, ": got another shape than its tensor's, supported: the same");
}

// A contiguous tensor of the arithmetic's dtype with `elements` elements.
const void* wide_data(const Maybe& t, const char* name, const Tensor& like, ScalarType wide, int64_t elements) {
  if (!t.has_value()) return nullptr;
  check(t->scalar_type() == wide && t->is_contiguous() && t->numel() == elements, name, ": supported: ", elements,
        " elements, contiguous, in ", torch::headeronly::toString(wide));
  check_device(*t, like);
  return t->data_ptr();
}

QkSide side_of(const Tensor& out, const Tensor& x, const Maybe& grad, const Maybe& sums, const Maybe& weight, const Maybe& bias,
               const Tensor& like, ScalarType wide) {
  QkSide side{};
  side.x = x.data_ptr();
  side.x_at = rows_of(x, "q, k", like);
  check(x.size(0) == like.size(0) && x.size(2) == like.size(2) && x.size(3) == like.size(3) && x.numel() > 0,
        "k: got another batch, length or head dimension than q's, or no elements, supported: the same");
  side.out_at = rows_of(out, "q_out, k_out", like);
  check_shape(out, "q_out, k_out", x);
  side.out = out.data_ptr();
  if (grad.has_value()) {
    side.grad_at = rows_of(*grad, "q_grad, k_grad", like);
    check_shape(*grad, "q_grad, k_grad", x);
    side.grad = grad->data_ptr();
  }
  side.heads = x.size(1);
  side.weight_heads = (weight.has_value() && weight->dim() == 2) || (bias.has_value() && bias->dim() == 2) ? side.heads : 1;
  const int64_t elements = side.weight_heads * x.size(3);
  side.weight = wide_data(weight, "q_weight, k_weight", like, wide, elements);
  side.bias = wide_data(bias, "q_bias, k_bias", like, wide, elements);
  if (sums.has_value()) {
    check(sums->scalar_type() == ScalarType::Double && sums->is_contiguous() && sums->numel() == 2 * elements && grad.has_value(),
          "q_sums, k_sums: supported: with a gradient, ", 2 * elements, " contiguous elements in float64");
    check_device(*sums, like);
    side.sums = static_cast<double*>(sums->data_ptr());
  }
  return side;
}

void qknorm_rope_(const Tensor& q_out, const Maybe& k_out, const Maybe& q_sums, const Maybe& k_sums, const Maybe& q_grad,
                  const Maybe& k_grad, const Tensor& q, const Maybe& k, const Maybe& q_weight, const Maybe& k_weight, const Maybe& q_bias,
                  const Maybe& k_bias, const Maybe& cos, const Maybe& sin, int64_t norm, double eps, bool across_heads, bool interleaved) {
  QkNormRopeParams p{};
  p.dtype = dtype_of(q, "q");
  check(q.dim() == 4, "q: got ", q.dim(), " dimensions, supported: 4");
  const ScalarType wide = p.dtype == DType::F64 ? ScalarType::Double : ScalarType::Float;
  p.batch = q.size(0);
  p.tokens = q.size(2);
  p.head_dim = q.size(3);
  check(p.head_dim <= kQkMaxHeadDim, "q: got a head dimension of ", p.head_dim, ", supported: 1 to ", kQkMaxHeadDim);
  check(norm >= 0 && norm <= 2, "norm: got ", norm, ", supported: 0 to 2");
  check(k.has_value() == k_out.has_value() && (k.has_value() && q_grad.has_value()) == k_grad.has_value(),
        "k, k_out, k_grad: got some of them, supported: k with its output and, where q has one, its gradient, or none");
  p.side[0] = side_of(q_out, q, q_grad, q_sums, q_weight, q_bias, q, wide);
  if (k.has_value()) p.side[1] = side_of(*k_out, *k, k_grad, k_sums, k_weight, k_bias, q, wide);
  check(cos.has_value() == sin.has_value(), "cos, sin: got one of them, supported: both or none");
  if (cos.has_value()) {
    check(cos->dim() == 3, "cos: got ", cos->dim(), " dimensions, supported: 3");
    const int64_t half = cos->size(2);
    check(cos->size(1) == p.tokens && (cos->size(0) == 1 || cos->size(0) == p.batch) && 2 * half <= p.head_dim,
          "cos: got another shape, supported: (1 or ", p.batch, ", ", p.tokens, ", at most ", p.head_dim / 2, ")");
    p.cos = wide_data(cos, "cos", q, wide, cos->numel());
    p.sin = wide_data(sin, "sin", q, wide, cos->numel());
    p.table_n = half;
    p.table_b = cos->size(0) == 1 ? 0 : p.tokens * half;
    p.rotary = 2 * half;
  }
  p.norm = static_cast<QkNorm>(norm);
  p.eps = eps;
  p.across_heads = across_heads;
  p.interleaved = interleaved;
  const DeviceGuard guard(q);
#if !defined(GENFAST_BACKEND_CPU)
  Maybe workspace;
  if (p.side[0].sums || p.side[1].sums) {
    const int64_t values[1] = {partial_values(p)};
    workspace = torch::stable::new_empty(q, {values, 1}, wide);
    p.partial = workspace->data_ptr();
  }
#endif
  GENFAST_LAUNCH(qknorm_rope, p, q);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("qknorm_rope_", TORCH_BOX(&genfast::qknorm_rope_));
}
