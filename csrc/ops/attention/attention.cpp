// attention_(Tensor(a!) o, Tensor(b!) lse, Tensor(c!)? row_stats, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, bool causal,
//            float scale) -> ()
// attention_backward_(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, Tensor(e!) delta, Tensor grad_o, Tensor? grad_lse,
//                     Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, bool causal, float scale, Tensor o, Tensor row_stats) -> ()
// attention_tangent_(Tensor(a!) to, Tensor(b!) tlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, bool causal, float scale,
//                    Tensor tq, Tensor tk, Tensor tv, Tensor o, Tensor row_stats) -> ()                                on CUDA alone
// attention_varlen_(Tensor(a!) o, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q,
//                   bool causal, float scale) -> ()
// Everything of full shape, but for dbias: what is broadcast has stride 0. row_stats: (B, H, N, 2), RowStats of each query. Not empty.
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(attention, AttentionParams);
GENFAST_DECLARE_LAUNCH(attention_backward, AttentionBackwardParams);
GENFAST_DECLARE_LAUNCH(attention_tangent, AttentionTangentParams);

namespace {

AttentionRows rows_of(const Tensor& t, const char* name, const Tensor& like, int64_t heads, int64_t rows, int64_t columns) {
  check(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == heads && t.size(2) == rows && t.size(3) == columns, name,
        ": got another shape, supported: (", like.size(0), ", ", heads, ", ", rows, ", ", columns, ")");
  check(t.stride(3) == 1 || columns == 1, name, ": got a last stride of ", t.stride(3), ", supported: 1");
  check_device(t, like);
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// A dense float32 tensor of shape (batch, heads, n).
float* per_query(const Tensor& t, const char* name, const AttentionParams& p, const Tensor& like) {
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == p.batch * p.heads * p.n, name,
        ": supported: a contiguous float32 tensor of shape (B, H, N)");
  check_device(t, like);
  return static_cast<float*>(t.data_ptr());
}

RowStats* stats_of(const Tensor& t, const AttentionParams& p, const Tensor& like) {
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == 2 * p.batch * p.heads * p.n,
        "row_stats: supported: a contiguous float32 tensor of shape (B, H, N, 2)");
  check_device(t, like);
  return static_cast<RowStats*>(t.data_ptr());
}

AttentionParams params_of(const Tensor& o, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
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
  p.unit = score_unit(p.bias, p.scale);
  return p;
}

void attention_(const Tensor& o, const Tensor& lse, const std::optional<Tensor>& row_stats, const Tensor& q, const Tensor& k,
                const Tensor& v, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, bool causal, double scale) {
  AttentionParams p = params_of(o, q, k, v, bias, mask, causal, scale);
  p.lse = per_query(lse, "lse", p, q);
  if (row_stats.has_value()) p.row_stats = stats_of(*row_stats, p, q);
  const DeviceGuard guard(q);
  GENFAST_LAUNCH(attention, p, q);
}

void attention_backward_(const Tensor& dq, const Tensor& dk, const Tensor& dv, const std::optional<Tensor>& dbias, const Tensor& delta,
                         const Tensor& grad_o, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, bool causal, double scale, const Tensor& o,
                         const Tensor& row_stats) {
  AttentionBackwardParams p{};
  AttentionParams& f = p.forward = params_of(o, q, k, v, bias, mask, causal, scale);
  f.row_stats = stats_of(row_stats, f, q);
  p.grad_o_at = rows_of(grad_o, "grad_o", q, f.heads, f.n, f.d);
  p.dq_at = rows_of(dq, "dq", q, f.heads, f.n, f.d);
  p.dk_at = rows_of(dk, "dk", q, f.kv_heads, f.m, f.d);
  p.dv_at = rows_of(dv, "dv", q, f.kv_heads, f.m, f.d);
  for (const auto* t : {&grad_o, &dq, &dk, &dv}) {
    check(t->scalar_type() == q.scalar_type(), "grad_o, dq, dk, dv: got another dtype than q's, supported: the same");
  }
  p.grad_o = grad_o.data_ptr();
  p.dq = dq.data_ptr();
  p.dk = dk.data_ptr();
  p.dv = dv.data_ptr();
  p.delta = per_query(delta, "delta", f, q);
  if (grad_lse.has_value()) p.grad_lse = per_query(*grad_lse, "grad_lse", f, q);
  if (dbias.has_value()) {
    const int64_t whole[4] = {f.batch, f.heads, f.n, f.m};
    bool fits = f.bias && dbias->dim() == 4;
    for (int i = 0; fits && i < 4; ++i) fits = dbias->size(i) == 1 || dbias->size(i) == whole[i];
    check(fits && dbias->scalar_type() == ScalarType::Float && dbias->is_contiguous(),
          "dbias: supported: a contiguous float32 tensor of the bias's own four dimensions");
    check_device(*dbias, q);
    const auto stride = [&](int i) { return dbias->size(i) == 1 ? 0 : dbias->stride(i); };
    p.dbias_at = {stride(0), stride(1), stride(2)};
    p.dbias_column = stride(3);
    p.dbias = static_cast<float*>(dbias->data_ptr());
  }
  const DeviceGuard guard(q);
  GENFAST_LAUNCH(attention_backward, p, q);
}

