// Reads the row, runs its reductions, and shares the row's units among threads. Everything here is compiled for the baseline, so
// the standard library's templates are too.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../../core/cpu_isa.h"
#include "../../core/huge_pages.h"
#include "../../core/parallel.h"
#include "solver_step_cpu.h"

namespace genfast {
namespace {

constexpr int64_t kGrainElements = 32768;           // below this many elements a thread costs more than it brings
constexpr int64_t kStreamBytes = int64_t{1} << 21;  // an output this large does not stay in L2 anyway
constexpr int64_t kSampleSize = 2048;               // elements that guess where the quantile lies

template <class T>
Step read_row(const SolverStepParams& p) {
  Step s{};
  s.p = &p;
  s.row = *p.counter;
  const T* coef = static_cast<const T*>(p.coef) + s.row * kRowFloats;
  const int64_t* index = p.index + s.row * kRowInts;
  s.ax = coef[kAx];
  s.am = coef[kAm];
  s.guidance = coef[kGuidance];
  s.clip = coef[kClip];
  s.next_c_in = coef[kNextCIn];
  s.rescale = p.rescale && coef[kRescale] != 0 && p.uncond;
  s.threshold = p.threshold && coef[kQuantile] != 0;
  s.draw = index[kDraw];
  s.outputs = static_cast<int>(index[kNumOut]);

  const auto copy_term = [&](int from, int to) {
    bool used = false;
    for (int k = 0; k < s.outputs; ++k) {
      s.coef[k][to] = coef[kCoef + k * kTerms + from];
      used |= s.coef[k][to] != 0;
    }
    return used;
  };
  const bool x = copy_term(kTermX, kTermX), d = copy_term(kTermD, kTermD), m = copy_term(kTermM, kTermM);
  s.noise = copy_term(kTermNoise, kTermNoise);
  for (int64_t j = 0; j < index[kNumHist]; ++j) {
    if (copy_term(kTermH + static_cast<int>(j), kTermH + s.history)) s.history_slot[s.history++] = p.slot[index[kHistSlot + j]];
  }
  for (int k = 0; k < s.outputs; ++k) s.output_slot[k] = p.slot[index[kOutSlot + k]];
  s.needs_d = d;
  s.needs_x = x || (d && s.ax != 0);
  s.needs_m = m || (d && s.am != 0);
  s.rescale = s.rescale && s.needs_m;
  s.threshold = s.threshold && s.needs_d;

  const bool per_sample = s.noise || p.watch || s.rescale || s.threshold;
  s.batch = per_sample ? p.batch : 1;
  s.per_sample = per_sample ? p.per_sample : p.batch * p.per_sample;
  s.factors = p.workspace;
  return s;
}

// Writing past the caches saves reading the lines first. It pays for an output that is large, is not among the row's inputs (those
// lines are in the caches already), and is not read again at once. An output that is not an input may be fresh memory.
void choose_streaming(Step& s, int64_t element_size) {
  const bool follows = s.p->watch || (s.p->model_input && s.next_c_in != 0);
  const int64_t bytes = s.batch * s.per_sample * element_size;
  for (int k = 0; k < s.outputs; ++k) {
    bool input = s.needs_x && s.output_slot[k] == s.p->slot[0];
    for (int j = 0; j < s.history; ++j) input |= s.output_slot[k] == s.history_slot[j];
    if (!input) want_huge_pages(s.output_slot[k], bytes);
    const bool aligned = reinterpret_cast<uintptr_t>(s.output_slot[k]) % 64 == 0 && (s.batch == 1 || s.per_sample * element_size % 64 == 0);
    s.stream[k] = s.outputs > 1 && !input && !(k == 0 && follows) && aligned && bytes >= kStreamBytes;
  }
}

// guidance rescale: r = phi * std(cond) / std(guided) + (1 - phi)
template <class T>
void rescale_factors(const Step& s, const SolverStepKernels& kernels, double* factors) {
  const int64_t chunks = chunks_per_sample(s.per_sample);
  double* sums = factors + 2 * s.batch;
  parallel_for(0, s.batch * chunks, std::max<int64_t>(1, kGrainElements * chunks / s.per_sample),
               [&](int64_t first, int64_t last) { kernels.sums(s, sums, first, last); });
  const double phi = static_cast<const T*>(s.p->coef)[s.row * kRowFloats + kRescale];
  const double n = static_cast<double>(s.per_sample);
  for (int64_t b = 0; b < s.batch; ++b) {
    double total[4] = {0.0, 0.0, 0.0, 0.0};
    for (int64_t c = 0; c < chunks; ++c) {
      for (int which = 0; which < 4; ++which) total[which] += sums[4 * (b * chunks + c) + which];
    }
    const auto deviation = [n](double sum, double squares) {
      const double variance = (squares - sum * sum / n) / (n - 1.0);
      return std::sqrt(variance < 0.0 ? 0.0 : variance);  // a NaN stays
    };
    factors[2 * b] = static_cast<T>(phi * (deviation(total[0], total[1]) / deviation(total[2], total[3])) + (1.0 - phi));
  }
}

// The quantile of docs/solver-step.md from values that hold the largest `count` of n, in any order.
template <class T>
T quantile_of(T* values, int64_t count, int64_t n, int64_t low, T weight) {
  T* at = values + (count - (n - low));
  std::nth_element(values, at, values + count);
  const T a = *at, b = low + 1 < n ? *std::min_element(at + 1, values + count) : a;
  return weight < T(0.5) ? a + weight * (b - a) : b - (b - a) * (T(1) - weight);
}

// dynamic threshold: the q-quantile of |d| without sorting. A strided sample guesses a bound that some more values than needed
// reach; those are collected and the wanted ones selected among them. A guess that was too high is repeated with no bound.
template <class T>
void thresholds(const Step& s, const SolverStepKernels& kernels, double* factors) {
  const T* coef = static_cast<const T*>(s.p->coef) + s.row * kRowFloats;
  const T most = coef[kMaxThreshold];
  const int64_t n = s.per_sample;
  const T rank = coef[kQuantile] * static_cast<T>(n - 1);
  const int64_t low = std::clamp<int64_t>(static_cast<int64_t>(std::floor(rank)), 0, n - 1);
  const T weight = rank - std::floor(rank);
  const int64_t needed = n - low;

  // Samples are shared among threads, and cut where there are fewer of them than threads.
  const int64_t threads = num_threads();
  const int64_t parts = std::clamp<int64_t>((threads + s.batch - 1) / s.batch, 1, (n + kGrainElements - 1) / kGrainElements);
  const int64_t part = (n + parts - 1) / parts, room = part + 16;
  // Left as it comes: only pages that candidates are written to are ever touched.
  const std::unique_ptr<T[]> found(new T[static_cast<size_t>(s.batch * parts * room)]);
  std::vector<int64_t> counts(static_cast<size_t>(s.batch * parts));
  std::vector<T> bounds(static_cast<size_t>(s.batch), T(-1));

  // The sample's own error is about sqrt(size * p * (1 - p)) ranks: four of those below the wanted one are almost always enough.
  const double p = static_cast<double>(needed) / static_cast<double>(n);
  const double margin = 4 * std::sqrt(kSampleSize * p * (1 - p)) + 8;
  const int64_t kept = n >= 2 * kSampleSize ? static_cast<int64_t>(kSampleSize * (1 - p) - margin) : 0;

  const auto guess = [&](int64_t b) {
    T sample[kSampleSize];
    kernels.magnitudes(s, b, n / kSampleSize, kSampleSize, sample);
    for (T& v : sample) v = v >= 0 ? v : T(0);  // NaN has no order
    std::nth_element(sample, sample + kept, sample + kSampleSize);
    bounds[b] = sample[kept];
  };
  const auto collect = [&](int64_t b, int64_t k) {
    const int64_t begin = std::min(n, k * part), end = std::min(n, begin + part);
    counts[b * parts + k] = kernels.candidates(s, b, begin, end, bounds[b], found.get() + (b * parts + k) * room);
  };
  const auto gather = [&](int64_t b) {  // the parts side by side; -1 if one met a NaN
    T* values = found.get() + b * parts * room;
    int64_t count = 0;
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t more = counts[b * parts + k];
      if (more < 0) return int64_t{-1};
      std::copy(values + k * room, values + k * room + more, values + count);
      count += more;
    }
    return count;
  };
  const auto select = [&](int64_t b) {
    int64_t count = gather(b);
    if (count >= 0 && count < needed) {
      bounds[b] = T(-1);
      for (int64_t k = 0; k < parts; ++k) collect(b, k);
      count = gather(b);
    }
    T threshold = std::numeric_limits<T>::quiet_NaN();
    if (count >= 0) threshold = quantile_of(found.get() + b * parts * room, count, n, low, weight);
    threshold = threshold < T(1) ? T(1) : threshold;
    factors[2 * b + 1] = threshold > most ? most : threshold;
  };

