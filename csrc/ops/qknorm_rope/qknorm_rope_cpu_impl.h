// qknorm_rope, compiled once per instruction set. A token's heads pass through L1: read for the sums, read again for the result.
#pragma once
#include "../../core/vec_math.h"
#include "qknorm_rope_cpu.h"

namespace genfast {
namespace {

// A row in the type of the arithmetic, with room for a whole vector beyond any element.
template <class T>
using QkRow = T[kQkMaxHeadDim + kQkLane];

// Elements i ... of a row of d; lanes beyond the row hold `beyond`.
template <class T, class S>
GF_INLINE Vec<T> load_row(const S* row, int64_t i, int64_t d, T beyond = T(0)) {
  if (i + kCount<T> <= d) return load<T>(row + i);
  S part[kCount<T>]{};
  __builtin_memcpy(part, row + i, static_cast<size_t>(d - i) * sizeof(S));
  Vec<T> v = load<T>(part);
  for (int64_t k = d - i; k < kCount<T>; ++k) v[k] = beyond;
  return v;
}
template <class T, class S>
GF_INLINE void store_row(S* row, int64_t i, int64_t d, Vec<T> v) {
  if (i + kCount<T> <= d) return store(row + i, v);
  S part[kCount<T>];
  store(part, v);
  __builtin_memcpy(row + i, part, static_cast<size_t>(d - i) * sizeof(S));
}
template <class T>
GF_INLINE double lane_sum(Vec<T> v) {
  T s = 0;
  for (int k = 0; k < kCount<T>; ++k) s += v[k];
  return s;
}
template <class V, int... i>
GF_INLINE V swap_pairs(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ 1)...);
}

// The angles of one token, as the vectors of a row meet them: interleaved (c0, c0, c1, c1, ...) and (-s0, s0, -s1, s1, ...), else as given.
template <class T>
struct QkTurn {
  QkRow<T> cos, sin;
};
template <class T>
GF_INLINE void turn_of(const QkNormRopeParams& p, int64_t b, int64_t n, T sign, QkTurn<T>& turn) {
  const int64_t half = p.rotary / 2;
  const T *cos = static_cast<const T*>(p.cos) + b * p.table_b + n * p.table_n,
          *sin = static_cast<const T*>(p.sin) + b * p.table_b + n * p.table_n;
  for (int64_t i = 0; i < half; ++i) {
    const T s = sign * sin[i];
    if (p.interleaved) {
      turn.cos[2 * i] = turn.cos[2 * i + 1] = cos[i];
      turn.sin[2 * i] = -s;
      turn.sin[2 * i + 1] = s;
    } else {
      turn.cos[i] = cos[i];
      turn.sin[i] = s;
    }
  }
}

// Turns a row. Whole vectors are written in ascending order: what a vector wrote beyond its place is overwritten by the next.
template <class T>
GF_INLINE void turn_row(const QkNormRopeParams& p, const QkTurn<T>& turn, const T* y, T* out) {
  const int64_t d = p.head_dim, rotary = p.rotary, half = rotary / 2;
  if (p.interleaved) {
    for (int64_t i = 0; i < rotary; i += kCount<T>) {
      const Vec<T> v = load<T>(y + i), partner = swap_pairs(v, std::make_integer_sequence<int, kCount<T>>{});
      store(out + i, fma(v, load<T>(turn.cos + i), partner * load<T>(turn.sin + i)));
    }
  } else {
    for (int64_t i = 0; i < half; i += kCount<T>)
      store(out + i, fma(load<T>(y + i), load<T>(turn.cos + i), -(load<T>(y + half + i) * load<T>(turn.sin + i))));
    for (int64_t i = 0; i < half; i += kCount<T>)
      store(out + half + i, fma(load<T>(y + half + i), load<T>(turn.cos + i), load<T>(y + i) * load<T>(turn.sin + i)));
  }
  for (int64_t i = rotary; i < d; i += kCount<T>) store(out + i, load<T>(y + i));
}

