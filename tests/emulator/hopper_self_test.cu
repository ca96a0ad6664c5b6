// The twins of emulator_hopper.h tested on a kernel that uses all of them, (A B^T) V by one producer and one warpgroup: against exact
// arithmetic, and with planted bugs that must be caught.
// Usage: hopper_self_test PANEL [BUG], PANEL: columns 16, 32 or 64. Exit status 0: right; 1: wrong numbers; 2: the emulator refused.
//        hopper_self_test layout: what swizzled() and matrix_descriptor() say, for test_emulator_self.py to compare with the PTX ISA.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/ptx.cuh"
#include "core/wgmma.cuh"

namespace {
using namespace genfast;

enum Bug : int {
  kNone,
  kSumsNotWaited,
  kReleasedEarly,
  kSlotNotWaited,
  kRingNotWaited,
  kStoreNotWaited,
  kStoreBeforeBarrier,
  kNotSwizzled,
  kNotInitialised,
  kNoTurn,
};
constexpr const char* kBugs[] = {
    "none",         "sums_not_waited", "released_early", "slot_not_waited", "ring_not_waited", "store_not_waited", "store_before_barrier",
    "not_swizzled", "not_initialised", "no_turn"};

// 64 rows of A; kTiles tiles of 64 rows of B and V; 80 columns, which fill panels of 16 and parts of wider ones.
constexpr int kWidth = 80, kRows = 64, kTiles = 5, kSlots = 2;

struct Maps {
  TensorMap a, b, v, c;
};

template <int kPanel>
__global__ void __launch_bounds__(256) gemm_gemm(const __grid_constant__ Maps maps, Bug bug) {
  constexpr int kRow = 2 * kPanel, kPanels = (kWidth + kPanel - 1) / kPanel, kBytes = kPanels * kRows * kRow, kPanelBytes = kRows * kRow;
  GF_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* const a = memory + (0u - shared_address(memory)) % 1024;  // later the result
  unsigned char* const ring = a + kBytes;
  auto* const full = reinterpret_cast<uint64_t*>(ring + kSlots * kBytes);
  uint64_t *const empty = full + kSlots, *const a_full = empty + kSlots;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  if (threadIdx.x == 0 && bug != kNotInitialised) {
    for (int i = 0; i < kSlots; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 4);
    }
    mbarrier_init(a_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  const auto load = [&](unsigned char* to, const TensorMap& map, int row, uint64_t* barrier) {
    mbarrier_arrive_expecting(barrier, kBytes);
    for (int p = 0; p < kPanels; ++p) tensor_load(to + p * kPanelBytes, map, p * kPanel, row, 0, 0, barrier);
  };
  if (threadIdx.x >= 128) {
    if (thread != 0) return;
    load(a, maps.a, 0, a_full);
    for (int use = 0; use < 2 * kTiles; ++use) {  // B V B V ...
      const int slot = use % kSlots;
      if (bug != kRingNotWaited) mbarrier_wait(empty + slot, use / kSlots % 2 ^ 1);
      load(ring + slot * kBytes, use % 2 ? maps.v : maps.b, use / 2 * kRows, full + slot);
    }
    return;
  }
  const auto at = [&](const unsigned char* p) { return matrix_descriptor<kRow>(shared_address(p), 8 * kRow, kPanelBytes); };
  float sums[kRows / 2], out[kWidth / 2] = {};
  mbarrier_wait(a_full, 0);
  for (int use = 0; use < 2 * kTiles; ++use) {
    const int slot = use % kSlots;
    const unsigned char* const tile = ring + slot * kBytes;
    if (bug != kSlotNotWaited) mbarrier_wait(full + slot, use / kSlots % 2);
    wgmma_fence();
    if (use % 2 == 0) {
      for (int s = 0; s < kWidth / 16; ++s) {
        const int byte = 16 * s / kPanel * kPanelBytes + 32 * s % kRow;
        wgmma<BFloat16, kRows>(sums, at(a) + byte / 16, at(tile) + byte / 16, s > 0);
      }
    } else {
      for (int i = 0; i < kRows / 16; ++i) {
        uint32_t left[4];
        for (int r = 0; r < 4; ++r) left[r] = pack_bf16x2(sums[8 * i + 2 * r], sums[8 * i + 2 * r + 1]);
        wgmma<BFloat16, kWidth>(out, left, at(tile + 16 * i * kRow), true);
      }
    }
    wgmma_commit();
    if (bug == kReleasedEarly && thread % 32 == 0) mbarrier_arrive(empty + slot);
    if (bug != kSumsNotWaited) wgmma_wait<0>();
    pinned(sums);
    pinned(out);
    if (bug != kReleasedEarly && thread % 32 == 0) mbarrier_arrive(empty + slot);
  }
  wgmma_wait<0>();
  named_barrier_wait(1, 128);
  for (int i = 0; i < kWidth / 2; i += 2) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2;
    const uint32_t byte = column / kPanel * kPanelBytes + row * kRow + column % kPanel * 2;
    *reinterpret_cast<uint32_t*>(a + (bug == kNotSwizzled ? byte : swizzled<kRow>(byte))) = pack_bf16x2(out[i], out[i + 1]);
  }
  shared_writes_fence();
  if (bug == kNoTurn && thread >= 64) return;
  if (bug != kStoreBeforeBarrier) named_barrier_wait(2, 128);
  if (thread != 0) return;
  for (int p = 0; p < kPanels; ++p) tensor_store(maps.c, a + p * kPanelBytes, p * kPanel, 0, 0, 0);
  if (bug != kStoreNotWaited) tensor_stores_wait();
}

// The largest error, in units of the last place; sums of small integers are exact.
template <int kPanel>
double check_gemm_gemm(Bug bug) {
  constexpr int kKeys = kTiles * kRows - 7, kColumns = kWidth - 8;  // the last tile and the last panel reach outside
  std::vector<BFloat16> a(kRows * kWidth), b(kKeys * kWidth), v(kKeys * kWidth), c(kRows * kWidth, BFloat16{0x7fc0});
  unsigned state = 1;
  const auto fill = [&](std::vector<BFloat16>& data, int spread) {
    for (auto& x : data)
      x = narrow_bf16(static_cast<float>(static_cast<int>((state = state * 1664525 + 1013904223) >> 16) % spread - spread / 2));
  };
  fill(a, 3);
  fill(b, 3);
  fill(v, 3);
  const auto map = [&](std::vector<BFloat16>& data, int rows) {
    return tensor_map({data.data(), {kColumns, rows, 1, 1}, {1, kWidth, kWidth, kWidth}}, kPanel, kRows);
  };
  const Maps maps{map(a, kRows), map(b, kKeys), map(v, kKeys), map(c, kRows)};
  constexpr int kBytes = (1 + kSlots) * ((kWidth + kPanel - 1) / kPanel * kPanel * kRows * 2) + 64 + 1024;
  GF_ALLOW_SHARED((gemm_gemm<kPanel>), kBytes);
  GF_LAUNCH((gemm_gemm<kPanel>), 1, 256, kBytes, nullptr, maps, bug);
  double most = 0.0;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kWidth; ++j) {
      float want = 0.0f;
      for (int k = 0; k < kKeys; ++k) {
        float score = 0.0f;
        for (int l = 0; l < kColumns; ++l) score += widen_bf16(a[i * kWidth + l]) * widen_bf16(b[k * kWidth + l]);
        want += score * widen_bf16(v[k * kWidth + j]);
      }
      const float got = widen_bf16(c[i * kWidth + j]), right = widen_bf16(narrow_bf16(want));
      const double error = j >= kColumns     ? (std::isnan(got) ? 0.0 : 1.0)
                           : got == right    ? 0.0
                           : std::isnan(got) ? INFINITY
                                             : std::fabs(got - right);
      most = error > most ? error : most;
    }
  }
  return most;
}

