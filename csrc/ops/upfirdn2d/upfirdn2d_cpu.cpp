// Lays out rows and phases, shares strips of rows among threads.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../../core/cpu_isa.h"
#include "../../core/huge_pages.h"
#include "../../core/parallel.h"
#include "upfirdn2d_cpu.h"

namespace genfast {
namespace {

constexpr int64_t kGrainElements = 16384;      // outputs below which a thread costs more than it brings
constexpr int64_t kScratchElements = 1 << 15;  // of a strip: stays in L2
constexpr int64_t kFarRows = 64;               // input rows between two output rows beyond which a strip is one row

template <class T>
void run(const Upfirdn2dParams& p, int64_t element_size) {
  const Upfirdn2dKernels& kernels = GENFAST_PICK_ISA(kUpfirdn2dBaseline, kUpfirdn2dAvx2, kUpfirdn2dAvx512);
  Upfirdn2dTask t{};
  t.p = p;
  const FirAxis &x = p.x, &y = p.y;
  const int64_t common = std::gcd(x.up, x.down);
  t.residues = x.up / common;
  t.advance = x.down / common;
  if (t.residues >= x.out) {  // each output has taps of its own, and none is `advance` elements after another
    t.residues = x.out;
    t.advance = 1;
  }

  // The element that tap `j` of residue r's first output meets, in or outside the row.
  std::vector<PhaseTap> taps;
  std::vector<int64_t> first{0};
  int64_t lowest = 0, highest = x.in - 1;
  for (int64_t r = 0; r < t.residues; ++r) {
    const int64_t base = r * x.down - x.pad;
    for (int64_t tap = ((-base) % x.up + x.up) % x.up; tap < x.taps; tap += x.up) {
      const int64_t element = (base + tap) / x.up;
      taps.push_back({element, tap});
      lowest = std::min(lowest, element);
      highest = std::max(highest, element);
    }
    first.push_back(static_cast<int64_t>(taps.size()));
  }
  t.left = (-lowest + t.advance - 1) / t.advance * t.advance;
  t.part = (t.left + highest) / t.advance + 1 + (x.out + t.residues - 1) / t.residues + kBlock;
  for (PhaseTap& tap : taps) {
    const int64_t place = t.left + tap.offset;
    tap.offset = place % t.advance * t.part + place / t.advance;
  }
  t.taps = taps.data();
  t.first = first.data();

  const int64_t depth = p.channels_last ? p.channels : 1;
  t.line = x.out * depth;
  const int64_t row = p.channels_last ? 0 : t.advance * t.part;
  const int64_t kept = p.fy ? t.line : row;  // elements kept for each input row that a strip meets
  const int64_t rows = kept ? std::max<int64_t>(1, kScratchElements / kept) * y.up / y.down : 4;
  const int64_t fewest = y.down > kFarRows ? 1 : p.fy ? 16 : 4;  // rows far apart share no input rows
  t.strip_rows = std::clamp<int64_t>(rows, fewest, std::max<int64_t>(y.out, 16));
  t.strips = (y.out + t.strip_rows - 1) / t.strip_rows;
  t.input_rows = std::min(y.in, ((t.strip_rows - 1) * y.down + y.taps) / y.up + 2);
  t.scratch = p.fy ? row + t.input_rows * t.line : t.input_rows * row;

  const int64_t planes = p.channels_last ? p.batch : p.batch * p.channels;
  const int64_t outputs = p.batch * p.channels * y.out * x.out, units = planes * t.strips;
  want_huge_pages(p.out, outputs * element_size);
  parallel_for(0, units, std::max<int64_t>(1, kGrainElements * units / outputs), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[static_cast<size_t>(t.scratch)]());
    kernels.strips(t, begin, end, scratch.get());
  });
}

}  // namespace

void launch_upfirdn2d_cpu(const Upfirdn2dParams& p) {
  switch (p.dtype) {
    case DType::F64:
      return run<double>(p, 8);
    case DType::F32:
      return run<float>(p, 4);
    default:
      return run<float>(p, 2);
  }
}

}  // namespace genfast
