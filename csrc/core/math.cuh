// Elementary functions on the device under the names that core/activation.h asks for.
#pragma once
#include <cmath>

#include "activation.h"
#include "launch.h"

namespace genfast {

struct DeviceMath {
  __device__ __forceinline__ static float exp(float x) { return ::expf(x); }
  __device__ __forceinline__ static double exp(double x) { return ::exp(x); }
  __device__ __forceinline__ static float expm1(float x) { return ::expm1f(x); }
  __device__ __forceinline__ static double expm1(double x) { return ::expm1(x); }
  __device__ __forceinline__ static float tanh(float x) { return ::tanhf(x); }
  __device__ __forceinline__ static double tanh(double x) { return ::tanh(x); }
  __device__ __forceinline__ static float log1p_exp(float x) { return ::log1pf(::expf(x)); }
  __device__ __forceinline__ static double log1p_exp(double x) { return ::log1p(::exp(x)); }
  __device__ __forceinline__ static float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
    return __fdividef(1.0f, 1.0f + exp(-x));  // within two units in the last place; a full division calls a subroutine and spills
#else
    return 1.0f / (1.0f + exp(-x));
#endif
  }
  __device__ __forceinline__ static double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
  template <class T>
  __device__ __forceinline__ static T smooth(Act act, int order, T u) {
    return smooth_activation<DeviceMath, T>(act, order, u);
  }
};

}  // namespace genfast
