// The forward pass on Hopper (sm_90a): bulk tensor copies by one warp, wgmma by two or three warpgroups of 64 queries each, the softmax of
// one tile of keys beside the products of the next (Shah et al. 2024). docs/attention-hopper.md.
#pragma once
#include "attention_hopper_tile.cuh"

namespace genfast {
namespace {

// Widths of head the kernel is compiled for; a narrower head, a multiple of 8, reads zeros beyond its columns.
constexpr int kHopperWidths[] = {64, 80, 96, 128, 160, 192, 256};

// One block: `groups` x 64 queries against `keys` keys at a time. A tile of keys or of values takes a slot of the ring, in panels of
// `panel` columns (64, 32 or 16: rows of 128, 64 or 32 bytes in shared memory).
struct HopperTile {
  int groups, keys, slots, panel;
  constexpr int queries() const { return 64 * groups; }
  constexpr int threads() const { return 128 * (groups + 1); }
};

// The tile table. Keys: outputs (width / 2 registers a thread), scores (keys / 2) and weights (keys / 4) fit beside some 40 others in 240
// registers with two groups, in 160 with three; four slots and the queries in 227 KiB.
constexpr HopperTile hopper_tile(int width, bool terms) {
  switch (width) {
    case 64:
      return {3, terms ? 80 : 128, 4, 64};
    case 80:
      return {3, terms ? 80 : 112, 4, 64};
    case 96:
      return {3, terms ? 64 : 112, 4, 32};
    case 128:
      return {2, terms ? 128 : 176, 4, 64};
    case 160:
      return {2, terms ? 112 : 144, 4, 32};
    case 192:
      return {2, terms ? 96 : 112, 4, 64};
    default:
      return {2, terms ? 64 : 80, 4, 64};
  }
}

// Registers of a thread that computes; what the producer's threads give up goes to these.
constexpr int hopper_registers(HopperTile tile) {
  return tile.groups == 2 ? 240 : 160;
}

// Bytes in shared memory of `rows` rows: whole panels.
constexpr int hopper_bytes(HopperTile tile, int width, int rows) {
  return (width + tile.panel - 1) / tile.panel * tile.panel * rows * 2;
}
// Queries, ring, barriers, and what it takes to begin at a multiple of 1024, where swizzling patterns begin.
constexpr int hopper_shared_bytes(HopperTile tile, int width) {
  return hopper_bytes(tile, width, tile.queries()) + tile.slots * hopper_bytes(tile, width, tile.keys) + (2 * tile.slots + 2) * 8 + 1024;
}

struct HopperMaps {
  TensorMap q, k, v, o;
};

// The order of work: items, dealt to the blocks of the grid in turn. An item is one block of queries of one head; under causality two, the
// k-th longest and the k-th shortest, so that all items take as long. Items of `together` heads, whose keys and values fit in the
// second-level cache, follow one another.
struct HopperOrder {
  int blocks, heads, together;
  bool causal;

  __host__ __device__ int items_of_head() const { return causal ? (blocks + 1) / 2 : blocks; }
  __host__ __device__ int items() const { return items_of_head() * heads; }