template <int kBytes>
void print_layout() {
  for (int row = 0; row < 16; ++row) {
    for (int unit = 0; unit < kBytes / 16; ++unit)
      std::printf("%d %d %d %u\n", kBytes, row, unit, swizzled<kBytes>(row * kBytes + unit * 16));
  }
  std::printf("descriptor %d %llx\n", kBytes, static_cast<unsigned long long>(matrix_descriptor<kBytes>(0x2c400, 8 * kBytes, 0x5800)));
}

}  // namespace

int main(int count, char** arguments) {
  const char* what = count > 1 ? arguments[1] : "";
  if (!std::strcmp(what, "layout")) {
    print_layout<32>();
    print_layout<64>();
    print_layout<128>();
    return 0;
  }
  Bug bug = kNone;
  for (int i = 0; i <= kNoTurn; ++i) {
    if (count > 2 && !std::strcmp(arguments[2], kBugs[i])) bug = static_cast<Bug>(i);
  }
  try {
    const int panel = std::atoi(what);
    const double error = panel == 64 ? check_gemm_gemm<64>(bug) : panel == 32 ? check_gemm_gemm<32>(bug) : check_gemm_gemm<16>(bug);
    std::printf("panels of %d: largest error %g\n", panel, error);
    return error == 0.0 ? 0 : 1;
  } catch (const std::exception& refusal) {
    std::fprintf(stderr, "%s\n", refusal.what());
    return 2;
  }
}
