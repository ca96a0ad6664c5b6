// The backward pass on a CPU, compiled once per instruction set: P = exp(S - row_max) / row_sum is made again, block by block, and
//   D = sum(do o) - dlse    dS = P (do v^T - D)    dq = scale dS k    dk = scale dS^T q    dv = P^T do    dbias = dS
// (Dao et al. 2022, appendix B.2). The sums over queries are kept transposed, (d, keys): so P and dS are read as they were made.
#pragma once
#include "attention_backward_cpu.h"
#include "attention_cpu_fma.h"

namespace genfast {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;  // of queries, in the second-level cache together with a block of keys

// The queries that all keys are multiplied with before the next: as many as the cache holds, in equal parts.
template <class Engine>
int64_t chunk_rows(const AttentionParams& p, const AttentionBackwardPlan& plan) {
  const int64_t operands = 2 * (Engine::depth(p.d) + Engine::height(p.d)) * static_cast<int64_t>(sizeof(typename Engine::Operand));
  const int64_t fit = kChunkBytes / (operands + Engine::width(p.d) * 4) / Engine::kBlockRows;
  const int64_t most = (fit < 1 ? 1 : fit > 8 ? 8 : fit) * Engine::kBlockRows, chunks = (plan.rows + most - 1) / most;
  return round_up((plan.rows + chunks - 1) / chunks, Engine::kBlockRows);
}

template <class Engine>
int64_t key_sums_of(const AttentionParams& p) {  // floats, for one head of keys
  return round_up(p.m, Engine::kKeys) * 2 * Engine::height(p.d);
}

template <class Engine>
struct BackwardBlock {
  using Operand = typename Engine::Operand;
  int64_t rows;                  // of a chunk
  Operand *q, *grad_o;           // (rows, depth)
  Operand *q_across, *o_across;  // queries and gradient of the output in the form of Engine::columns
  Operand *k, *v, *k_rows;       // a block of keys, packed
  float* dq;                     // (rows, width)
  float *row_max, *log_sum;      // (rows); log_sum: logarithm of row_sum to base 2
  float* delta;                  // (rows)
  float* key_sums;               // of a head, where nothing but this thread adds to them
  typename Engine::Weights weights;
  char* end;

