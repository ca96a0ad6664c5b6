// attention_(Tensor(a!) o, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, bool causal, float scale) -> ()
// Everything of full shape: what is broadcast has stride 0. Not empty.
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(attention, AttentionParams);

namespace {

AttentionRows rows_of(const Tensor& t, const char* name, const Tensor& like, int64_t heads, int64_t rows, int64_t columns) {
  check(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == heads && t.size(2) == rows && t.size(3) == columns, name,
        ": got another shape, supported: (", like.size(0), ", ", heads, ", ", rows, ", ", columns, ")");
  check(t.stride(3) == 1 || columns == 1, name, ": got a last stride of ", t.stride(3), ", supported: 1");
  check_device(t, like);
  return {t.stride(0), t.stride(1), t.stride(2)};
}

void attention_(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& mask, bool causal, double scale) {
  check(q.dim() == 4 && k.dim() == 4, "q, k: got ", q.dim(), " and ", k.dim(), " dimensions, supported: 4");
  AttentionParams p{};
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.n = q.size(2);
  p.d = q.size(3);
  p.kv_heads = k.size(1);
  p.m = k.size(2);
  check(p.batch > 0 && p.n > 0 && p.m > 0 && p.d > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0,
        "q, k: got an empty tensor or heads that do not divide, supported: (B, H, N, D) and (B, H / g, M, D)");
  p.dtype = dtype_of(q, "q");
  check(p.dtype != DType::F64, "q: got float64, supported: float32, bfloat16, float16");
  p.q_at = rows_of(q, "q", q, p.heads, p.n, p.d);
  p.k_at = rows_of(k, "k", q, p.kv_heads, p.m, p.d);
  p.v_at = rows_of(v, "v", q, p.kv_heads, p.m, p.d);
  p.o_at = rows_of(o, "o", q, p.heads, p.n, p.d);
  for (const auto* t : {&k, &v, &o}) check(t->scalar_type() == q.scalar_type(), "k, v, o: got another dtype than q's, supported: the same");
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.o = o.data_ptr();
  check(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == p.batch * p.heads * p.n,
        "lse: supported: a contiguous float32 tensor of shape (B, H, N)");
  check_device(lse, q);
  p.lse = static_cast<float*>(lse.data_ptr());
  if (bias.has_value()) {
    p.bias_dtype = dtype_of(*bias, "bias");
    check(p.bias_dtype == DType::F32 || p.bias_dtype == p.dtype, "bias: supported: float32 or q's dtype");
    p.bias_at = rows_of(*bias, "bias", q, p.heads, p.n, p.m);
    p.bias = bias->data_ptr();
  }
  if (mask.has_value()) {
    check(mask->scalar_type() == ScalarType::Bool, "mask: got dtype ", torch::headeronly::toString(mask->scalar_type()),
          ", supported: bool");
    p.mask_at = rows_of(*mask, "mask", q, p.heads, p.n, p.m);
    p.mask = static_cast<const uint8_t*>(mask->data_ptr());
  }
  p.causal = causal;
  p.scale = static_cast<float>(scale);
  const DeviceGuard guard(q);
  GENFAST_LAUNCH(attention, p, q);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("attention_", TORCH_BOX(&genfast::attention_));
}
