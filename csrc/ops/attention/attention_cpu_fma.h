// Products by fused multiply-adds: everything is widened to float32 when it is packed.
#pragma once
#include "attention_cpu_common.h"

namespace genfast {
namespace {

struct FmaEngine {
  using Operand = float;
  static constexpr int kQueries = kFmaQueries;
  static constexpr bool kShortExp = false;
  static constexpr int kRows = 2;  // rows are padded to a multiple of it
  static constexpr int kKeyGroup = kLanes;
  // A tile of 6 x kColumns vectors of sums leaves registers for its operands.
#if defined(__AVX512F__)
  static constexpr int kColumns = 4;
#else
  static constexpr int kColumns = 2;
#endif
  static constexpr int64_t kLongestSum = 96;
  static int64_t depth(int64_t d) { return round_up(d, kRows); }
  static int64_t width(int64_t d) { return round_up(d, kLanes); }
  static float* weights(float* scores, char*&) { return scores; }
  static GF_INLINE void store_weight(float* p, VFloat v) { store(p, v); }
  static void clear_weights(float*, int64_t) {}  // add_values reads no further than the keys

  // f.operator()<N>(first): `vectors` columns by panels of N, as even as they can be.
  template <class F>
  static GF_INLINE void panels(int64_t vectors, F f) {
    int64_t first = 0;
    for (int64_t left = (vectors + kColumns - 1) / kColumns; left > 0; --left) {
      const int64_t now = (vectors - first + left - 1) / left;
      if (now == 1) f.template operator()<1>(first);
      if (now == 2) f.template operator()<2>(first);
      if constexpr (kColumns > 2) {
        if (now == 3) f.template operator()<3>(first);
        if (now == 4) f.template operator()<4>(first);
      }
      first += now;
    }
  }

  template <class T>
  static void load_queries(float* to, const T* q, int64_t stride, int64_t rows, int64_t rows_padded, int64_t d) {
    const int64_t padded = depth(d);
    for (int64_t r = 0; r < rows_padded; ++r) {
      for (int64_t c = 0; c < padded; c += kLanes) {
        store_first(to + r * padded + c, r < rows ? load_first(q + r * stride + c, d - c) : VFloat{}, padded - c);
      }
    }
  }

  // (m / kKeyBlock, panel, depth, keys of the panel), the keys of a block padded to whole vectors.
  template <class T>
  static void pack_keys(float* to, const T* k, int64_t stride, int64_t m, int64_t d) {
    const int64_t padded = depth(d);
    for (int64_t block = 0; block < m; block += kKeyBlock) {
      const int64_t keys = m - block < kKeyBlock ? m - block : kKeyBlock;
      panels((keys + kLanes - 1) / kLanes, [&]<int N>(int64_t first) {
        float* panel = to + (block + first * kLanes) * padded;
        for (int64_t c = 0; c < padded; c += kLanes) {
          const int64_t columns = padded - c < kLanes ? padded - c : kLanes;
          for (int n = 0; n < N; ++n) {
            const int64_t key = block + (first + n) * kLanes;
            VFloat v[kLanes];
            for (int i = 0; i < kLanes; ++i) v[i] = key + i < m ? load_first(k + (key + i) * stride + c, d - c) : VFloat{};
            transpose(v);
            for (int64_t x = 0; x < columns; ++x) store(panel + ((c + x) * N + n) * kLanes, v[x]);
          }
        }
      });
    }
  }

  // (m / kKeyBlock, panel, keys of the block, columns of the panel): whole cache lines one after another, whatever the width.
  template <class T>
  static void pack_values(float* to, const T* v, int64_t stride, int64_t m, int64_t d) {
    const int64_t w = width(d);
    for (int64_t block = 0; block < m; block += kKeyBlock) {
      const int64_t keys = m - block < kKeyBlock ? m - block : kKeyBlock;
      panels(w / kLanes, [&]<int N>(int64_t first) {
        float* panel = to + block * w + first * kLanes * keys;
        for (int64_t i = 0; i < keys; ++i) {
          const T* row = v + (block + i) * stride + first * kLanes;
          unroll<N>([&]<int n>() { store(panel + (i * N + n) * kLanes, load_first(row + n * kLanes, d - (first + n) * kLanes)); });
        }
      });
    }
  }

