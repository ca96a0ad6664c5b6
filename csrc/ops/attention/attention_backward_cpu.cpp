// The backward pass on a CPU, one head of keys at a time (Dao et al. 2022, appendix B.2).
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../core/exact_math.h"
#include "params.h"

namespace genfast {
namespace {

float wide(float x) {
  return x;
}
float wide(BFloat16 x) {
  return widen_bf16(x);
}
float wide(Float16 x) {
  return widen_f16(x);
}
void round_to(float* to, float x) {
  *to = x;
}
void round_to(BFloat16* to, float x) {
  *to = narrow_bf16(x);
}
void round_to(Float16* to, float x) {
  *to = narrow_f16(x);
}

template <class T>
void run(const AttentionBackwardParams& p, int64_t batch, int64_t kv_head) {
  const AttentionParams& f = p.forward;
  const auto row = [&](const void* t, const AttentionRows& at, int64_t head, int64_t i) {
    return static_cast<const T*>(t) + batch * at.batch + head * at.head + i * at.row;
  };
  const int64_t group = f.heads / f.kv_heads, d = f.d;
  std::vector<float> dk(f.m * d), dv(f.m * d), dq(d);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t i = 0; i < f.n; ++i) {
      const int64_t at = (batch * f.heads + head) * f.n + i;
      const T *q = row(f.q, f.q_at, head, i), *o = row(f.o, f.o_at, head, i), *grad_o = row(p.grad_o, p.grad_o_at, head, i);
      float delta = p.grad_lse ? -p.grad_lse[at] : 0.0f;
      for (int64_t c = 0; c < d; ++c) delta += wide(grad_o[c]) * wide(o[c]);
      p.delta[at] = delta;
      const float lse = std::isinf(f.lse[at]) ? 0.0f : f.lse[at];
      std::fill(dq.begin(), dq.end(), 0.0f);
      for (int64_t j = 0; j < (f.causal ? std::min(f.m, i + f.m - f.n + 1) : f.m); ++j) {
        if (f.mask && !f.mask[batch * f.mask_at.batch + head * f.mask_at.head + i * f.mask_at.row + j]) continue;
        const T *k = row(f.k, f.k_at, kv_head, j), *v = row(f.v, f.v_at, kv_head, j);
        float score = 0, dp = 0;
        for (int64_t c = 0; c < d; ++c) {
          score += wide(q[c]) * wide(k[c]);
          dp += wide(grad_o[c]) * wide(v[c]);
        }
        score *= f.scale;
        if (f.bias) {
          const int64_t where = batch * f.bias_at.batch + head * f.bias_at.head + i * f.bias_at.row + j;
          score += f.bias_dtype == DType::F32 ? static_cast<const float*>(f.bias)[where] : wide(static_cast<const T*>(f.bias)[where]);
        }
        const float weight = std::exp(score - lse), ds = weight * (dp - delta);
        for (int64_t c = 0; c < d; ++c) {
          dq[c] += ds * wide(k[c]);
          dk[j * d + c] += ds * wide(q[c]);
          dv[j * d + c] += weight * wide(grad_o[c]);
        }
        if (p.dbias) p.dbias[batch * p.dbias_at.batch + head * p.dbias_at.head + i * p.dbias_at.row + j * p.dbias_column] += ds;
      }
      for (int64_t c = 0; c < d; ++c) round_to(const_cast<T*>(row(p.dq, p.dq_at, head, i)) + c, dq[c] * f.scale);
    }
  }
  for (int64_t j = 0; j < f.m; ++j) {
    for (int64_t c = 0; c < d; ++c) {
      round_to(const_cast<T*>(row(p.dk, p.dk_at, kv_head, j)) + c, dk[j * d + c] * f.scale);
      round_to(const_cast<T*>(row(p.dv, p.dv_at, kv_head, j)) + c, dv[j * d + c]);
    }
  }
}

}  // namespace

void launch_attention_backward_cpu(const AttentionBackwardParams& p) {
  const AttentionParams& f = p.forward;
  if (p.dbias) {
    const int64_t size =
        (p.dbias_at.batch ? f.batch : 1) * (p.dbias_at.head ? f.heads : 1) * (p.dbias_at.row ? f.n : 1) * (p.dbias_column ? f.m : 1);
    std::fill(p.dbias, p.dbias + size, 0.0f);
  }
  for (int64_t batch = 0; batch < f.batch; ++batch) {
    for (int64_t kv_head = 0; kv_head < f.kv_heads; ++kv_head) {
      f.dtype == DType::F32    ? run<float>(p, batch, kv_head)
      : f.dtype == DType::BF16 ? run<BFloat16>(p, batch, kv_head)
                               : run<Float16>(p, batch, kv_head);
    }
  }
}

}  // namespace genfast
