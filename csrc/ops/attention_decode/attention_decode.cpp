// attention_decode_(Tensor(a!) o, Tensor(b!) lse, Tensor(c!)? parts, Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? bias, bool
//                   causal, float scale, int splits) -> ()
// The bias is of full shape: what is broadcast has stride 0. `parts` is the workspace of splits > 1. Not empty.
#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(attention_decode, AttentionDecodeParams);

namespace {

DecodeRows rows_of(const Tensor& t, const char* name, const Tensor& like, int64_t heads, int64_t rows, int64_t columns) {
  check(t.dim() == 4 && t.size(0) == like.size(0) && t.size(1) == heads && t.size(2) == rows && t.size(3) == columns, name,
        ": got another shape, supported: (", like.size(0), ", ", heads, ", ", rows, ", ", columns, ")");
  check(t.stride(3) == 1 || columns == 1, name, ": got a last stride of ", t.stride(3), ", supported: 1");
  check_device(t, like);
  return {t.stride(0), t.stride(1), t.stride(2)};
}

void attention_decode_(const Tensor& o, const Tensor& lse, const std::optional<Tensor>& parts, const Tensor& q, const Tensor& k,
                       const Tensor& v, const Tensor& lengths, const std::optional<Tensor>& bias, bool causal, double scale,
                       int64_t splits) {
  check(q.dim() == 4 && k.dim() == 4, "q, k: got ", q.dim(), " and ", k.dim(), " dimensions, supported: 4");
  AttentionDecodeParams p{};
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.n = q.size(2);
  p.d = q.size(3);
  p.kv_heads = k.size(1);
  p.capacity = k.size(2);
  check(p.batch > 0 && p.n > 0 && p.n <= kDecodeQueries && p.capacity > 0 && p.d > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0,
        "q, k: got an empty tensor, heads that do not divide or ", p.n, " queries, supported: (B, H, 1 to ", kDecodeQueries,
        ", D) and (B, H / g, capacity, D)");
  p.dtype = dtype_of(q, "q");
  check(p.dtype != DType::F64, "q: got float64, supported: float32, bfloat16, float16");
  p.q_at = rows_of(q, "q", q, p.heads, p.n, p.d);
  p.k_at = rows_of(k, "k", q, p.kv_heads, p.capacity, p.d);
  p.v_at = rows_of(v, "v", q, p.kv_heads, p.capacity, p.d);
  p.o_at = rows_of(o, "o", q, p.heads, p.n, p.d);
  for (const auto* t : {&k, &v, &o}) check(t->scalar_type() == q.scalar_type(), "k, v, o: got another dtype than q's, supported: the same");
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.o = o.data_ptr();
  check((lengths.scalar_type() == ScalarType::Long || lengths.scalar_type() == ScalarType::Int) && lengths.is_contiguous() &&
            lengths.numel() == p.batch,
        "lengths: supported: a contiguous int32 or int64 tensor of shape (B,)");
  check_device(lengths, q);
  p.wide_lengths = lengths.scalar_type() == ScalarType::Long;
  p.lengths = lengths.data_ptr();
  const auto float_data = [&](const Tensor& t, const char* name, int64_t elements) {
    check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == elements, name, ": supported: ", elements,
          " contiguous float32 elements");
    check_device(t, q);
    return static_cast<float*>(t.data_ptr());
  };
  const int64_t rows = p.batch * p.heads * p.n;
  p.lse = float_data(lse, "lse", rows);
  check(splits >= 1 && (splits == 1 || parts.has_value()), "splits: got ", splits, ", supported: 1, or more with parts");
  p.splits = splits;
  if (splits > 1) {
    p.parts = float_data(*parts, "parts", splits * rows * (p.d + 2));
    p.part_stats = reinterpret_cast<PartStats*>(p.parts + splits * rows * p.d);
  }
  if (bias.has_value()) {
    p.bias_dtype = dtype_of(*bias, "bias");
    check(p.bias_dtype == DType::F32 || p.bias_dtype == p.dtype, "bias: supported: float32 or q's dtype");
    p.bias_at = rows_of(*bias, "bias", q, p.heads, p.n, p.capacity);
    p.bias = bias->data_ptr();
  }
  p.causal = causal;
  p.unit = score_unit(p.bias, static_cast<float>(scale));
  const DeviceGuard guard(q);
  GENFAST_LAUNCH(attention_decode, p, q);
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("attention_decode_", TORCH_BOX(&genfast::attention_decode_));
}