  // run(block of queries) for all that this block of the grid is dealt.
  template <class Run>
  __device__ __forceinline__ void deal(const AttentionParams& p, int queries, const Run& run) const {
    const int each = items_of_head(), parts = causal ? 2 : 1;
#pragma unroll 1
    for (int turn = 0;; ++turn) {  // one counter: registers are dear
      const int item = static_cast<int>(blockIdx.x) + turn / parts * static_cast<int>(gridDim.x);
      if (item >= items()) break;
      const int first = item / (each * together) * together, rest = item - first * each;
      const int size = heads - first < together ? heads - first : together, head = first + rest % size, rank = rest / size;
      const bool second = turn % parts == 1;
      if (second && rank == blocks - 1 - rank) continue;  // the one in the middle
      QueryBlock at;
      at.head = head % static_cast<int>(p.heads);
      at.batch = head / static_cast<int>(p.heads);
      at.kv_head = at.head / static_cast<int>(p.heads / p.kv_heads);
      at.first = static_cast<int64_t>(second ? rank : blocks - 1 - rank) * queries;
      at.n = p.n;
      at.m = p.m;
      at.before_q = at.before_k = 0;
      at.rows = p.n - at.first < queries ? static_cast<int>(p.n - at.first) : queries;
      run(at);
    }
  }
};

// kTerms: there is a bias or a mask.
template <class S, int kWidth, bool kTerms>
__global__ void __launch_bounds__(hopper_tile(kWidth, kTerms).threads(), 1)
    hopper_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ HopperMaps maps,
                  const __grid_constant__ HopperOrder order, const __grid_constant__ AttentionAccess wide) {
  constexpr HopperTile kTile = hopper_tile(kWidth, kTerms);
  constexpr int kGroups = kTile.groups, kQueries = kTile.queries(), kKeys = kTile.keys, kPanel = kTile.panel, kRow = 2 * kPanel;
  constexpr int kPanels = (kWidth + kPanel - 1) / kPanel, kSlotBytes = hopper_bytes(kTile, kWidth, kKeys);
  constexpr int kQueryPanel = kQueries * kRow, kKeyPanel = kKeys * kRow;  // bytes of one panel
  using Place = RingPlace<kTile.slots>;

  GF_DYNAMIC_SHARED(unsigned char, memory);
  unsigned char* const queries = memory + (0u - shared_address(memory)) % 1024;  // later the outputs
  unsigned char* const ring = queries + hopper_bytes(kTile, kWidth, kQueries);
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring + kTile.slots * kSlotBytes);  // of each slot: it has landed
  uint64_t* const empty = full + kTile.slots;                                           // each warp that computes has used it
  uint64_t* const queries_full = empty + kTile.slots;
  uint64_t* const queries_empty = queries_full + 1;