#if !defined(GENFAST_BACKEND_CPU)
void attention_tangent_(const Tensor& to, const Tensor& tlse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, bool causal, double scale, const Tensor& tq,
                        const Tensor& tk, const Tensor& tv, const Tensor& o, const Tensor& row_stats) {
  AttentionTangentParams p{};
  AttentionParams& f = p.forward = params_of(o, q, k, v, bias, mask, causal, scale);
  f.row_stats = stats_of(row_stats, f, q);
  p.to_at = rows_of(to, "to", q, f.heads, f.n, f.d);
  p.tq_at = rows_of(tq, "tq", q, f.heads, f.n, f.d);
  p.tk_at = rows_of(tk, "tk", q, f.kv_heads, f.m, f.d);
  p.tv_at = rows_of(tv, "tv", q, f.kv_heads, f.m, f.d);
  for (const auto* t : {&to, &tq, &tk, &tv}) {
    check(t->scalar_type() == q.scalar_type(), "to, tq, tk, tv: got another dtype than q's, supported: the same");
  }
  p.to = to.data_ptr();
  p.tq = tq.data_ptr();
  p.tk = tk.data_ptr();
  p.tv = tv.data_ptr();
  p.tlse = per_query(tlse, "tlse", f, q);
  const DeviceGuard guard(q);
  GENFAST_LAUNCH(attention_tangent, p, q);
}
#endif

#if !defined(GENFAST_BACKEND_CPU)  // there the sequences run one by one
AttentionRows packed_rows(const Tensor& t, const char* name, const Tensor& q, int64_t heads, int64_t rows) {
  check(t.dim() == 3 && t.size(0) == rows && t.size(1) == heads && t.size(2) == q.size(2), name, ": got another shape, supported: (", rows,
        ", ", heads, ", ", q.size(2), ")");
  check(t.stride(2) == 1 || t.size(2) == 1, name, ": got a last stride of ", t.stride(2), ", supported: 1");
  check(t.scalar_type() == q.scalar_type(), name, ": got another dtype than q's, supported: the same");
  check_device(t, q);
  return {0, t.stride(1), t.stride(0)};
}

void attention_varlen_(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                       const Tensor& cu_seqlens_k, int64_t max_seqlen_q, bool causal, double scale) {
  check(q.dim() == 3 && k.dim() == 3 && cu_seqlens_q.dim() == 1, "q, k, cu_seqlens_q: got ", q.dim(), ", ", k.dim(), " and ",
        cu_seqlens_q.dim(), " dimensions, supported: 3, 3 and 1");
  AttentionParams p{};
  p.batch = cu_seqlens_q.size(0) - 1;
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.packed = q.size(0);
  p.packed_keys = k.size(0);
  p.n = max_seqlen_q;
  p.m = p.packed_keys;
  p.d = q.size(2);
  check(
      p.batch > 0 && p.n > 0 && p.packed > 0 && p.d > 0 && p.kv_heads > 0 && p.heads > 0 && p.heads % p.kv_heads == 0,
      "q, k, cu_seqlens_q, max_seqlen_q: got an empty tensor or heads that do not divide, supported: (total_q, H, D), (total_k, H / g, D)");
  p.dtype = dtype_of(q, "q");
  check(p.dtype != DType::F64, "q: got float64, supported: float32, bfloat16, float16");
  p.q_at = packed_rows(q, "q", q, p.heads, p.packed);
  p.k_at = packed_rows(k, "k", q, p.kv_heads, p.packed_keys);
  p.v_at = packed_rows(v, "v", q, p.kv_heads, p.packed_keys);
  p.o_at = packed_rows(o, "o", q, p.heads, p.packed);
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.o = o.data_ptr();
  check(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == p.heads * p.packed,
        "lse: supported: a contiguous float32 tensor of shape (H, total_q)");
  check_device(lse, q);
  p.lse = static_cast<float*>(lse.data_ptr());
  for (const auto* t : {&cu_seqlens_q, &cu_seqlens_k}) {
    check((t->scalar_type() == ScalarType::Long || t->scalar_type() == ScalarType::Int) && t->is_contiguous() &&
              t->numel() == p.batch + 1 && t->scalar_type() == cu_seqlens_q.scalar_type(),
          "cu_seqlens_q, cu_seqlens_k: supported: contiguous int32 or int64 tensors of shape (B + 1,), both alike");
    check_device(*t, q);
  }
  p.wide_starts = cu_seqlens_q.scalar_type() == ScalarType::Long;
  p.q_starts = cu_seqlens_q.data_ptr();
  p.k_starts = cu_seqlens_k.data_ptr();
  p.causal = causal;
  p.scale = static_cast<float>(scale);
  p.unit = score_unit(p.bias, p.scale);
  const DeviceGuard guard(q);
  GENFAST_LAUNCH(attention, p, q);
}
#endif

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("attention_", TORCH_BOX(&genfast::attention_));
  m.impl("attention_backward_", TORCH_BOX(&genfast::attention_backward_));
#if !defined(GENFAST_BACKEND_CPU)
  m.impl("attention_tangent_", TORCH_BOX(&genfast::attention_tangent_));
  m.impl("attention_varlen_", TORCH_BOX(&genfast::attention_varlen_));
#endif
}
