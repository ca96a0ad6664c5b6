// Decoding on tensor cores of sm_80 and newer. Bound by reading keys and values, so both go from global memory straight into the registers
// of mma.sync, 16 bytes an access, without shared memory or a barrier between: which head column and which key a fragment's element stands
// for is free as long as both factors agree, and is chosen such that a lane's 16 bytes are fragments.
#include "attention_decode.cuh"

namespace genfast {
namespace {

[[maybe_unused]] constexpr int kRows = 16, kKeys = 16;  // of a step of one warp

#if defined(GF_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ uint4 load16(const void* from, bool valid) {
  return valid ? *static_cast<const uint4*>(from) : uint4{};
}
template <class S>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return narrow<S, float, 2>({low, high}).unit[0];
}
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
  return (a & 0xffffu) | b << 16;
}
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
  return a >> 16 | (b & 0xffff0000u);
}
#endif

// Shared memory: the queries' fragments, then each warp's output. The output's pitch spreads the rows over the banks.
template <int kWidth>
constexpr int kPitch = kWidth + 4;
template <int kWidth>
constexpr int kSharedBytes = kWidth / 16 * 32 * 16 + kWarps * kRows * kPitch<kWidth> * 4;

// kWidth: the widest head, a multiple of 64. Lane 4g + t holds what the fragments of mma_m16n8k16 say.
template <class S, int kWidth>
__global__ void __launch_bounds__(kThreads) decode_mma_kernel(const __grid_constant__ AttentionDecodeParams p) {
#if defined(GF_EMULATE) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kSteps = kWidth / 16, kChunks = kWidth / 32, kGroups = kWidth / 64;
  GF_DYNAMIC_SHARED(uint4, queries);  // (kSteps, 32 lanes)
  GF_SHARED(WarpSums<kRows>, sums);
  float* const outputs = reinterpret_cast<float*>(queries + kSteps * 32);  // (kWarps, kRows, kPitch)
  const DecodeBlock at = decode_block(p, kRows);
  const int d = static_cast<int>(p.d), warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;

  // Step 2c + u multiplies head columns 32c + 8t + 4u + {0, 1, 2, 3} of each t: of 16 bytes of a key, u is the half.
  for (int i = static_cast<int>(threadIdx.x); i < kSteps * 32; i += kThreads) {
    const int column = i / 64 * 32 + i % 4 * 8 + i / 32 % 2 * 4, row = i % 32 / 4;
    uint32_t a[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= at.rows || column >= d) continue;
      const S* q = static_cast<const S*>(p.q) + row_offset(p, at, p.q_at, row + 8 * half) + column;
      a[half] = q[0].bits | static_cast<uint32_t>(q[1].bits) << 16;
      a[half + 2] = q[2].bits | static_cast<uint32_t>(q[3].bits) << 16;
    }
    queries[i] = {a[0], a[1], a[2], a[3]};
  }
  __syncthreads();

  const S* const k = static_cast<const S*>(p.k) + at.batch * p.k_at.batch + at.kv_head * p.k_at.head + at.first * p.k_at.row + 8 * t;
  const S* const v = static_cast<const S*>(p.v) + at.batch * p.v_at.batch + at.kv_head * p.v_at.head + at.first * p.v_at.row + 8 * g;
  const ScoreUnit& unit = p.unit;
  float out[kGroups][8][4] = {}, row_max[2] = {kMinusInfinity, kMinusInfinity}, row_sum[2] = {};
  const int visible[2] = {visible_keys(p, at, g), visible_keys(p, at, g + 8)};