  const int role = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);  // the same in all lanes, and the compiler knows
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTile.slots; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, 4 * kGroups);
    }
    mbarrier_init(queries_full, 1);
    mbarrier_init(queries_empty, kGroups);
    mbarrier_init_fence();
  }
  __syncthreads();
  // One tile at least: of a block that sees no key all scores are -inf.
  const auto tiles_of = [&](const QueryBlock& at) {
    const int tiles = static_cast<int>((visible_keys(p, at) + kKeys - 1) / kKeys);
    return tiles > 0 ? tiles : 1;
  };

  if (role == 0) {
    // ---- the producer: keys and values in the order of their use, K0 K1 V0 K2 V1 ..., from the last tile to the first ----
    registers_down_to<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    tensor_prefetch(maps.q);
    tensor_prefetch(maps.k);
    tensor_prefetch(maps.v);
    tensor_prefetch(maps.o);
    Place place;
    uint32_t parity = 0;  // of the queries' present turn
    order.deal(p, kQueries, [&](const QueryBlock& at) {
      const int tiles = tiles_of(at);
      const auto load = [&](const TensorMap& map, int tile) {
        mbarrier_wait(empty + place.slot, place.parity ^ 1);
        mbarrier_arrive_expecting(full + place.slot, kSlotBytes);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          tensor_load(ring + place.slot * kSlotBytes + panel * kKeyPanel, map, panel * kPanel, tile * kKeys, at.kv_head, at.batch,
                      full + place.slot);
        }
        place = place.next();
      };
      load(maps.k, tiles - 1);
      mbarrier_wait(queries_empty, parity ^ 1);
      mbarrier_arrive_expecting(queries_full, hopper_bytes(kTile, kWidth, kQueries));
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        tensor_load(queries + panel * kQueryPanel, maps.q, panel * kPanel, static_cast<int>(at.first), at.head, at.batch, queries_full);
      }
      parity ^= 1;
      for (int tile = tiles - 2; tile >= 0; --tile) {
        load(maps.k, tile);
        load(maps.v, tile + 1);
      }
      load(maps.v, 0);
    });
  } else {
    // ---- a group that computes: rows [64 group, 64 group + 64) of the block ----
    registers_up_to<hopper_registers(kTile)>();
    const int group = role - 1, thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, t = lane % 4;
    const int row = 64 * group + thread / 32 * 16 + lane / 4;  // and row + 8
    const float exponent = p.unit.exponent;                    // without a bias products are scores: the scale is positive, hopper_can()
    const bool bias = kTerms && p.bias;
    const uint64_t from_queries = matrix_descriptor<kRow>(shared_address(queries) + group * 64 * kRow, 8 * kRow, 0);
    const uint64_t from_keys = matrix_descriptor<kRow>(shared_address(ring), 8 * kRow, 0);
    const uint64_t from_values = matrix_descriptor<kRow>(shared_address(ring), 8 * kRow, kKeyPanel);

    float out[kWidth / 2], score[kKeys / 2], row_max[2], row_sum[2], rescale[2];
    uint32_t weight[kKeys / 4];
    Place place;
    uint32_t parity = 0;
    // Descriptors count in units of 16 bytes.
    const auto multiply_keys = [&](int slot) {
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < kWidth / 16; ++s) {
        const int panel = 16 * s / kPanel, byte = 32 * s % kRow;
        wgmma<S, kKeys>(score, from_queries + (panel * kQueryPanel + byte) / 16,
                        from_keys + static_cast<uint64_t>((slot * kSlotBytes + panel * kKeyPanel + byte) / 16), s > 0);
      }
      wgmma_commit();
    };
    const auto multiply_values = [&](int slot) {
      pinned(out);
      pinned(weight);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        const uint32_t a[4] = {weight[4 * i], weight[4 * i + 1], weight[4 * i + 2], weight[4 * i + 3]};
        wgmma<S, kWidth>(out, a, from_values + static_cast<uint64_t>((slot * kSlotBytes + i * 16 * kRow) / 16), true);
      }
      wgmma_commit();
    };
    const auto release = [&](int slot) {
      if (lane == 0) mbarrier_arrive(empty + slot);
    };
    // Groups issue their products in turn, so that one's softmax runs beside another's products.
    constexpr int kTurn = 1, kGroupBarrier = kTurn + kGroups;
    const auto wait_turn = [&] { named_barrier_wait(kTurn + group, 256); };
    const auto pass_turn = [&] { named_barrier_arrive(kTurn + (group + 1) % kGroups, 256); };
    if (group == kGroups - 1) pass_turn();

    order.deal(p, kQueries, [&](const QueryBlock& at) {
      const int tiles = tiles_of(at);

      // Products of a tile to weights (still float32): rescale is what the sums before it are to be multiplied by.
      const auto online_softmax = [&](int tile) {
        const int64_t key = static_cast<int64_t>(tile) * kKeys;
        const bool edge = key + kKeys > p.m || (p.causal && key + kKeys > at.first + 64 * group + p.m - p.n + 1);
        if (kTerms || edge) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const RowTerms terms = row_terms(p, at, row + 8 * half, key);
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
              float &x = score[4 * j + 2 * half], &y = score[4 * j + 2 * half + 1];
              if constexpr (kTerms) {
                finish_scores<S>(p, wide, terms, 8 * j + 2 * t, x, y);
              } else {
                if (8 * j + 2 * t >= terms.visible) x = kMinusInfinity;
                if (8 * j + 2 * t + 1 >= terms.visible) y = kMinusInfinity;
              }
            }
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float here = kMinusInfinity;
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) here = fmaxf(here, fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
          here = fmaxf(here, __shfl_xor_sync(~0u, here, 1));
          here = fmaxf(here, __shfl_xor_sync(~0u, here, 2));
          const float now = fmaxf(row_max[half], here), shift = now == kMinusInfinity ? 0.0f : now;
          rescale[half] = rescale_of(bias, exponent, row_max[half], shift);
          const Power power = power_of(bias, exponent, shift);
          row_max[half] = now;
          if (bias) {
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
              score[4 * j + 2 * half] = (score[4 * j + 2 * half] - shift) * exponent;
              score[4 * j + 2 * half + 1] = (score[4 * j + 2 * half + 1] - shift) * exponent;
            }
          }
          float part = 0.0f;
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j) {
            float &x = score[4 * j + 2 * half], &y = score[4 * j + 2 * half + 1];
            x = exp2_fast(fmaf(x, power.factor, -power.shift));
            y = exp2_fast(fmaf(y, power.factor, -power.shift));
            part += x + y;
          }
          row_sum[half] = fmaf(row_sum[half], rescale[half], part);
        }
      };
      const auto pack_weights = [&] {  // the sums of two neighbouring groups of 8 keys are the registers of A for 16
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) weight[i] = pack16<S>(score[2 * i], score[2 * i + 1]);
      };

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[half] = kMinusInfinity;
        row_sum[half] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) out[i] = 0.0f;

      mbarrier_wait(queries_full, parity);
      parity ^= 1;
      mbarrier_wait(full + place.slot, place.parity);
      multiply_keys(place.slot);
      wgmma_wait<0>();
      pinned(score);
      release(place.slot);
      place = place.next();
      online_softmax(tiles - 1);
      pack_weights();

