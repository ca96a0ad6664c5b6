// The backward pass on Hopper (sm_90a), without bias or mask: blocks own rows and walk over the other side as in attention_backward.cuh,
// with products by wgmma and rows fetched by bulk tensor copies. Nothing is added in memory: same bits every run. docs/attention-hopper.md.
#pragma once
#include "attention_backward_tile.cuh"
#include "attention_hopper_tile.cuh"

namespace genfast {
namespace {

// Widths of head the kernels are compiled for; a narrower head, a multiple of 8, reads zeros beyond its columns.
constexpr int kHopperBackwardWidths[] = {64, 128};

// Two warpgroups hold 64 rows of the block each; one fetches.
constexpr int kGradientGroups = 2, kGradientRows = 64 * kGradientGroups, kGradientThreads = 128 * (kGradientGroups + 1);
constexpr int kGradientRegisters = 240;  // of a thread that computes
// Shared memory holds panels of 64 columns, rows of 128 bytes.
constexpr int kGradientPanel = 64, kGradientRow = 2 * kGradientPanel;

// Rows walked over at a time, and how many such tiles of both tensors the ring holds.
struct HopperBackwardTile {
  int walked, slots;
};

// The tile table. A thread holds width / 2 numbers for each gradient, walked / 2 scores, as many slopes, and both rounded, walked / 4 each.
constexpr HopperBackwardTile hopper_backward_tile(Pass pass, int width) {
  if (pass == Pass::kQueries) return width > 64 ? HopperBackwardTile{96, 3} : HopperBackwardTile{128, 4};
  return width > 64 ? HopperBackwardTile{64, 4} : HopperBackwardTile{96, 4};
}

// Own rows, ring, three numbers of each walked query, barriers, and what it takes to begin at a multiple of 1024.
constexpr int hopper_backward_shared_bytes(Pass pass, int width) {
  const HopperBackwardTile tile = hopper_backward_tile(pass, width);
  const int numbers = owns_keys(pass) ? tile.slots * tile.walked * 12 : 0;
  return 2 * kGradientRows * width * 2 + tile.slots * 2 * tile.walked * width * 2 + numbers + (2 * tile.slots + 1) * 8 + 1024;
}

// 1: q and k, which make the scores; 2: grad_o and v, which make the gradients of the weights. gradient: dq or dk.
struct HopperBackwardMaps {
  TensorMap own1, own2, walked1, walked2, gradient, of_values;
};

template <class S, int kWidth, Pass kPass>
__global__ void __launch_bounds__(kGradientThreads, 1)
    hopper_backward_kernel(const __grid_constant__ AttentionBackwardParams p, const __grid_constant__ HopperBackwardMaps maps) {
  constexpr HopperBackwardTile kTile = hopper_backward_tile(kPass, kWidth);
  constexpr bool kOwnsKeys = owns_keys(kPass), kValues = makes_values(kPass);
  constexpr int kWalked = kTile.walked, kPanel = kGradientPanel, kRow = kGradientRow, kPanels = kWidth / kPanel;
  constexpr int kOwnPanel = kGradientRows * kRow, kWalkedPanel = kWalked * kRow;  // bytes of one panel
  constexpr int kOwnBytes = kPanels * kOwnPanel, kWalkedBytes = kPanels * kWalkedPanel;
  static_assert(kWalked % 32 == 0 && (!kOwnsKeys || kWalked <= 96) && kWidth % kPanel == 0);
  using Place = RingPlace<kTile.slots>;

  GF_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* const own1 = memory + (0u - shared_address(memory)) % 1024;               // later the gradient
  unsigned char* const own2 = own1 + kOwnBytes;                                            // later that of the values
  unsigned char* const ring = own2 + kOwnBytes;                                            // a slot: walked1, walked2
  float* const numbers = reinterpret_cast<float*>(ring + kTile.slots * 2 * kWalkedBytes);  // of a slot's queries: row_max, log_sum, delta
  uint64_t* const full = reinterpret_cast<uint64_t*>(numbers + (kOwnsKeys ? kTile.slots * 3 * kWalked : 0));  // a slot has landed
  uint64_t* const empty = full + kTile.slots;                                                                 // each warp has used it
  uint64_t* const own_full = empty + kTile.slots;

  const AttentionParams& f = p.forward;
  const GradientBlock at = gradient_block<kPass>(f, kGradientRows, kWalked, static_cast<int>(blockIdx.x));
  const int role = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);  // the same in all lanes, and the compiler knows
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTile.slots; ++i) {
      mbarrier_init(full + i, 1 + (kOwnsKeys ? kWalked / 32 : 0));  // the thread that copies, the warps that write numbers
      mbarrier_init(empty + i, 4 * kGradientGroups);
    }
    mbarrier_init(own_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  if (role == 0) {
    registers_down_to<kProducerRegisters>();
    if (threadIdx.x == 0) {
      // ---- rows of both sides ----
      mbarrier_arrive_expecting(own_full, 2 * kOwnBytes);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        tensor_load(own1 + panel * kOwnPanel, maps.own1, panel * kPanel, at.first, at.head, at.batch, own_full);
        tensor_load(own2 + panel * kOwnPanel, maps.own2, panel * kPanel, at.first, at.head, at.batch, own_full);
      }
      Place place;
#pragma unroll 1
      for (int head = at.walked_head; head < at.walked_head + at.walked_heads; ++head) {
#pragma unroll 1
        for (int tile = 0; tile < at.tiles; ++tile, place = place.next()) {
          unsigned char* const slot = ring + place.slot * 2 * kWalkedBytes;
          mbarrier_wait(empty + place.slot, place.parity ^ 1);
          mbarrier_arrive_expecting(full + place.slot, 2 * kWalkedBytes);
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            const int row = at.begin + tile * kWalked;
            tensor_load(slot + panel * kWalkedPanel, maps.walked1, panel * kPanel, row, head, at.batch, full + place.slot);
            tensor_load(slot + kWalkedBytes + panel * kWalkedPanel, maps.walked2, panel * kPanel, row, head, at.batch, full + place.slot);
          }
        }
      }
    } else if (kOwnsKeys && threadIdx.x >= 32 && threadIdx.x < 32 + kWalked) {
      // ---- numbers of the walked queries, one a thread, fetched before their slot is free ----
      const int mine = static_cast<int>(threadIdx.x) - 32;
      Place place;
#pragma unroll 1
      for (int head = at.walked_head; head < at.walked_head + at.walked_heads; ++head) {
#pragma unroll 1
        for (int tile = 0; tile < at.tiles; ++tile, place = place.next()) {
          const QueryNumbers query = query_numbers(p, at.batch, head, at.begin + tile * kWalked + mine);
          float* const to = numbers + place.slot * 3 * kWalked + mine;
          mbarrier_wait(empty + place.slot, place.parity ^ 1);
          to[0] = query.row_max;
          to[kWalked] = query.log_sum;
          to[2 * kWalked] = query.delta;
          __syncwarp();
          if (mine % 32 == 0) mbarrier_arrive(full + place.slot);
        }
      }
    }
  } else {
    // ---- a group that computes: rows [64 group, 64 group + 64) of the block ----
    registers_up_to<kGradientRegisters>();
    const int group = role - 1, thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, t = lane % 4;
    const int row = 64 * group + thread / 32 * 16 + lane / 4;  // and row + 8
    const float exponent = f.unit.exponent;                    // products are scores: no bias and a positive scale, hopper_backward_can()
    const uint64_t from_own1 = matrix_descriptor<kRow>(shared_address(own1) + group * 64 * kRow, 8 * kRow, 0);
    const uint64_t from_own2 = matrix_descriptor<kRow>(shared_address(own2) + group * 64 * kRow, 8 * kRow, 0);
    const uint64_t along_walked = matrix_descriptor<kRow>(shared_address(ring), 8 * kRow, 0);
    const uint64_t across_walked = matrix_descriptor<kRow>(shared_address(ring), 8 * kRow, kWalkedPanel);

    [[maybe_unused]] QueryNumbers mine[2];
    if constexpr (!kOwnsKeys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) mine[half] = query_numbers(p, at.batch, at.head, at.first + row + 8 * half);
    }
    float score[kWalked / 2], slope[kWalked / 2], gradient[kWidth / 2];
    uint32_t slopes[kWalked / 4];
    [[maybe_unused]] float of_values[kValues ? kWidth / 2 : 1];
    [[maybe_unused]] uint32_t weights[kValues ? kWalked / 4 : 1];
