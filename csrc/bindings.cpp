// genfast._C: what the wheel holds, and the noise on the host. No tensors here: kernels register with torch themselves,
// so this module depends on a Python version only, never on a torch version.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/philox.h"

namespace py = pybind11;

namespace {

struct Kernel {
  const char* op;
  const char* backend;
  std::vector<std::string> dtypes;  // of the state or output
  const char* minimum;              // instruction set or GPU architecture
  const char* notes;
};

const std::vector<Kernel>& catalogue() {
  static const std::vector<Kernel> kernels = {
      {"noise", "cpu", {"float32", "float64", "bfloat16", "float16"}, "any; faster with AVX2 and AVX-512", "docs/noise.md, version 1"},
      {"solver_step",
       "cpu",
       {"float32", "float64", "bfloat16", "float16"},
       "any; faster with AVX2 and AVX-512",
       "model output float32, bfloat16 or float16; float64 state with float64 or float32 output"},
      {"bias_act",
       "cpu",
       {"float32", "float64", "bfloat16", "float16"},
       "any; faster with AVX2 and AVX-512",
       "nine activations, derivatives to the third order"},
      {"bn_act",
       "cpu",
       {"float32", "float64", "bfloat16", "float16"},
       "any; faster with AVX2 and AVX-512",
       "statistics of a batch or of groups, residual, activation, backward"},
      {"qknorm_rope",
       "cpu",
       {"float32", "float64", "bfloat16", "float16"},
       "any; faster with AVX2 and AVX-512",
       "RMS or layer norm and rotary embedding of queries and keys, backward"},
      {"modulate_bias_act",
       "cpu",
       {"float32", "float64", "bfloat16", "float16"},
       "any; faster with AVX2 and AVX-512",
       "NCHW and channels_last, backward"},
      {"upfirdn2d",
       "cpu",
       {"float32", "float64", "bfloat16", "float16"},
       "any; faster with AVX2 and AVX-512",
       "any scaling, padding and filter, separable or not"},
      {"attention",
       "cpu",
       {"float32", "bfloat16", "float16"},
       "any; faster with AVX2, AVX-512 and AMX",
       "forward and backward; docs/attention.md"},
      {"attention_decode", "cpu", {"float32", "bfloat16", "float16"}, "any; faster with AVX2 and AVX-512", "1 to 16 queries, split keys"},
#ifdef GENFAST_HAS_CUDA
      {"attention", "cuda", {"float32", "bfloat16", "float16"}, "any; tensor cores from sm_80", "forward, backward; head dimensions up to 256"},
      {"attention_decode", "cuda", {"float32", "bfloat16", "float16"}, "any; tensor cores from sm_80", "1 to 16 queries, split keys"},
      {"noise", "cuda", {"float32", "float64", "bfloat16", "float16"}, "sm_75", "docs/noise.md, version 1"},
      {"solver_step",
       "cuda",
       {"float32", "float64", "bfloat16", "float16"},
       "sm_75",
       "model output float32, bfloat16 or float16; float64 state with float64 or float32 output"},
      {"bias_act", "cuda", {"float32", "float64", "bfloat16", "float16"}, "sm_75", "nine activations, derivatives to the third order"},
      {"bn_act",
       "cuda",
       {"float32", "float64", "bfloat16", "float16"},
       "sm_75",
       "statistics of a batch or of groups, residual, activation, backward"},
      {"qknorm_rope",
       "cuda",
       {"float32", "float64", "bfloat16", "float16"},
       "sm_75",
       "RMS or layer norm and rotary embedding of queries and keys, backward"},
      {"modulate_bias_act", "cuda", {"float32", "float64", "bfloat16", "float16"}, "sm_75", "NCHW and channels_last, backward"},
      {"upfirdn2d", "cuda", {"float32", "float64", "bfloat16", "float16"}, "sm_75", "any scaling, padding and filter, separable or not"},
#endif
  };
  return kernels;
}

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
        for (const Kernel& k : catalogue())
          rows.append(py::dict(py::arg("op") = k.op, py::arg("backend") = k.backend, py::arg("dtypes") = k.dtypes,
                               py::arg("minimum") = k.minimum, py::arg("notes") = k.notes));
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