#pragma unroll 1
      for (int tile = tiles - 2; tile >= 0; --tile) {
        const Place keys = place, values = place.next();
        place = values.next();
        mbarrier_wait(full + keys.slot, keys.parity);
        wait_turn();
        multiply_keys(keys.slot);
        mbarrier_wait(full + values.slot, values.parity);
        multiply_values(values.slot);
        pass_turn();
        wgmma_wait<1>();
        pinned(score);
        release(keys.slot);
        online_softmax(tile);
        finished(row_sum[0] + row_sum[1], full);
        wgmma_wait<0>();
        pinned(out);
        release(values.slot);
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) out[i] *= rescale[i / 2 % 2];
        pack_weights();
      }
      mbarrier_wait(full + place.slot, place.parity);
      multiply_values(place.slot);
      wgmma_wait<0>();
      pinned(out);
      release(place.slot);
      place = place.next();

      // ---- outputs, through this group's part of the queries' memory ----
      named_barrier_wait(kGroupBarrier + group, 128);  // no warp of the group reads queries any more
      float inverse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float all = row_sum[half];
        all += __shfl_xor_sync(~0u, all, 1);
        all += __shfl_xor_sync(~0u, all, 2);
        inverse[half] = all == 0.0f ? 0.0f : 1.0f / all;
        if (t == 0 && row + 8 * half < at.rows) store_row_stats(p, lse_at(p, at, at.first + row + 8 * half), row_max[half], all);
      }
      put_rows<S, kWidth, kPanel>(queries, kQueryPanel, row, t, out, inverse);
      shared_writes_fence();
      named_barrier_wait(kGroupBarrier + group, 128);
      if (thread == 0) {
        if (64 * group < at.rows) {
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            tensor_store(maps.o, queries + panel * kQueryPanel + group * 64 * kRow, panel * kPanel, static_cast<int>(at.first) + 64 * group,
                         at.head, at.batch);
          }
          tensor_stores_wait();
        }
        mbarrier_arrive(queries_empty);
      }
    });
  }
}

template <class S, int kWidth, bool kTerms>
void launch_hopper_as(const AttentionParams& p, void* stream) {
  constexpr HopperTile kTile = hopper_tile(kWidth, kTerms);
  constexpr int kBytes = hopper_shared_bytes(kTile, kWidth);
  static_assert(kBytes <= 227 * 1024);
  const HopperMaps maps{hopper_map(p.q, p.q_at, p.d, p.n, p.heads, p.batch, kTile.panel, kTile.queries()),
                        hopper_map(p.k, p.k_at, p.d, p.m, p.kv_heads, p.batch, kTile.panel, kTile.keys),
                        hopper_map(p.v, p.v_at, p.d, p.m, p.kv_heads, p.batch, kTile.panel, kTile.keys),
                        hopper_map(p.o, p.o_at, p.d, p.n, p.heads, p.batch, kTile.panel, 64)};
  constexpr int64_t kCacheBytes = 32 << 20;  // of the 50 MB that the card has
  const int64_t heads = p.heads * p.batch, blocks = (p.n + kTile.queries() - 1) / kTile.queries(), shared = p.heads / p.kv_heads;
  check(blocks * heads < (int64_t{1} << 30), "q: got ", blocks * heads, " blocks of ", kTile.queries(),
        " queries, supported: fewer than 2^30");
  const int64_t kept = kCacheBytes / (4 * p.m * p.d) * shared, together = kept < shared ? shared : kept < heads ? kept : heads;
  const HopperOrder order{static_cast<int>(blocks), static_cast<int>(heads), static_cast<int>(together), p.causal};
  const int processors = gf_device::multiprocessors(), grid = order.items() < processors ? order.items() : processors;
  GF_ALLOW_SHARED((hopper_kernel<S, kWidth, kTerms>), kBytes);
  GF_LAUNCH((hopper_kernel<S, kWidth, kTerms>), static_cast<unsigned>(grid), kTile.threads(), kBytes, stream, p, maps, order, access_of(p));
}

template <class S, int kIndex = 0>
void launch_hopper(const AttentionParams& p, void* stream) {
  constexpr int kWidth = kHopperWidths[kIndex];
  if constexpr (kIndex + 1 < sizeof kHopperWidths / sizeof kHopperWidths[0]) {
    if (p.d > kWidth) return launch_hopper<S, kIndex + 1>(p, stream);
  }
  p.bias || p.mask ? launch_hopper_as<S, kWidth, true>(p, stream) : launch_hopper_as<S, kWidth, false>(p, stream);
}

}  // namespace
}  // namespace genfast
