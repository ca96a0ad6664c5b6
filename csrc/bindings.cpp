// genfast._C: what the wheel holds, and the noise on the host. No tensors here: kernels register with torch themselves,
// so this module depends on a Python version only, never on a torch version.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <string>

#include "core/philox.h"

namespace py = pybind11;

namespace {

struct Kernel {
  const char* op;
  const char* backend;
  const char* dtypes;   // of the state or output, separated by spaces
  const char* minimum;  // instruction set or GPU architecture
  const char* notes;
};

constexpr const char* kFloats = "float32 float64 bfloat16 float16";
constexpr const char* kAttentionFloats = "float32 bfloat16 float16";
constexpr const char* kAnyIsa = "any; faster with AVX2 and AVX-512";
constexpr const char* kStepNotes = "model output float32, bfloat16 or float16; float64 state with float64 or float32 output";
constexpr const char* kBiasActNotes = "nine activations, derivatives to the third order";
constexpr const char* kBnActNotes = "statistics of a batch or of groups, residual, activation, backward";
constexpr const char* kRopeNotes = "RMS or layer norm and rotary embedding of queries and keys, backward";
constexpr const char* kModulateNotes = "NCHW and channels_last, backward";
constexpr const char* kUpfirdnNotes = "any scaling, padding and filter, separable or not";

constexpr Kernel kCatalogue[] = {
    {"noise", "cpu", kFloats, kAnyIsa, "docs/noise.md, version 1"},
    {"solver_step", "cpu", kFloats, kAnyIsa, kStepNotes},
    {"bias_act", "cpu", kFloats, kAnyIsa, kBiasActNotes},
    {"bn_act", "cpu", kFloats, kAnyIsa, kBnActNotes},
    {"qknorm_rope", "cpu", kFloats, kAnyIsa, kRopeNotes},
    {"modulate_bias_act", "cpu", kFloats, kAnyIsa, kModulateNotes},
    {"upfirdn2d", "cpu", kFloats, kAnyIsa, kUpfirdnNotes},
    {"attention", "cpu", kAttentionFloats, "any; faster with AVX2, AVX-512 and AMX", "forward and backward; docs/attention.md"},
    {"attention_decode", "cpu", kAttentionFloats, kAnyIsa, "1 to 16 queries, split keys"},
#ifdef GENFAST_HAS_CUDA
    {"attention", "cuda", kAttentionFloats, "any; tensor cores from sm_80", "forward, backward; head dimensions up to 256"},
    {"attention_decode", "cuda", kAttentionFloats, "any; tensor cores from sm_80", "1 to 16 queries, split keys"},
    {"noise", "cuda", kFloats, "sm_75", "docs/noise.md, version 1"},
    {"solver_step", "cuda", kFloats, "sm_75", kStepNotes},
    {"bias_act", "cuda", kFloats, "sm_75", kBiasActNotes},
    {"bn_act", "cuda", kFloats, "sm_75", kBnActNotes},
    {"qknorm_rope", "cuda", kFloats, "sm_75", kRopeNotes},
    {"modulate_bias_act", "cuda", kFloats, "sm_75", kModulateNotes},
    {"upfirdn2d", "cuda", kFloats, "sm_75", kUpfirdnNotes},
#endif
};

void check(std::int64_t seed, std::int64_t draw, std::int64_t stream, std::int64_t start, std::int64_t count) {
  auto require = [](bool ok, const char* name, std::int64_t got, const char* supported) {
    if (!ok) throw py::value_error(std::string(name) + ": got " + std::to_string(got) + ", supported: " + supported);
  };
  require(seed >= 0, "seed", seed, "0 to 2**63 - 1");
  require(draw >= 0 && draw < (std::int64_t{1} << 32), "draw", draw, "0 to 2**32 - 1");
  require(stream >= 0 && stream < (std::int64_t{1} << 32), "stream", stream, "0 to 2**32 - 1");
  require(start >= 0, "start", start, "0 or more");
  require(count >= 0, "count", count, "0 or more");
}

// Fill: (seed, stream, draw, i) -> the four values of elements 4i .. 4i + 3
template <class Fill>
py::array_t<float> generate(std::int64_t seed, std::int64_t count, std::int64_t draw, std::int64_t stream, std::int64_t start, Fill fill) {
  check(seed, draw, stream, start, count);
  py::array_t<float> array(count);
  float* out = array.mutable_data();
  for (std::int64_t e = start; e < start + count;) {
    const auto values = fill(static_cast<std::uint64_t>(seed), static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(draw),
                             static_cast<std::uint64_t>(e) / 4);
    for (auto j = e % 4; j < 4 && e < start + count; ++j, ++e) out[e - start] = values[j];
  }
  return array;
}

std::array<float, 4> four_normals(std::uint64_t seed, std::uint32_t stream, std::uint32_t draw, std::uint64_t i) {
  return std::to_array(genfast::normals(seed, stream, draw, i).z);
}

std::array<float, 4> four_uniforms(std::uint64_t seed, std::uint32_t stream, std::uint32_t draw, std::uint64_t i) {
  const genfast::Words words = genfast::philox(seed, stream, draw, i);
  return {genfast::uniform(words.w[0]), genfast::uniform(words.w[1]), genfast::uniform(words.w[2]), genfast::uniform(words.w[3])};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and host-side noise of genfast.";
  m.attr("version") = GENFAST_VERSION;
  m.attr("cuda_archs") = GENFAST_CUDA_ARCHS;
  m.attr("nvcc_version") = GENFAST_NVCC_VERSION;
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") = std::to_string(GENFAST_TORCH_TARGET >> 56) + "." + std::to_string((GENFAST_TORCH_TARGET >> 48) & 0xff);
  m.def(
      "kernels",
      [] {
        py::list rows;
        for (const Kernel& k : kCatalogue) {
          py::dict row;
          row["op"] = k.op;
          row["backend"] = k.backend;
          row["dtypes"] = py::str(k.dtypes).attr("split")();
          row["minimum"] = k.minimum;
          row["notes"] = k.notes;
          rows.append(row);
        }
        return rows;
      },
      "The compiled kernels: a list of dictionaries with op, backend, dtypes, minimum and notes.");
  const auto define_noise = [&m](const char* name, auto fill, const char* doc) {
    m.def(
        name,
        [fill](std::int64_t seed, std::int64_t count, std::int64_t draw, std::int64_t stream, std::int64_t start) {
          return generate(seed, count, draw, stream, start, fill);
        },
        py::arg("seed"), py::arg("count"), py::arg("draw") = 0, py::arg("stream") = 0, py::arg("start") = 0, doc);
  };
  define_noise("normal", four_normals, "float32 normals of elements start .. start + count - 1, shape (count,): docs/noise.md.");
  define_noise("uniform", four_uniforms,
               "float32 uniforms in [0, 1) of elements start .. start + count - 1, shape (count,): docs/noise.md.");
}