  BackwardBlock(const AttentionParams& p, const AttentionBackwardPlan& plan, char* at)
      : rows(chunk_rows<Engine>(p, plan)),
        q(take<Operand>(at, rows * Engine::depth(p.d))),
        grad_o(take<Operand>(at, rows * Engine::depth(p.d))),
        q_across(Engine::columns(q, at, rows * Engine::height(p.d))),
        o_across(Engine::columns(grad_o, at, rows * Engine::height(p.d))),
        k(take<Operand>(at, Engine::kKeys * Engine::depth(p.d))),
        v(take<Operand>(at, Engine::kKeys * Engine::depth(p.d))),
        k_rows(take<Operand>(at, Engine::kKeys * Engine::width(p.d))),
        dq(take<float>(at, rows * Engine::width(p.d))),
        row_max(take<float>(at, rows)),
        log_sum(take<float>(at, rows)),
        delta(take<float>(at, rows)),
        key_sums(take<float>(at, plan.splits == 1 ? key_sums_of<Engine>(p) : 0)),
        weights(at),
        end(at) {}
};

// Where a step is: `rows` queries from `first_row` of one head, `keys` keys from `first_key`.
struct Step {
  int64_t batch, head, first_row, rows, first_key, keys;
};

// Scores and slopes do v^T of `count` rows from `row` of a step become weights and their gradients. Rows beyond the step's become zeros.
template <class Engine, class B, bool kBias, bool kMask>
void weigh(const AttentionParams& p, const BackwardBlock<Engine>& at, const Step& step, int64_t block, int64_t row, int64_t count,
           bool keep) {
  const typename Engine::Weights& w = at.weights;
  const float *row_max = at.row_max + block, *log_sum = at.log_sum + block, *delta = at.delta + block;
  const VInt lanes = lane_numbers();
  const ScoreUnit& unit = p.unit;
  for (int64_t r = row; r < row + count; r += 2) {
    const B* bias[2] = {};
    const uint8_t* mask[2] = {};
    int64_t visible[2] = {};
    for (int u = 0; u < 2; ++u) {
      if (r + u >= step.rows) {  // reads what the last row reads, to no effect
        bias[u] = bias[0];
        mask[u] = mask[0];
        continue;
      }
      const int64_t i = step.first_row + r + u;
      if (kBias) {
        bias[u] =
            static_cast<const B*>(p.bias) + step.batch * p.bias_at.batch + step.head * p.bias_at.head + i * p.bias_at.row + step.first_key;
      }
      if (kMask) mask[u] = p.mask + step.batch * p.mask_at.batch + step.head * p.mask_at.head + i * p.mask_at.row + step.first_key;
      const int64_t seen = p.causal ? i + p.m - p.n + 1 - step.first_key : step.keys;
      visible[u] = seen < 0 ? 0 : seen < step.keys ? seen : step.keys;
      if (i + Engine::kBlockRows < p.n) {  // the next block's terms come from far away
        if (kBias) fetch(bias[u] + Engine::kBlockRows * p.bias_at.row, step.keys);
        if (kMask) fetch(mask[u] + Engine::kBlockRows * p.mask_at.row, step.keys);
      }
    }
    const float *scores = w.scores(r), *slopes = w.slopes(r);
    const bool there = r < step.rows;
    for (int64_t j = 0; j < step.keys; j += kLanes) {
      VFloat weight[2], ds[2];
      unroll<2>([&]<int u>() {
        VFloat x = load<float>(scores + u * Engine::kKeys + j);
        if constexpr (kBias) {
          x = fma_lanes(x, splat(unit.factor), there ? load_first(bias[u] + j, step.keys - j) : VFloat{}) - row_max[r + u];
        } else {
          x = fma_lanes(x, splat(unit.factor), splat(-row_max[r + u]));
        }
        x = fma_lanes(x, splat(unit.exponent), splat(-log_sum[r + u]));
        if (kMask && there) x = where_seen(mask[u] + j, step.keys - j, x);
        weight[u] = exp2_lanes<Engine::kShortExp>(x);
        if (j + kLanes > visible[u]) weight[u] = (lanes < static_cast<int>(visible[u] - j)) ? weight[u] : VFloat{};
        ds[u] = weight[u] * (load<float>(slopes + u * Engine::kKeys + j) - delta[r + u]);
      });
      w.store_pair(r, j, weight[0], weight[1], ds[0], ds[1]);
      if (keep) {
        store(w.slopes(r) + j, ds[0]);
        store(w.slopes(r + 1) + j, ds[1]);
      }
    }
    w.clear_pair(r, step.keys);
  }
}

// Adds `rows` rows of ds to the gradient of the bias, over whichever dimensions the bias is one.
template <class Engine>
void add_bias_gradient(const AttentionBackwardParams& p, const float* ds, int64_t rows, int64_t keys, float* to) {
  const VInt lanes = lane_numbers();
  const auto of = [&](int64_t r, int64_t j) __attribute__((always_inline)) {  // zeros beyond the keys
    const VFloat x = load<float>(ds + r * Engine::kKeys + j);
    return j + kLanes > keys ? (lanes < static_cast<int>(keys - j)) ? x : VFloat{} : x;
  };
  const auto add = [&](float* at, VFloat x, int64_t count)
                       __attribute__((always_inline)) { store_first(at, load_first(at, count) + x, count); };
  if (p.dbias_column && p.dbias_at.row) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < keys; j += kLanes) add(to + r * p.dbias_at.row + j, of(r, j), keys - j);
    }
  } else if (p.dbias_column) {
    for (int64_t j = 0; j < keys; j += kLanes) {
      VFloat sum{};
      for (int64_t r = 0; r < rows; ++r) sum = sum + of(r, j);
      add(to + j, sum, keys - j);
    }
  } else {
    VFloat all{};
    for (int64_t r = 0; r < rows; ++r) {
      VFloat sum{};
      for (int64_t j = 0; j < keys; j += kLanes) sum = sum + of(r, j);
      if (p.dbias_at.row) to[r * p.dbias_at.row] += total(sum);
      all = all + sum;
    }
    if (!p.dbias_at.row) to[0] += total(all);
  }
}

