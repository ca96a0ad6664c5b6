// Cuts the tensor into units, shares them among threads, and adds up the partial sums in an order that no thread count changes.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../../core/cpu_isa.h"
#include "../../core/huge_pages.h"
#include "../../core/parallel.h"
#include "bn_act_cpu.h"

namespace genfast {
namespace {

constexpr int64_t kGrainElements = 32768;  // below this many elements a thread costs more than it brings

template <class T>
void run(const BnActParams& p, int64_t element_size) {
  const BnActKernels& kernels = GENFAST_PICK_ISA(kBnActBaseline, kBnActAvx2, kBnActAvx512);
  const int64_t period = p.channels * p.inner, per_sample = p.outer * period, places = p.samples * p.channels;
  const bool is_short = p.inner < kBnShortRow;
  BnActTask t{p, p.coef, p.channels, places, nullptr, 0, 1, 1, 0, 0, 0};
  if (is_short) {
    t.repeat = p.outer == 1 ? ceil_div(period, 16) * 16 : std::lcm(period, int64_t{16});
    t.block = t.repeat * std::max<int64_t>(1, kBnBlock / t.repeat);
    t.blocks = ceil_div(per_sample, t.block);
    t.units = p.samples * t.blocks;
  } else {
    t.depth = std::clamp<int64_t>(kBnRun / p.inner, 1, kBnDepth);
    t.blocks = ceil_div(p.outer, t.depth);
    t.chunks = std::max<int64_t>(1, p.inner / kBnChunk + (p.inner % kBnChunk >= kBnShortRow));
    t.units = p.samples * t.blocks * p.channels * t.chunks;
  }

  std::vector<T> origin;
  if (p.pass == BnPass::Moments) {
    origin.resize(static_cast<size_t>(places));
    for (int64_t s = 0; s < p.samples; ++s) {
      for (int64_t c = 0; c < p.channels; ++c) origin[s * p.channels + c] = static_cast<T>(origin_of(p, s, c));
    }
    t.coef = origin.data();
  }
  std::vector<T> coef;
  if (is_short && t.repeat != p.channels) {
    const int64_t rows = used_coefficients(p.pass);
    coef.resize(static_cast<size_t>(p.samples * rows * t.repeat));
    for (int64_t s = 0; s < p.samples; ++s) {
      for (int64_t k = 0; k < rows; ++k) {
        const T* from = static_cast<const T*>(t.coef) + k * places + s * p.channels;
        T* to = coef.data() + (s * rows + k) * t.repeat;
        for (int64_t c = 0; c < p.channels; ++c) std::fill_n(to + c * p.inner, p.inner, from[c]);
        for (int64_t i = period; i < t.repeat; ++i) to[i] = to[i - period];
      }
    }
    t.coef = coef.data();
    t.coef_sample = rows * t.repeat;
    t.coef_row = t.repeat;
  }
  std::unique_ptr<T[]> partial;  // (2, samples, blocks, repeat) or (2, samples, blocks, channels, chunks)
  if (p.sums) {
    partial.reset(new T[static_cast<size_t>(2 * t.units * (is_short ? t.repeat : 1))]);
    t.partial = partial.get();
  }
  if (p.out) want_huge_pages(p.out, p.samples * per_sample * element_size);

  const int64_t grain = std::max<int64_t>(1, kGrainElements * t.units / (p.samples * per_sample));
  parallel_for(0, t.units, grain, [&](int64_t first, int64_t last) { kernels.rows(t, is_short, first, last); });
  if (!p.sums) return;

  std::fill_n(p.sums, 2 * places, 0.0);
  const T* next = partial.get();
  for (int64_t k = 0; k < 2; ++k) {
    for (int64_t s = 0; s < p.samples; ++s) {
      double* sums = p.sums + k * places + s * p.channels;
      for (int64_t block = 0; block < t.blocks; ++block) {
        if (!is_short) {
          for (int64_t c = 0; c < p.channels; ++c) {
            for (int64_t chunk = 0; chunk < t.chunks; ++chunk) sums[c] += *next++;
          }
          continue;
        }
        for (int64_t i = 0; i < t.repeat; i += period) {  // the last period may end beyond the place of the last element
          const int64_t n = std::min(period, t.repeat - i);
          if (p.inner == 1) {
            for (int64_t c = 0; c < n; ++c) sums[c] += next[c];
          } else {
            for (int64_t c = 0; c * p.inner < n; ++c) {
              for (int64_t j = c * p.inner; j < std::min(n, (c + 1) * p.inner); ++j) sums[c] += next[j];
            }
          }
          next += n;
        }
      }
    }
  }
  if (p.pass != BnPass::Moments) return;
  for (int64_t i = 0; i < places; ++i) {
    double sum[2] = {p.sums[i], p.sums[places + i]};
    moments_of(sum, origin[i], static_cast<double>(p.outer * p.inner));
    p.sums[i] = sum[0];
    p.sums[places + i] = sum[1];
  }
}

}  // namespace

void launch_bn_act_cpu(const BnActParams& p) {
  switch (p.dtype) {
    case DType::F64:
      return run<double>(p, 8);
    case DType::F32:
      return run<float>(p, 4);
    default:
      return run<float>(p, 2);
  }
}

void launch_bn_coefficients_cpu(const BnCoefficientsParams& p) {
  const int64_t members = p.channels / p.groups;
  for (int64_t s = 0; s < p.samples; ++s) {
    for (int64_t c = 0; c < p.channels; c += members) {
      const BnGroup group = bn_group_of(p, s, c / members);
      for (int64_t j = c; j < c + members; ++j) {
        p.dtype == DType::F64 ? bn_coefficients_at<double>(p, s, j, group) : bn_coefficients_at<float>(p, s, j, group);
      }
    }
  }
}

}  // namespace genfast
