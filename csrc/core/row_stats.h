// What the attention kernels say of a row of scores, and in which unit they keep scores. Torch-free.
#pragma once

namespace genfast {

// What rebuilds the weights of a row of scores: 2^(exponent (score - row_max) - log_sum). One number, the log-sum-exp, would not do: beside
// a large row_max, of a row that a mask of -1e9 hides, rounding takes the logarithm of the sum from it.
struct RowStats {
  float row_max;  // of the scores as the kernels keep them; 0 where the row sees nothing
  float log_sum;  // to base 2, of the sum of exp(score - row_max); infinite where the row sees nothing, so its weights are 0
};

// How the kernels of a launch keep scores: score = factor (q k) + bias, exp(score - row_max) is 2^(exponent (score - row_max)), and
// the log-sum-exp is logarithm row_max + log(row_sum). With nothing to add a score is the product itself and a positive scale is part of
// the exponent, where it costs nothing and no rounding. The exponent must not meet a score with a bias before the difference is taken: a
// mask close to -FLT_MAX has no room for it.
struct ScoreUnit {
  float factor, exponent, logarithm;
};

constexpr ScoreUnit score_unit(bool bias, float scale) {
  constexpr float kLog2OfE = 1.44269504088896341f;
  return bias || !(scale > 0.0f) ? ScoreUnit{scale, kLog2OfE, 1.0f} : ScoreUnit{1.0f, scale * kLog2OfE, scale};
}

}  // namespace genfast