template <class T>
struct QkMoments {
  T mean = 0, inverse = 1;
};
template <class T, class S>
GF_INLINE QkMoments<T> moments_of(const QkNormRopeParams& p, const QkSide& side, int64_t b, int64_t n, int64_t h0, int64_t h1) {
  if (p.norm == QkNorm::None) return {};
  const int64_t d = p.head_dim;
  const double count = static_cast<double>((h1 - h0) * d);
  QkMoments<T> m;
  double sum = 0;
  if (p.norm == QkNorm::Layer) {
    for (int64_t h = h0; h < h1; ++h) {
      const S* x = static_cast<const S*>(side.x) + row_at(side.x_at, b, h, n);
      Vec<T> total{};
      for (int64_t i = 0; i < d; i += kCount<T>) total += load_row<T>(x, i, d);
      sum += lane_sum<T>(total);
    }
    m.mean = static_cast<T>(sum / count);
  }
  double square = 0;
  for (int64_t h = h0; h < h1; ++h) {
    const S* x = static_cast<const S*>(side.x) + row_at(side.x_at, b, h, n);
    Vec<T> total{};
    for (int64_t i = 0; i < d; i += kCount<T>) {
      const Vec<T> v = load_row<T>(x, i, d, m.mean) - m.mean;
      total = fma(v, v, total);
    }
    square += lane_sum<T>(total);
  }
  m.inverse = static_cast<T>(1.0 / __builtin_sqrt(square / count + p.eps));
  return m;
}

template <class T>
GF_INLINE const T* weights_of(const void* weights, const QkSide& side, int64_t h, int64_t d) {
  return weights ? static_cast<const T*>(weights) + (side.weight_heads > 1 ? h * d : 0) : nullptr;
}

template <class T, class S>
void forward_of(const QkNormRopeTask& t, int64_t first, int64_t last) {
  const QkNormRopeParams& p = t.p;
  const int64_t d = p.head_dim;
  QkTurn<T> turn;
  QkRow<T> y, turned;
  for (int64_t token = first; token < last; ++token) {
    const int64_t b = token / p.tokens, n = token % p.tokens;
    if (p.rotary) turn_of<T>(p, b, n, T(1), turn);
    for (const QkSide& side : p.side) {
      const int64_t group = p.across_heads ? side.heads : 1;
      for (int64_t h0 = 0; h0 < side.heads; h0 += group) {
        const QkMoments<T> m = moments_of<T, S>(p, side, b, n, h0, h0 + group);
        for (int64_t h = h0; h < h0 + group; ++h) {
          const S* x = static_cast<const S*>(side.x) + row_at(side.x_at, b, h, n);
          S* out = static_cast<S*>(side.out) + row_at(side.out_at, b, h, n);
          const T *weight = weights_of<T>(side.weight, side, h, d), *bias = weights_of<T>(side.bias, side, h, d);
          for (int64_t i = 0; i < d; i += kCount<T>) {
            Vec<T> v = (load_row<T>(x, i, d) - m.mean) * m.inverse;
            if (weight) v *= load_row<T>(weight, i, d);
            if (bias) v += load_row<T>(bias, i, d);
            store(y + i, v);
          }
          const T* result = y;
          if (p.rotary) {
            turn_row<T>(p, turn, y, turned);
            result = turned;
          }
          for (int64_t i = 0; i < d; i += kCount<T>) store_row<T>(out, i, d, load<T>(result + i));
        }
      }
    }
  }
}