template <class Engine, class T>
void run_step(const AttentionBackwardParams& params, const AttentionBackwardPlan& plan, const BackwardBlock<Engine>& at, const Step& step,
              int64_t block, int64_t split, float* key_sums) {
  const AttentionParams& p = params.forward;
  const typename Engine::Weights& w = at.weights;
  const int64_t depth = Engine::depth(p.d), width = Engine::width(p.d), height = Engine::height(p.d);
  const int64_t rows = round_up(step.rows, Engine::kPaddedRows);
  // The first row that sees a key.
  const int64_t hidden = p.causal ? step.first_key - (p.m - p.n) - step.first_row : 0;
  const int64_t from = hidden <= 0 ? 0 : hidden / Engine::kStepRows * Engine::kStepRows;
  for (int64_t r = from; r < rows; r += Engine::kStepRows) {
    const int64_t count = rows - r < Engine::kStepRows ? rows - r : Engine::kStepRows, keys = round_up(step.keys, Engine::kKeyGroup);
    Engine::score(at.q + (block + r) * depth, at.k, w.scores(r), Engine::kKeys, count, keys, depth);
    Engine::score(at.grad_o + (block + r) * depth, at.v, w.slopes(r), Engine::kKeys, count, keys, depth);
    const auto run = [&]<class B, bool kBias>() {
      p.mask ? weigh<Engine, B, kBias, true>(p, at, step, block, r, count, params.dbias)
             : weigh<Engine, B, kBias, false>(p, at, step, block, r, count, params.dbias);
    };
    if (!p.bias) {
      run.template operator()<float, false>();
    } else if (p.bias_dtype == DType::F32) {
      run.template operator()<float, true>();
    } else {
      run.template operator()<T, true>();
    }
    if (params.dbias && r < step.rows) {
      float* to = plan.dbias + split * plan.dbias_split + step.batch * params.dbias_at.batch + step.head * params.dbias_at.head +
                  (step.first_row + r) * params.dbias_at.row + step.first_key * params.dbias_column;
      add_bias_gradient<Engine>(params, w.slopes(r), step.rows - r < count ? step.rows - r : count, step.keys, to);
    }
  }
  Engine::add_across(at.q_across + (block + from) * height, w.ds + from * Engine::kKeys, key_sums, rows - from, step.keys, height);
  Engine::add_across(at.o_across + (block + from) * height, w.p + from * Engine::kKeys, key_sums + height * Engine::kKeys, rows - from,
                     step.keys, height);
  Engine::add_values(w.ds_rows + from * Engine::kKeys, Engine::kKeys, at.k_rows, at.dq + (block + from) * width, rows - from, step.keys,
                     width);
}

