// bfloat16 on processors with AMX: products by tiles of 16 x 16 sums over 32 (Intel, Architecture Instruction Set Extensions).
#pragma once
#include "attention_cpu_common.h"

namespace genfast {
namespace {

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Eight whole tiles. In memory that is never written: gcc's intrinsic names only the first bytes that it reads.
alignas(64) constexpr TileConfig kWholeTiles{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Whole tiles while it lives; what the thread had before comes back.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    _tile_loadconfig(&kWholeTiles);
  }
  ~Tiles() { _tile_loadconfig(&before_); }

 private:
  alignas(64) TileConfig before_;
};

// Operands of the left side lie by rows; of the right side as tiles of 16 pairs of rows x 16 columns x 2, 512 elements each.
constexpr int kTileElements = 512;

// c (16 R, 16 C) = or += a (16 R, 32 steps) b (32 steps, 16 C). b's tiles are b_column apart from one column to the next; along the sum
// tiles are a_step and b_step apart.
template <int R, int C, bool kAdd>
GF_INLINE void product(const BFloat16* a, int64_t a_row, int64_t a_step, const BFloat16* b, int64_t b_column, int64_t b_step, float* c,
                       int64_t c_row, int64_t steps) {
  const auto a_bytes = static_cast<size_t>(a_row) * 2, c_bytes = static_cast<size_t>(c_row) * 4;
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (C == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (R == 2) _tile_loadd(2, c + 16 * c_row, c_bytes);
    if constexpr (R == 2 && C == 2) _tile_loadd(3, c + 16 * c_row + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (C == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && C == 2) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a + s * a_step, a_bytes);
    _tile_loadd(6, b + s * b_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, b + b_column + s * b_step, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + 16 * a_row + s * a_step, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (C == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (R == 2) _tile_stored(2, c + 16 * c_row, c_bytes);
  if constexpr (R == 2 && C == 2) _tile_stored(3, c + 16 * c_row + 16, c_bytes);
}

// The same for any number of rows and columns, multiples of 16.
template <bool kAdd>
void products(const BFloat16* a, int64_t a_row, int64_t a_step, const BFloat16* b, int64_t b_column, int64_t b_step, float* c,
              int64_t c_row, int64_t steps, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 32) {
    const BFloat16* at = b + j / 16 * b_column;
    const bool wide = columns - j > 16;
    for (int64_t i = 0; i < rows; i += 32) {
      const bool tall = rows - i > 16;
      const auto run = [&]<int R, int C>() {
        product<R, C, kAdd>(a + i * a_row, a_row, a_step, at, b_column, b_step, c + i * c_row + j, c_row, steps);
      };
      if (tall && wide) run.template operator()<2, 2>();
      if (tall && !wide) run.template operator()<2, 1>();
      if (!tall && wide) run.template operator()<1, 2>();
      if (!tall && !wide) run.template operator()<1, 1>();
    }
  }
}

struct AmxEngine {
  using Operand = BFloat16;
  static constexpr int kQueries = kAmxQueries;
  static constexpr bool kShortExp = true;  // the weights are rounded to bfloat16
  static constexpr int kRows = 16;
  static constexpr int kKeyGroup = 16;
  static int64_t depth(int64_t d) { return round_up(d, 32); }
  static int64_t width(int64_t d) { return round_up(d, 16); }
  static BFloat16* weights(float*, char*& at) { return take<BFloat16>(at, kQueries * kKeyBlock); }
  static GF_INLINE void store_weight(BFloat16* p, VFloat v) { store_raw(p, _mm512_cvtneps_pbh((__m512)v)); }
  static GF_INLINE void clear_weights(BFloat16* p, int64_t keys) {
    const int64_t written = round_up(keys, kLanes);
    if (written % 32) store_raw(p + written, VHalves{});
  }

  static void load_queries(BFloat16* to, const BFloat16* q, int64_t stride, int64_t rows, int64_t rows_padded, int64_t d) {
    const int64_t padded = depth(d);
    __builtin_memset(to, 0, static_cast<size_t>(rows_padded * padded) * sizeof(BFloat16));
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(to + r * padded, q + r * stride, static_cast<size_t>(d) * sizeof(BFloat16));
  }

  // (m / 16, depth / 32, tile): the tiles of 16 keys lie one after another.
  static void pack_keys(BFloat16* to, const BFloat16* k, int64_t stride, int64_t m, int64_t d) {
    const int64_t padded = depth(d);
    for (int64_t first = 0; first < m; first += 16) {
      for (int64_t c = 0; c < padded; c += 32) {
        VFloat v[kLanes];  // of pairs of elements
        const auto there = static_cast<__mmask32>(d - c >= 32 ? ~0u : (1u << (d - c)) - 1);
        for (int i = 0; i < 16; ++i) {
          v[i] = first + i < m ? (VFloat)_mm512_maskz_loadu_epi16(there, k + (first + i) * stride + c) : VFloat{};
        }
        BFloat16* tile = to + first * padded + c / 32 * kTileElements;
        transpose(v);
        for (int x = 0; x < 16; ++x) store_raw(tile + 32 * x, v[x]);
      }
    }
  }

  // (m / 32, width / 16, tile)
  static void pack_values(BFloat16* to, const BFloat16* v, int64_t stride, int64_t m, int64_t d) {
    const int64_t padded = width(d);
    for (int64_t i = 0; i < round_up(m, 32); i += 2) {
      for (int64_t c = 0; c < padded; c += 16) {
        const auto there = static_cast<__mmask16>(d - c >= 16 ? 0xffffu : (1u << (d - c)) - 1);
        const auto row = [&](int64_t r) {
          return r < m ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, v + r * stride + c)) : __m512i{};
        };
        store_raw(to + i / 32 * 32 * padded + c / 16 * kTileElements + i % 32 * 16, (VUInt)row(i) | (VUInt)row(i + 1) << 16);
      }
    }
  }

  static void score(const BFloat16* q, const BFloat16* keys, float* scores, int64_t stride, int64_t rows, int64_t count, int64_t depth) {
    products<false>(q, depth, 32, keys, 16 * depth, kTileElements, scores, stride, depth / 32, rows, count);
  }

  static void add_values(const BFloat16* weights, int64_t stride, const BFloat16* values, float* out, int64_t rows, int64_t keys,
                         int64_t width) {
    products<true>(weights, stride, 32, values, kTileElements, 32 * width, out, width, round_up(keys, 32) / 32, rows, width);
  }

  // ---- the backward pass

  static constexpr int kKeys = 128;  // of a block
  static constexpr int kPaddedRows = 32;
  static constexpr int kStepRows = 32;
  static constexpr int kBlockRows = 128;

  struct Weights {
    float *step_scores, *step_slopes;  // (kStepRows, kKeys)
    BFloat16 *p, *ds;                  // (kBlockRows / 32, kKeys / 16, tile)
    BFloat16* ds_rows;                 // (kBlockRows, kKeys)
    explicit Weights(char*& at)
        : step_scores(take<float>(at, kStepRows * kKeys)),
          step_slopes(take<float>(at, kStepRows * kKeys)),
          p(take<BFloat16>(at, kBlockRows * kKeys)),
          ds(take<BFloat16>(at, kBlockRows * kKeys)),
          ds_rows(take<BFloat16>(at, kBlockRows * kKeys)) {}
    float* scores(int64_t row) const { return step_scores + row % kStepRows * kKeys; }
    float* slopes(int64_t row) const { return step_slopes + row % kStepRows * kKeys; }
    GF_INLINE void store_pair(int64_t row, int64_t key, VFloat p0, VFloat p1, VFloat ds0, VFloat ds1) const {
      const int64_t at = row / 32 * 32 * kKeys + key / 16 * kTileElements + row % 32 * 16;
      const __m512i rows = rounded(ds0, ds1);
      store_raw(p + at, interleaved(rounded(p0, p1)));
      store_raw(ds + at, interleaved(rows));
      store_raw(ds_rows + row * kKeys + key, _mm512_castsi512_si256(rows));
      store_raw(ds_rows + (row + 1) * kKeys + key, _mm512_extracti64x4_epi64(rows, 1));
    }
    void clear_pair(int64_t row, int64_t keys) const {
      clear_weights(ds_rows + row * kKeys, keys);
      clear_weights(ds_rows + (row + 1) * kKeys, keys);
    }
  };

  // a, then b, in bfloat16.
  static GF_INLINE __m512i rounded(VFloat a, VFloat b) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
  // Element by element of the two.
  static GF_INLINE __m512i interleaved(__m512i both) {
    VUInt order;
    for (int i = 0; i < 16; ++i) order[i] = static_cast<uint32_t>(i) | static_cast<uint32_t>(i + 16) << 16;
    return _mm512_permutexvar_epi16((__m512i)order, both);
  }

  // (rows / 32, height, 32)
  static int64_t height(int64_t d) { return width(d); }
  static BFloat16* columns(BFloat16*, char*& at, int64_t elements) { return take<BFloat16>(at, elements); }
  static void load_columns(BFloat16* to, const BFloat16* q, int64_t stride, int64_t rows, int64_t rows_padded, int64_t d) {
    VUInt lower;  // the lower halves of 32 words; the upper ones are a bit higher
    for (int i = 0; i < 16; ++i) lower[i] = static_cast<uint32_t>(4 * i) | static_cast<uint32_t>(4 * i + 2) << 16;
    const VUInt upper = lower + 0x10001u;
    const int64_t high = height(d);
    for (int64_t first = 0; first < rows_padded; first += 32) {
      for (int64_t c = 0; c < high; c += 32) {
        const auto there = static_cast<__mmask32>(d - c >= 32 ? ~0u : (1u << (d - c)) - 1);
        VFloat v[2][kLanes];  // of pairs of elements, of 16 rows
        for (int half = 0; half < 2; ++half) {
          for (int i = 0; i < 16; ++i) {
            const int64_t r = first + half * 16 + i;
            v[half][i] = r < rows ? (VFloat)_mm512_maskz_loadu_epi16(there, q + r * stride + c) : VFloat{};
          }
          transpose(v[half]);
        }
        BFloat16* at = to + (first * high) + c * 32;
        for (int x = 0; x < (high - c < 32 ? 8 : 16); ++x) {
          store_raw(at + 64 * x, _mm512_permutex2var_epi16((__m512i)v[0][x], (__m512i)lower, (__m512i)v[1][x]));
          store_raw(at + 64 * x + 32, _mm512_permutex2var_epi16((__m512i)v[0][x], (__m512i)upper, (__m512i)v[1][x]));
        }
      }
    }
  }

  static void add_across(const BFloat16* columns, const BFloat16* weights, float* out, int64_t rows, int64_t keys, int64_t height) {
    products<true>(columns, 32, 32 * height, weights, kTileElements, 32 * kKeys, out, kKeys, rows / 32, height, round_up(keys, 16));
  }
};

}  // namespace
}  // namespace genfast