// With u = (x - mean) / deviation, y = weight u + bias, dy the gradient turned back and g = weight dy:
// dx = (g - mean(g) - u mean(g u)) / deviation, where the first mean is the layer norm's alone.
template <class T, class S>
void backward_of(const QkNormRopeTask& t, int64_t first, int64_t last) {
  const QkNormRopeParams& p = t.p;
  const int64_t d = p.head_dim, padded = qk_padded(d), tokens = p.batch * p.tokens;
  QkTurn<T> turn;
  QkRow<T> grad, turned;
  for (int64_t unit = first; unit < last; ++unit) {
    T* sums = t.partial ? static_cast<T*>(t.partial) + unit * t.values : nullptr;
    if (sums) __builtin_memset(sums, 0, static_cast<size_t>(t.values) * sizeof(T));
    const int64_t end = (unit + 1) * t.chunk < tokens ? (unit + 1) * t.chunk : tokens;
    for (int64_t token = unit * t.chunk; token < end; ++token) {
      const int64_t b = token / p.tokens, n = token % p.tokens;
      if (p.rotary) turn_of<T>(p, b, n, T(-1), turn);
      for (const QkSide& side : p.side) {
        const int64_t group = p.across_heads ? side.heads : 1;
        for (int64_t h0 = 0; h0 < side.heads; h0 += group) {
          const QkMoments<T> m = moments_of<T, S>(p, side, b, n, h0, h0 + group);
          const auto turn_back = [&](int64_t h) {
            const S* from = static_cast<const S*>(side.grad) + row_at(side.grad_at, b, h, n);
            for (int64_t i = 0; i < d; i += kCount<T>) store(grad + i, load_row<T>(from, i, d));
            if (!p.rotary) return static_cast<const T*>(grad);
            turn_row<T>(p, turn, grad, turned);
            return static_cast<const T*>(turned);
          };
          const T* dy = nullptr;
          double sum[2] = {0, 0};
          for (int64_t h = h0; h < h0 + group && p.norm != QkNorm::None; ++h) {
            dy = turn_back(h);
            const S* x = static_cast<const S*>(side.x) + row_at(side.x_at, b, h, n);
            const T* weight = weights_of<T>(side.weight, side, h, d);
            Vec<T> total[2]{};
            for (int64_t i = 0; i < d; i += kCount<T>) {
              Vec<T> g = load_row<T>(dy, i, d);
              if (weight) g *= load_row<T>(weight, i, d);
              total[0] += g;
              total[1] = fma(g, (load_row<T>(x, i, d, m.mean) - m.mean) * m.inverse, total[1]);
            }
            for (int k = 0; k < 2; ++k) sum[k] += lane_sum<T>(total[k]);
          }
          const double count = static_cast<double>(group * d);
          const T mean_g = p.norm == QkNorm::Layer ? static_cast<T>(sum[0] / count) : T(0), mean_gu = static_cast<T>(sum[1] / count);
          for (int64_t h = h0; h < h0 + group; ++h) {
            if (group > 1 || dy == nullptr) dy = turn_back(h);
            const S* x = static_cast<const S*>(side.x) + row_at(side.x_at, b, h, n);
            S* out = static_cast<S*>(side.out) + row_at(side.out_at, b, h, n);
            const T* weight = weights_of<T>(side.weight, side, h, d);
            T* weight_sums = nullptr;
            if (side.sums) weight_sums = sums + t.offset[&side - p.side] + (side.weight_heads > 1 ? h * padded : 0);
            T* bias_sums = weight_sums + side.weight_heads * padded;
            for (int64_t i = 0; i < d; i += kCount<T>) {
              const Vec<T> v = load_row<T>(dy, i, d), u = (load_row<T>(x, i, d, m.mean) - m.mean) * m.inverse;
              const Vec<T> g = weight ? v * load_row<T>(weight, i, d) : v;
              store_row<T>(out, i, d, (g - mean_g - u * mean_gu) * m.inverse);
              if (!weight_sums) continue;
              store(weight_sums + i, fma(v, u, load<T>(weight_sums + i)));
              if (side.bias) store(bias_sums + i, load<T>(bias_sums + i) + v);
            }
          }
        }
      }
    }
  }
}

template <class F>
void visit_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::F32:
      return f.template operator()<float, float>();
    case DType::F64:
      return f.template operator()<double, double>();
    case DType::BF16:
      return f.template operator()<float, BFloat16>();
    case DType::F16:
      return f.template operator()<float, Float16>();
  }
}
void forward(const QkNormRopeTask& t, int64_t first, int64_t last) {
  visit_storage(t.p.dtype, [&]<class T, class S>() { forward_of<T, S>(t, first, last); });
}
void backward(const QkNormRopeTask& t, int64_t first, int64_t last) {
  visit_storage(t.p.dtype, [&]<class T, class S>() { backward_of<T, S>(t, first, last); });
}

}  // namespace
}  // namespace genfast