// Queries `first` to `last` of one head against all keys.
template <class Engine, class T>
void run_chunk(const AttentionBackwardParams& params, const AttentionBackwardPlan& plan, const BackwardBlock<Engine>& at, int64_t batch,
               int64_t head, int64_t split, int64_t first, int64_t last, float* key_sums) {
  const AttentionParams& p = params.forward;
  const int64_t rows = last - first, rows_padded = round_up(rows, Engine::kPaddedRows), width = Engine::width(p.d);
  const auto row = [&](const void* t, const AttentionRows& where, int64_t i) {
    return static_cast<const T*>(t) + batch * where.batch + head * where.head + i * where.row;
  };
  const T *q = row(p.q, p.q_at, first), *grad_o = row(params.grad_o, params.grad_o_at, first);
  Engine::load_queries(at.q, q, p.q_at.row, rows, rows_padded, p.d);
  Engine::load_queries(at.grad_o, grad_o, params.grad_o_at.row, rows, rows_padded, p.d);
  Engine::load_columns(at.q_across, q, p.q_at.row, rows, rows_padded, p.d);
  Engine::load_columns(at.o_across, grad_o, params.grad_o_at.row, rows, rows_padded, p.d);
  __builtin_memset(at.dq, 0, static_cast<size_t>(rows_padded * width) * sizeof(float));
  const int64_t row_0 = (batch * p.heads + head) * p.n + first;
  for (int64_t r = 0; r < rows_padded; ++r) {
    at.row_max[r] = at.log_sum[r] = at.delta[r] = 0;
    if (r >= rows) continue;
    const T *o = row(p.o, p.o_at, first + r), *g = grad_o + r * params.grad_o_at.row;
    VFloat sum{};
    for (int64_t c = 0; c < p.d; c += kLanes) sum = fma_lanes(load_first(g + c, p.d - c), load_first(o + c, p.d - c), sum);
    const RowStats stats = p.row_stats[row_0 + r];
    at.row_max[r] = stats.row_max;
    at.log_sum[r] = stats.log_sum;
    if (stats.log_sum != -kMinusInfinity) {  // else the query sees nothing: the gradients of its scores are 0, whatever comes in
      at.delta[r] = params.grad_lse ? total(sum) - params.grad_lse[row_0 + r] : total(sum);
    }
    params.delta[row_0 + r] = at.delta[r];
  }

  const int64_t kv_head = head / (p.heads / p.kv_heads), offset = p.m - p.n;
  const T* k = static_cast<const T*>(p.k) + batch * p.k_at.batch + kv_head * p.k_at.head;
  const T* v = static_cast<const T*>(p.v) + batch * p.v_at.batch + kv_head * p.v_at.head;
  for (int64_t key = 0; key < p.m && (!p.causal || key < last + offset); key += Engine::kKeys) {
    const int64_t keys = p.m - key < Engine::kKeys ? p.m - key : Engine::kKeys;
    Engine::pack_keys(at.k, k + key * p.k_at.row, p.k_at.row, keys, p.d);
    Engine::pack_keys(at.v, v + key * p.v_at.row, p.v_at.row, keys, p.d);
    Engine::pack_values(at.k_rows, k + key * p.k_at.row, p.k_at.row, keys, p.d);
    for (int64_t block = 0; block < rows; block += Engine::kBlockRows) {
      const Step step{batch, head, first + block, rows - block < Engine::kBlockRows ? rows - block : Engine::kBlockRows, key, keys};
      if (p.causal && key >= step.first_row + step.rows + offset) continue;
      run_step<Engine, T>(params, plan, at, step, block, split, key_sums + 2 * key * Engine::height(p.d));
    }
  }

  T* dq = static_cast<T*>(params.dq) + batch * params.dq_at.batch + head * params.dq_at.head + first * params.dq_at.row;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < p.d; c += kLanes) {
      store_first(dq + r * params.dq_at.row + c, load<float>(at.dq + r * width + c) * p.scale, p.d - c);
    }
  }
}

// One block of keys of a head: its sums, of one split after the other, to dk and dv.
template <class Engine, class T>
void store_block(const AttentionBackwardParams& params, const float* sums, int64_t splits, int64_t split, int64_t batch, int64_t kv_head,
                 int64_t first) {
  const AttentionParams& p = params.forward;
  const int64_t keys = p.m - first < Engine::kKeys ? p.m - first : Engine::kKeys;
  const auto write = [&](const float* from, void* t, const AttentionRows& where, float factor) {
    T* to = static_cast<T*>(t) + batch * where.batch + kv_head * where.head + first * where.row;
    for (int64_t j = 0; j < keys; j += kLanes) {
      for (int64_t c = 0; c < p.d; c += kLanes) {
        VFloat v[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const float* at = from + (c + i) * Engine::kKeys + j;
          v[i] = c + i < p.d ? load<float>(at) : VFloat{};
          for (int64_t s = 1; s < splits && c + i < p.d; ++s) v[i] = v[i] + load<float>(at + s * split);
        }
        transpose(v);
        for (int i = 0; i < kLanes && j + i < keys; ++i) store_first(to + (j + i) * where.row + c, v[i] * factor, p.d - c);
      }
    }
  };
  sums += first * 2 * Engine::height(p.d);
  write(sums, params.dk, params.dk_at, p.scale);
  write(sums + Engine::height(p.d) * Engine::kKeys, params.dv, params.dv_at, 1.0f);
}

