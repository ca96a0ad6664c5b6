// solver_step_(Tensor(a!) ring, Tensor cond, Tensor? uncond, Tensor coef, Tensor index, Tensor counter, Tensor? seeds,
//              Tensor(b!)? model_input, Tensor(c!)? watch, bool rescale, bool threshold) -> ()
// solver_step_slots_(Tensor(a!)[] slots, ...) -> (): the same step, its slots given as separate tensors of one layout.
#include <vector>

#include "../../core/tensor.h"
#include "params.h"

namespace genfast {

GENFAST_DECLARE_LAUNCH(solver_step, SolverStepParams);

namespace {

// Everything of the arguments but the slots.
struct Arguments {
  const Tensor& cond;
  const std::optional<Tensor>& uncond;
  const Tensor& coef;
  const Tensor& index;
  const Tensor& counter;
  const std::optional<Tensor>& seeds;
  const std::optional<Tensor>& model_input;
  const std::optional<Tensor>& watch;
  bool rescale, threshold;
};

// The row's integers become addresses, so where the host can read them they are checked.
void check_row(const SolverStepParams& p, int64_t rows) {
  const int64_t row = *p.counter;
  check(row >= 0 && row < rows, "counter: got ", row, ", supported: 0 to ", rows - 1);
  const int64_t* index = p.index + row * kRowInts;
  check(index[kNumOut] >= 0 && index[kNumOut] <= kMaxOutputs, "index: got ", index[kNumOut], " outputs, supported: 0 to ", kMaxOutputs);
  check(index[kNumHist] >= 0 && index[kNumHist] <= kMaxHistory, "index: got ", index[kNumHist], " history terms, supported: 0 to ",
        kMaxHistory);
  check(index[kDraw] >= 0 && index[kDraw] <= UINT32_MAX, "index: got draw ", index[kDraw], ", supported: 0 to 2**32 - 1");
  const auto check_slot = [&](int64_t slot) {
    check(slot >= 0 && slot < p.num_slots, "index: got slot ", slot, ", supported: 0 to ", p.num_slots - 1);
  };
  for (int64_t j = 0; j < index[kNumHist]; ++j) check_slot(index[kHistSlot + j]);
  for (int64_t k = 0; k < index[kNumOut]; ++k) check_slot(index[kOutSlot + k]);
}

void run(SolverStepParams& p, const Layout& layout, const Tensor& state, const Arguments& a) {
  for (const Tensor* t : {&a.cond, &a.coef, &a.index, &a.counter}) check_device(*t, state);
  for (const auto* t : {&a.uncond, &a.seeds, &a.model_input, &a.watch}) {
    if (t->has_value()) check_device(**t, state);
  }
  const auto check_layout = [&](const Tensor& t, const char* name) {
    check(layout_of(t, name) == layout, name, ": got a shape or memory format other than the state's, supported: the same");
  };
  p.state = dtype_of(state, "state");
  p.model = dtype_of(a.cond, "cond");
  check((p.state == DType::F64) ? (p.model == DType::F64 || p.model == DType::F32) : p.model != DType::F64, "cond: got dtype ",
        torch::headeronly::toString(a.cond.scalar_type()), " for a state of ", torch::headeronly::toString(state.scalar_type()),
        ", supported: float32, bfloat16 or float16 for those states, float64 or float32 for a float64 state");
  check_layout(a.cond, "cond");
  p.cond = a.cond.data_ptr();
  if (a.uncond.has_value()) {
    check(a.uncond->scalar_type() == a.cond.scalar_type(), "uncond: got a dtype other than cond's, supported: the same");
    check_layout(*a.uncond, "uncond");
    p.uncond = a.uncond->data_ptr();
  }

  const ScalarType coef_type = p.state == DType::F64 ? ScalarType::Double : ScalarType::Float;
  check(a.coef.scalar_type() == coef_type, "coef: got dtype ", torch::headeronly::toString(a.coef.scalar_type()),
        ", supported: ", torch::headeronly::toString(coef_type), " for this state");
  check(a.coef.dim() == 2 && a.coef.size(1) == kRowFloats && a.coef.size(0) >= 1 && a.coef.is_contiguous(),
        "coef: supported: a contiguous tensor of shape (rows, ", kRowFloats, ")");
  const int64_t rows = a.coef.size(0);
  check(a.index.dim() == 2 && a.index.size(0) == rows && a.index.size(1) == kRowInts, "index: supported: shape (", rows, ", ", kRowInts,
        ")");
  p.coef = a.coef.data_ptr();
  p.index = int64_data(a.index, "index", rows * kRowInts);
  p.counter = int64_data(a.counter, "counter", 1);
  p.seeds = a.seeds.has_value() ? int64_data(*a.seeds, "seeds", layout.batch) : nullptr;
  p.watch = a.watch.has_value() ? int64_data(*a.watch, "watch", layout.batch) : nullptr;
  p.batch = layout.batch;
  p.per_sample = layout.per_sample;
  p.channels = layout.channels;
  p.rescale = a.rescale;
  p.threshold = a.threshold;
  if constexpr (kHostMemory) check_row(p, rows);
  if (layout.batch == 0 || layout.per_sample == 0) return;

  p.copies = 1;
  if (a.model_input.has_value()) {
    Layout input = layout_of(*a.model_input, "model_input");
    p.copies = static_cast<int32_t>(input.batch / layout.batch);
    check((p.copies == 1 || p.copies == 2) && input.batch == p.copies * layout.batch, "model_input: got a batch of ", input.batch,
          ", supported: ", layout.batch, " or ", 2 * layout.batch);
    input.batch /= p.copies;
    check(input == layout, "model_input: got a shape or memory format other than the state's, supported: the same");
    p.input = dtype_of(*a.model_input, "model_input");
    p.model_input = a.model_input->data_ptr();
  }

  const DeviceGuard guard(state);
  std::optional<Tensor> workspace;
  if (p.rescale || p.threshold) {
    const int64_t doubles[1] = {workspace_doubles(p.batch, p.per_sample)};
    workspace = torch::stable::new_empty(state, {doubles, 1}, ScalarType::Double);
    p.workspace = static_cast<double*>(workspace->data_ptr());
  }
  GENFAST_LAUNCH(solver_step, p, state);
}

void solver_step_(const Tensor& ring, const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& coef, const Tensor& index,
                  const Tensor& counter, const std::optional<Tensor>& seeds, const std::optional<Tensor>& model_input,
                  const std::optional<Tensor>& watch, bool rescale, bool threshold) {
  const Layout layout = layout_of(ring, "ring", 1);
  const int64_t slots = ring.size(0);
  check(slots >= 1 && slots <= kMaxSlots, "ring: got ", slots, " slots, supported: 1 to ", kMaxSlots);
  SolverStepParams p{};
  p.num_slots = static_cast<int32_t>(slots);
  const int64_t stride = ring.stride(0) * static_cast<int64_t>(ring.element_size());
  for (int64_t k = 0; k < slots; ++k) p.slot[k] = static_cast<char*>(ring.data_ptr()) + k * stride;
  run(p, layout, ring, {cond, uncond, coef, index, counter, seeds, model_input, watch, rescale, threshold});
}

void solver_step_slots_(const std::vector<Tensor>& slots, const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& coef,
                        const Tensor& index, const Tensor& counter, const std::optional<Tensor>& seeds,
                        const std::optional<Tensor>& model_input, const std::optional<Tensor>& watch, bool rescale, bool threshold) {
  check(!slots.empty() && slots.size() <= kMaxSlots, "slots: got ", slots.size(), " tensors, supported: 1 to ", kMaxSlots);
  const Layout layout = layout_of(slots[0], "slots[0]");
  SolverStepParams p{};
  p.num_slots = static_cast<int32_t>(slots.size());
  for (size_t k = 0; k < slots.size(); ++k) {
    check(slots[k].scalar_type() == slots[0].scalar_type() && layout_of(slots[k], "slots") == layout, "slots[", k,
          "]: got a dtype, shape or memory format other than slots[0]'s, supported: the same");
    check_device(slots[k], slots[0]);
    p.slot[k] = slots[k].data_ptr();
  }
  run(p, layout, slots[0], {cond, uncond, coef, index, counter, seeds, model_input, watch, rescale, threshold});
}

}  // namespace
}  // namespace genfast

GENFAST_LIBRARY_IMPL(m) {
  m.impl("solver_step_", TORCH_BOX(&genfast::solver_step_));
  m.impl("solver_step_slots_", TORCH_BOX(&genfast::solver_step_slots_));
}