#pragma unroll
    for (float& x : gradient) x = 0.0f;
#pragma unroll
    for (float& x : of_values) x = 0.0f;

    // Descriptors count in units of 16 bytes. sums = own rows times walked rows, over the head.
    const auto multiply = [&](float (&sums)[kWalked / 2], uint64_t own, uint64_t walked) {
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < kWidth / 16; ++s) {
        const int panel = 16 * s / kPanel, byte = 32 * s % kRow;
        wgmma<S, kWalked>(sums, own + (panel * kOwnPanel + byte) / 16, walked + (panel * kWalkedPanel + byte) / 16, s > 0);
      }
      wgmma_commit();
    };
    // sums += factors times walked rows, over those rows.
    const auto accumulate = [&](float (&sums)[kWidth / 2], uint32_t (&factors)[kWalked / 4], uint64_t walked) {
      pinned(sums);
      pinned(factors);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kWalked / 16; ++i) {
        const uint32_t a[4] = {factors[4 * i], factors[4 * i + 1], factors[4 * i + 2], factors[4 * i + 3]};
        wgmma<S, kWidth>(sums, a, walked + i * 16 * kRow / 16, true);
      }
      wgmma_commit();
    };

    mbarrier_wait(own_full, 0);
    Place place;
    const int steps = at.tiles * at.walked_heads;
