// From torch's tensors to what the kernels take: dtype, pointers, layout, backend. With check.h the only torch-aware header.
// An op's registration unit is compiled once per backend, with exactly one GENFAST_BACKEND_* defined:
//   CPU       libgenfast_cpu.so       key CPU,  namespace genfast,           launch_<op>_cpu(params)
//   CUDA      libgenfast_cuda.so      key CUDA, namespace genfast,           launch_<op>_cuda(params, stream)
//   EMULATOR  libgenfast_emulator.so  key CPU,  namespace genfast_emulator,  launch_<op>_cuda(params, nullptr) on host memory
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "check.h"
#include "dtype.h"

#if defined(GENFAST_BACKEND_CPU) + defined(GENFAST_BACKEND_CUDA) + defined(GENFAST_BACKEND_EMULATOR) != 1
#error "compile with exactly one of GENFAST_BACKEND_CPU, GENFAST_BACKEND_CUDA, GENFAST_BACKEND_EMULATOR"
#endif

#if defined(GENFAST_BACKEND_CPU)
#define GENFAST_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(genfast, CPU, m)
#define GENFAST_DECLARE_LAUNCH(op, Params) void launch_##op##_cpu(const Params&)
#define GENFAST_LAUNCH(op, params, tensor) launch_##op##_cpu(params)
#elif defined(GENFAST_BACKEND_CUDA)
// Weak, so that the library also loads where this torch has no CUDA.
#pragma weak aoti_torch_get_current_cuda_stream
#define GENFAST_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(genfast, CUDA, m)
#define GENFAST_DECLARE_LAUNCH(op, Params) void launch_##op##_cuda(const Params&, void* stream)
#define GENFAST_LAUNCH(op, params, tensor) launch_##op##_cuda(params, current_stream(tensor))
#else
#define GENFAST_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(genfast_emulator, CPU, m)
#define GENFAST_DECLARE_LAUNCH(op, Params) void launch_##op##_cuda(const Params&, void* stream)
#define GENFAST_LAUNCH(op, params, tensor) launch_##op##_cuda(params, nullptr)
#endif

namespace genfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(GENFAST_BACKEND_CUDA)
constexpr bool kHostMemory = false;

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) : guard_(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}
#else
constexpr bool kHostMemory = true;

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor&) {}
};
#endif

// A host operator is only ever called with host tensors; a device operator may be handed a mixture.
inline void check_device([[maybe_unused]] const Tensor& t, [[maybe_unused]] const Tensor& like) {
  if constexpr (!kHostMemory) {
    check(t.is_cuda() && t.get_device_index() == like.get_device_index(), "tensors: got several devices, supported: all on one device");
  }
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::F32;
    case ScalarType::Double:
      return DType::F64;
    case ScalarType::BFloat16:
      return DType::BF16;
    case ScalarType::Half:
      return DType::F16;
    default:
      fail(name, ": got dtype ", torch::headeronly::toString(t.scalar_type()), ", supported: float32, float64, bfloat16, float16");
  }
}

// How the elements of (batch, *sample) lie in memory: each sample dense, samples one after another.
struct Layout {
  int64_t batch = 0;
  int64_t per_sample = 0;
  int64_t channels = 1;  // 1: C-order; else channels_last with so many channels
  bool operator==(const Layout&) const = default;
};

// The layout of dimensions skip, skip + 1, ... of `t` (skip = 1 for a ring, whose first dimension counts slots).
inline Layout layout_of(const Tensor& t, const char* name, int64_t skip = 0) {
  const int64_t dims = t.dim() - skip;
  check(dims >= 1, name, ": got ", t.dim(), " dimensions, supported: at least ", 1 + skip);
  const auto sizes = t.sizes(), strides = t.strides();
  Layout layout;
  layout.batch = sizes[skip];
  layout.per_sample = 1;
  for (int64_t i = 1; i < dims; ++i) layout.per_sample *= sizes[skip + i];
  if (layout.batch == 0 || layout.per_sample == 0) return layout;

  // Whether walking the dimensions innermost first, in this order, meets every element at the next address.
  const auto dense = [&](bool channels_last) {
    int64_t expected = 1;
    const auto visit = [&](int64_t i) {
      const bool fits = sizes[skip + i] == 1 || strides[skip + i] == expected;
      expected *= sizes[skip + i];
      return fits;
    };
    if (channels_last && !visit(1)) return false;
    for (int64_t i = dims - 1; i >= (channels_last ? 2 : 0); --i) {
      if (!visit(i)) return false;
    }
    return !channels_last || visit(0);
  };
  if (dense(false)) return layout;
  check((dims == 4 || dims == 5) && dense(true), name,
        ": got strides that are neither contiguous nor channels_last, supported: a dense tensor");
  layout.channels = sizes[skip + 1];
  return layout;
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// A dense vector of int64 with at least `least` elements, or an error that names it.
inline int64_t* int64_data(const Tensor& t, const char* name, int64_t least) {
  check(t.scalar_type() == ScalarType::Long, name, ": got dtype ", torch::headeronly::toString(t.scalar_type()), ", supported: int64");
  check(t.is_contiguous() && t.numel() >= least, name, ": got ", t.numel(), " elements, supported: a contiguous tensor of at least ",
        least);
  return static_cast<int64_t*>(t.data_ptr());
}

}  // namespace genfast