#pragma unroll 1
  for (int key = warp * kKeys; key < at.keys; key += kWarps * kKeys) {
    uint4 keys[2][kChunks];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int mine = key + 8 * j + g;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) keys[j][c] = load16(k + mine * p.k_at.row + 32 * c, mine < at.keys && 32 * c + 8 * t < d);
    }
    const auto load_values = [&](uint4(&values)[4], int group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int mine = key + 2 * t + i % 2 + i / 2 * 8;
        values[i] = load16(v + mine * p.v_at.row + 64 * group, mine < at.keys && 64 * group + 8 * g < d);
      }
    };
    constexpr bool kEarly = kWidth <= 128;  // else registers do not suffice for keys and values at once
    uint4 values[kEarly ? kGroups : 1][4];
    if constexpr (kEarly) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) load_values(values[group], group);
    }

    float score[2][4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint4 even = queries[2 * c * 32 + lane], odd = queries[(2 * c + 1) * 32 + lane];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma_m16n8k16<S>(score[j], {even.x, even.y, even.z, even.w}, {keys[j][c].x, keys[j][c].y});
        mma_m16n8k16<S>(score[j], {odd.x, odd.y, odd.z, odd.w}, {keys[j][c].z, keys[j][c].w});
      }
    }
    float rescale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float here = kMinusInfinity;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = score[i / 2][2 * half + i % 2];
        const int mine = key + i / 2 * 8 + 2 * t + i % 2;
        x *= unit.factor;
        if (p.bias && mine < visible[half]) x += bias_at<S>(p, at, g + 8 * half, mine);
        if (mine >= visible[half]) x = kMinusInfinity;
        here = fmaxf(here, x);
      }
      here = fmaxf(here, __shfl_xor_sync(~0u, here, 1));
      here = fmaxf(here, __shfl_xor_sync(~0u, here, 2));
      const float now = fmaxf(row_max[half], here), shift = now == kMinusInfinity ? 0.0f : now;
      rescale[half] = exp2_fast((row_max[half] - shift) * unit.exponent);
      row_max[half] = now;
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = score[i / 2][2 * half + i % 2];
        x = exp2_fast((x - shift) * unit.exponent);
        part += x;
      }
      row_sum[half] = fmaf(row_sum[half], rescale[half], part);
    }
    if (__ballot_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kGroups * 8 * 4; ++i) out[i / 32][i / 4 % 8][i % 4] *= rescale[i % 4 / 2];
    }
    const uint32_t weights[4] = {pack<S>(score[0][0], score[0][1]), pack<S>(score[0][2], score[0][3]), pack<S>(score[1][0], score[1][1]),
                                 pack<S>(score[1][2], score[1][3])};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint4(&mine)[4] = values[kEarly ? group : 0];
      if constexpr (!kEarly) load_values(mine, group);
      const auto add = [&](int i, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
        mma_m16n8k16<S>(out[group][2 * i], weights, {low_halves(v0, v1), low_halves(v2, v3)});
        mma_m16n8k16<S>(out[group][2 * i + 1], weights, {high_halves(v0, v1), high_halves(v2, v3)});
      };
      add(0, mine[0].x, mine[1].x, mine[2].x, mine[3].x);
      add(1, mine[0].y, mine[1].y, mine[2].y, mine[3].y);
      add(2, mine[0].z, mine[1].z, mine[2].z, mine[3].z);
      add(3, mine[0].w, mine[1].w, mine[2].w, mine[3].w);
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row_sum[half] += __shfl_xor_sync(~0u, row_sum[half], 1);
    row_sum[half] += __shfl_xor_sync(~0u, row_sum[half], 2);
    const int row = g + 8 * half;
    if (t == 0) {
      sums.row_max[warp][row] = row_max[half];
      sums.row_sum[warp][row] = row_sum[half];
    }
    // Tile e of a group holds columns 8n + e of its 64, n = 2t and 2t + 1 here.
    float* const to = outputs + (warp * kRows + row) * kPitch<kWidth> + 16 * t;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        to[64 * group + e] = out[group][e][2 * half];
        to[64 * group + 8 + e] = out[group][e][2 * half + 1];
      }
    }
  }
  __syncthreads();
  join_warps<S, kRows>(p, at, sums, outputs, kPitch<kWidth>);
#endif
}

template <class S>
void launch_typed(const AttentionDecodeParams& p, void* stream) {
  const auto launch = [&]<int kWidth>() {
    GF_ALLOW_SHARED((decode_mma_kernel<S, kWidth>), kSharedBytes<kWidth>);
    GF_LAUNCH((decode_mma_kernel<S, kWidth>), decode_grid(p, kRows), kThreads, kSharedBytes<kWidth>, stream, p);
  };
  p.d <= 64 ? launch.template operator()<64>() : p.d <= 128 ? launch.template operator()<128>() : launch.template operator()<256>();
}

}  // namespace

void launch_attention_decode_mma(const AttentionDecodeParams& p, void* stream) {
  p.dtype == DType::BF16 ? launch_typed<BFloat16>(p, stream) : launch_typed<Float16>(p, stream);
}

}  // namespace genfast
