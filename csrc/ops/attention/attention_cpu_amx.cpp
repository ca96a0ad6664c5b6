// bfloat16 on processors with AMX: both products by tiles of 16 x 16 sums over 32 (Intel, Architecture Instruction Set Extensions).
#include "attention_cpu_impl.h"

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

// c (16 R, 16 C) = or += a (16 R, 32 steps) b (32 steps, 16 C). b's tiles are b_column apart from one column to the next, b_step along
// the sum.
template <int R, int C, bool kAdd>
GF_INLINE void product(const BFloat16* a, int64_t a_row, const BFloat16* b, int64_t b_column, int64_t b_step, float* c, int64_t c_row,
                       int64_t steps) {
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
    _tile_loadd(4, a + 32 * s, a_bytes);
    _tile_loadd(6, b + s * b_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, b + b_column + s * b_step, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + 16 * a_row + 32 * s, a_bytes);
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
void products(const BFloat16* a, int64_t a_row, const BFloat16* b, int64_t b_column, int64_t b_step, float* c, int64_t c_row, int64_t steps,
              int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 32) {
    const BFloat16* at = b + j / 16 * b_column;
    const bool wide = columns - j > 16;
    for (int64_t i = 0; i < rows; i += 32) {
      const bool tall = rows - i > 16;
      const auto run = [&]<int R, int C>() {
        product<R, C, kAdd>(a + i * a_row, a_row, at, b_column, b_step, c + i * c_row + j, c_row, steps);
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
  static constexpr bool kScaled = false;   // scaled queries would be rounded once more
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

  static void load_queries(BFloat16* to, const BFloat16* q, int64_t stride, int64_t rows, int64_t rows_padded, int64_t d, float) {
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

  static void score(const BFloat16* q, const BFloat16* keys, float* scores, int64_t rows, int64_t count, int64_t depth) {
    products<false>(q, depth, keys, 16 * depth, kTileElements, scores, kKeyBlock, depth / 32, rows, count);
  }

  static void add_values(const BFloat16* weights, const BFloat16* values, float* out, int64_t rows, int64_t keys, int64_t width) {
    products<true>(weights, kKeyBlock, values, kTileElements, 32 * width, out, width, round_up(keys, 32) / 32, rows, width);
  }
};

void amx_run(const AttentionParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  const Tiles tiles;
  run_typed<AmxEngine, BFloat16>(p, first_unit, last_unit, static_cast<char*>(scratch));
}

}  // namespace

const AttentionKernels kAttentionAmx{kAmxQueries, scratch_bytes_of<AmxEngine>, amx_run};

}  // namespace genfast