  // c (R, N vectors) = or += a (R, depth) b (depth, N vectors), whose element (r, k) is a[r a_row + k a_step].
  template <int R, int N, bool kAdd>
  static GF_INLINE void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c, int64_t c_row,
                             int64_t depth) {
    VFloat sum[R][N];
    unroll<R>([&]<int r>() { unroll<N>([&]<int n>() { sum[r][n] = VFloat{}; }); });
    for (int64_t k = 0; k < depth; ++k) {
      VFloat column[N];
      unroll<N>([&]<int n>() { column[n] = load<float>(b + k * b_row + n * kLanes); });
      unroll<R>([&]<int r>() {
        const VFloat x = splat(a[r * a_row + k * a_step]);
        unroll<N>([&]<int n>() { sum[r][n] = fma_lanes(x, column[n], sum[r][n]); });
      });
    }
    unroll<R>([&]<int r>() {
      unroll<N>([&]<int n>() {
        float* to = c + r * c_row + n * kLanes;
        store(to, kAdd ? load<float>(to) + sum[r][n] : sum[r][n]);
      });
    });
  }

  // The same for an even number of rows; kAcross: a's rows lie side by side (a_row is 1), its sums a_stride apart, instead of the converse.
  template <int N, bool kAdd, bool kAcross>
  static void tiles(const float* a, int64_t a_stride, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t depth) {
    const auto run = [&]<int R>(int64_t r) __attribute__((always_inline)) {
      if constexpr (kAcross) tile<R, N, kAdd>(a + r, 1, a_stride, b, b_row, c + r * c_row, c_row, depth);
      if constexpr (!kAcross) tile<R, N, kAdd>(a + r * a_stride, a_stride, 1, b, b_row, c + r * c_row, c_row, depth);
    };
    int64_t r = 0;
    for (; rows - r >= 6 && rows - r != 8; r += 6) run.template operator()<6>(r);
    for (; rows - r >= 4; r += 4) run.template operator()<4>(r);
    if (rows - r) run.template operator()<2>(r);
  }

  // Rows of scores are `stride` apart. Sums of many products are made of shorter ones, which keeps their rounding down.
  static void score(const float* q, const float* keys, float* scores, int64_t stride, int64_t rows, int64_t count, int64_t depth) {
    const int64_t parts = (depth + kLongestSum - 1) / kLongestSum, part = (depth + parts - 1) / parts;
    panels(count / kLanes, [&]<int N>(int64_t first) {
      const float* panel = keys + first * kLanes * depth;
      tiles<N, false, false>(q, depth, panel, N * kLanes, scores + first * kLanes, stride, rows, part);
      for (int64_t c = part; c < depth; c += part) {
        const int64_t now = depth - c < part ? depth - c : part;
        tiles<N, true, false>(q + c, depth, panel + c * N * kLanes, N * kLanes, scores + first * kLanes, stride, rows, now);
      }
    });
  }

  static void add_values(const float* weights, int64_t stride, const float* values, float* out, int64_t rows, int64_t keys, int64_t width) {
    panels(width / kLanes, [&]<int N>(int64_t first) {
      tiles<N, true, false>(weights, stride, values + first * kLanes * keys, N * kLanes, out + first * kLanes, width, rows, keys);
    });
  }

  // ---- the backward pass

  static constexpr int kKeys = 64;  // of a block: its weights then fill the first-level cache evenly
  static constexpr int kPaddedRows = 2;
  static constexpr int kStepRows = 24;   // rows whose scores are made together, so that they stay in the first-level cache
  static constexpr int kBlockRows = 96;  // rows that are summed over at a time

  // Weights p and their gradients ds, in the memory of the scores and of what the values make of the gradient of the output.
  struct Weights {
    float *p, *ds;  // (kBlockRows, kKeys)
    float* ds_rows;
    explicit Weights(char*& at) : p(take<float>(at, kBlockRows * kKeys)), ds(take<float>(at, kBlockRows * kKeys)), ds_rows(ds) {}
    float* scores(int64_t row) const { return p + row * kKeys; }
    float* slopes(int64_t row) const { return ds + row * kKeys; }
    GF_INLINE void store_pair(int64_t row, int64_t key, VFloat p0, VFloat p1, VFloat ds0, VFloat ds1) const {
      store(scores(row) + key, p0);
      store(scores(row + 1) + key, p1);
      store(slopes(row) + key, ds0);
      store(slopes(row + 1) + key, ds1);
    }
    void clear_pair(int64_t, int64_t) const {}
  };

  // What add_across reads of queries: their rows.
  static int64_t height(int64_t d) { return depth(d); }
  static float* columns(float* rows, char*&, int64_t) { return rows; }
  template <class T>
  static void load_columns(float*, const T*, int64_t, int64_t, int64_t, int64_t) {}

  // out (height, kKeys) += columns^T weights
  static void add_across(const float* columns, const float* weights, float* out, int64_t rows, int64_t keys, int64_t height) {
    panels((keys + kLanes - 1) / kLanes, [&]<int N>(int64_t first) {
      tiles<N, true, true>(columns, height, weights + first * kLanes, kKeys, out + first * kLanes, kKeys, height, rows);
    });
  }
};

}  // namespace
}  // namespace genfast