template <class Engine, class T>
void store_keys_typed(const AttentionBackwardParams& params, const AttentionBackwardPlan& plan, int64_t block) {
  const AttentionParams& p = params.forward;
  const int64_t blocks = (p.m + Engine::kKeys - 1) / Engine::kKeys, head = block / blocks, size = key_sums_of<Engine>(p);
  store_block<Engine, T>(params, plan.key_sums + head * size, plan.splits, p.batch * p.kv_heads * size, head / p.kv_heads,
                         head % p.kv_heads, block % blocks * Engine::kKeys);
}

template <class Engine, class T>
void run_unit(const AttentionBackwardParams& params, const AttentionBackwardPlan& plan, int64_t unit, char* scratch) {
  const AttentionParams& p = params.forward;
  const BackwardBlock<Engine> at(p, plan, scratch);
  const int64_t split = unit % plan.splits, group = unit / plan.splits, groups = p.kv_heads / plan.kv_heads;
  const int64_t first_batch = group / groups * plan.batches, first_head = group % groups * plan.kv_heads, shared = p.heads / p.kv_heads;
  const int64_t first = split * plan.rows, last = first + plan.rows < p.n ? first + plan.rows : p.n;
  const int64_t size = key_sums_of<Engine>(p);
  for (int64_t batch = first_batch; batch < first_batch + plan.batches; ++batch) {
    for (int64_t kv_head = first_head; kv_head < first_head + plan.kv_heads; ++kv_head) {
      float* sums = plan.splits == 1 ? at.key_sums : plan.key_sums + ((split * p.batch + batch) * p.kv_heads + kv_head) * size;
      __builtin_memset(sums, 0, static_cast<size_t>(size) * sizeof(float));
      for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head) {
        for (int64_t chunk = first; chunk < last; chunk += at.rows) {
          run_chunk<Engine, T>(params, plan, at, batch, head, split, chunk, chunk + at.rows < last ? chunk + at.rows : last, sums);
        }
      }
      for (int64_t key = 0; plan.splits == 1 && key < p.m; key += Engine::kKeys) {
        store_block<Engine, T>(params, sums, 1, 0, batch, kv_head, key);
      }
    }
  }
}

template <class Engine>
size_t backward_scratch_bytes(const AttentionBackwardParams& p, const AttentionBackwardPlan& plan) {
  alignas(64) char* base = nullptr;
  return static_cast<size_t>(BackwardBlock<Engine>(p.forward, plan, base).end - base);
}

// f.operator()<T>() with T the type that the dtype names.
template <class F>
void with_type(DType dtype, F f) {
  if (dtype == DType::BF16) return f.template operator()<BFloat16>();
  if (dtype == DType::F16) return f.template operator()<Float16>();
  f.template operator()<float>();
}

[[maybe_unused]] void fma_backward_run(const AttentionBackwardParams& p, const AttentionBackwardPlan& plan, int64_t unit, void* scratch) {
  with_type(p.forward.dtype, [&]<class T>() { run_unit<FmaEngine, T>(p, plan, unit, static_cast<char*>(scratch)); });
}

[[maybe_unused]] void fma_store_keys(const AttentionBackwardParams& p, const AttentionBackwardPlan& plan, int64_t block) {
  with_type(p.forward.dtype, [&]<class T>() { store_keys_typed<FmaEngine, T>(p, plan, block); });
}

}  // namespace
}  // namespace genfast