#pragma unroll 1
    for (int step = 0, tile = 0, last = 0; step < steps; ++step) {
      const int first = at.begin + tile * kWalked;
      tile = tile + 1 < at.tiles ? tile + 1 : 0;
      const uint64_t slot = static_cast<uint64_t>(place.slot * 2 * kWalkedBytes / 16);
      mbarrier_wait(full + place.slot, place.parity);
      multiply(score, from_own1, along_walked + slot);
      multiply(slope, from_own2, along_walked + slot + kWalkedBytes / 16);
      wgmma_wait<2>();  // the last step's products
      __syncwarp();     // and its numbers are read
      if (step > 0 && lane == 0) mbarrier_arrive(empty + last);
      last = place.slot;

      wgmma_wait<1>();
      pinned(score);
      // Pairs of this thread's columns: 8 j + 2 t and the next.
      const float* const of_queries = numbers + place.slot * 3 * kWalked + 2 * t;
      if constexpr (kOwnsKeys) {
        const int sees = at.first + static_cast<int>(f.n - f.m) - first;  // the first of these queries that sees the block's first key
        if (f.causal && sees + 64 * group + 63 > 0) {
#pragma unroll
          for (int i = 0; i < kWalked / 2; ++i) {
            if (8 * (i / 4) + 2 * t + i % 2 < sees + row + i / 2 % 2 * 8) score[i] = kMinusInfinity;
          }
        }
      } else {
        const int left = static_cast<int>(f.m) - first, seen = f.causal ? left - static_cast<int>(f.n) + at.first + 1 : left;
        if (left < kWalked || (f.causal && seen + 64 * group < kWalked)) {
#pragma unroll
          for (int i = 0; i < kWalked / 2; ++i) {
            if (8 * (i / 4) + 2 * t + i % 2 >= (f.causal ? seen + row + i / 2 % 2 * 8 : left)) score[i] = kMinusInfinity;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kWalked / 8; ++j) {
        Vec<float, 2> row_max, log_sum;
        if constexpr (kOwnsKeys) {
          row_max = *reinterpret_cast<const Vec<float, 2>*>(of_queries + 8 * j);
          log_sum = *reinterpret_cast<const Vec<float, 2>*>(of_queries + kWalked + 8 * j);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = score[4 * j + i];
          x = kOwnsKeys ? weight_of(x, element(row_max, i % 2), element(log_sum, i % 2), exponent)
                        : weight_of(x, mine[i / 2].row_max, mine[i / 2].log_sum, exponent);
        }
      }
      if constexpr (kValues) {
#pragma unroll
        for (int i = 0; i < kWalked / 4; ++i) weights[i] = pack16<S>(score[2 * i], score[2 * i + 1]);
        accumulate(of_values, weights, across_walked + slot + kWalkedBytes / 16);
      } else {
        finished(score, full);
      }
      wgmma_wait<kValues ? 1 : 0>();
      pinned(slope);
#pragma unroll
      for (int j = 0; j < kWalked / 8; ++j) {
        Vec<float, 2> delta;
        if constexpr (kOwnsKeys) delta = *reinterpret_cast<const Vec<float, 2>*>(of_queries + 2 * kWalked + 8 * j);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[4 * j + i] *= slope[4 * j + i] - (kOwnsKeys ? element(delta, i % 2) : mine[i / 2].delta);
        }
#pragma unroll
        for (int i = 2 * j; i < 2 * j + 2; ++i) slopes[i] = pack16<S>(score[2 * i], score[2 * i + 1]);
      }
      accumulate(gradient, slopes, across_walked + slot);
      if constexpr (kValues) wgmma_wait<1>();  // frees the registers of the weights for the next scores
      place = place.next();
    }
    wgmma_wait<0>();
    pinned(gradient);
    pinned(of_values);

    // ---- gradients, through this group's part of the own rows' memory ----
    constexpr int kGroupBarrier = 1;
    named_barrier_wait(kGroupBarrier + group, 128);  // no warp of the group reads its rows any more
    put_rows<S, kWidth, kPanel>(own1, kOwnPanel, row, t, gradient, {f.scale, f.scale});
    if constexpr (kValues) put_rows<S, kWidth, kPanel>(own2, kOwnPanel, row, t, of_values, {1.0f, 1.0f});
    shared_writes_fence();
    named_barrier_wait(kGroupBarrier + group, 128);
    if (thread == 0 && 64 * group < at.rows) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int from = panel * kOwnPanel + group * 64 * kRow;
        tensor_store(maps.gradient, own1 + from, panel * kPanel, at.first + 64 * group, at.head, at.batch);
        if constexpr (kValues) tensor_store(maps.of_values, own2 + from, panel * kPanel, at.first + 64 * group, at.head, at.batch);
      }
      tensor_stores_wait();
    }
  }
}