  const auto share = [](int64_t count, const auto& work) {
    parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) work(i);
    });
  };
  if (parts == 1) {
    share(s.batch, [&](int64_t b) {
      if (kept > 0) guess(b);
      collect(b, 0);
      select(b);
    });
  } else {
    if (kept > 0) share(s.batch, guess);
    share(s.batch * parts, [&](int64_t u) { collect(u / parts, u % parts); });
    share(s.batch, select);
  }
}

template <class T>
void run(const SolverStepParams& p) {
  const SolverStepKernels& kernels = GENFAST_PICK_ISA(kSolverStepBaseline, kSolverStepAvx2, kSolverStepAvx512);
  Step s = read_row<T>(p);
  if (s.outputs == 0) return;
  if (s.noise && !p.seeds) throw std::runtime_error("seeds: got None, supported: one seed for each sample, because this row draws noise");
  choose_streaming(s, p.state == DType::F64 ? 8 : p.state == DType::F32 ? 4 : 2);
  if (s.rescale) rescale_factors<T>(s, kernels, p.workspace);
  if (s.threshold) thresholds<T>(s, kernels, p.workspace);
  const int64_t units = s.batch * chunks_per_sample(s.per_sample);
  const int64_t grain = std::max<int64_t>(1, kGrainElements * units / (s.batch * s.per_sample));
  parallel_for(0, units, grain, [&](int64_t first, int64_t last) { kernels.rows(s, first, last); });
}

}  // namespace

void launch_solver_step_cpu(const SolverStepParams& p) {
  p.state == DType::F64 ? run<double>(p) : run<float>(p);
}

}  // namespace genfast