template <class S, int kWidth, Pass kPass>
void launch_hopper_backward_pass(const AttentionBackwardParams& p, void* stream) {
  constexpr bool kOwnsKeys = owns_keys(kPass);
  constexpr int kBytes = hopper_backward_shared_bytes(kPass, kWidth), kWalked = hopper_backward_tile(kPass, kWidth).walked;
  static_assert(kBytes <= 227 * 1024);
  const AttentionParams& f = p.forward;
  const auto of_queries = [&](const void* data, const AttentionRows& at, int rows) {
    return hopper_map(data, at, f.d, f.n, f.heads, f.batch, kGradientPanel, rows);
  };
  const auto of_keys = [&](const void* data, const AttentionRows& at, int rows) {
    return hopper_map(data, at, f.d, f.m, f.kv_heads, f.batch, kGradientPanel, rows);
  };
  constexpr int kQueryRows = kOwnsKeys ? kWalked : kGradientRows, kKeyRows = kOwnsKeys ? kGradientRows : kWalked;
  const TensorMap q = of_queries(f.q, f.q_at, kQueryRows), grad_o = of_queries(p.grad_o, p.grad_o_at, kQueryRows);
  const TensorMap k = of_keys(f.k, f.k_at, kKeyRows), v = of_keys(f.v, f.v_at, kKeyRows);
  const HopperBackwardMaps maps = kOwnsKeys ? HopperBackwardMaps{k, v, q, grad_o, of_keys(p.dk, p.dk_at, 64), of_keys(p.dv, p.dv_at, 64)}
                                            : HopperBackwardMaps{q, grad_o, k, v, of_queries(p.dq, p.dq_at, 64), {}};
  GF_ALLOW_SHARED((hopper_backward_kernel<S, kWidth, kPass>), kBytes);
  GF_LAUNCH((hopper_backward_kernel<S, kWidth, kPass>), gradient_grid<kPass>(f, kGradientRows), kGradientThreads, kBytes, stream, p, maps);
}

template <class S, int kIndex = 0>
void launch_hopper_backward(const AttentionBackwardParams& p, void* stream) {
  constexpr int kWidth = kHopperBackwardWidths[kIndex];
  if constexpr (kIndex + 1 < sizeof kHopperBackwardWidths / sizeof kHopperBackwardWidths[0]) {
    if (p.forward.d > kWidth) return launch_hopper_backward<S, kIndex + 1>(p, stream);
  }
  launch_hopper_backward_pass<S, kWidth, Pass::kQueries>(p, stream);
  launch_hopper_backward_pass<S, kWidth, Pass::kKeysAndValues>(p, stream);
}

}  // namespace
}  // namespace genfast
